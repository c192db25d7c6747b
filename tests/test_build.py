"""The build and its settings, without building: what is refused, and what neither build nor module may need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bllkern import _native

ROOT = Path(__file__).resolve().parent.parent

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
needs_cmake = pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "c++"))), reason="needs cmake, ninja and a C++ compiler"
)
needs_module = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))


def run(*command, cwd=ROOT, **environment):
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120
    )


@needs_source
def test_an_unknown_cuda_setting_is_refused(tmp_path):
    pytest.importorskip("pybind11")
    done = run("setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path, BLLKERN_CUDA="maybe")
    assert done.returncode != 0
    assert "BLLKERN_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@needs_source
@needs_cmake
def test_cuda_on_without_a_toolkit_is_refused(tmp_path):
    pytest.importorskip("pybind11")
    done = run(
        *("setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path),
        BLLKERN_CUDA="ON",
        CUDACXX=str(tmp_path / "no-nvcc"),
    )
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "BLLKERN_CUDA is ON, but no CUDA compiler was found" in output


@needs_source
@needs_cmake
def test_a_build_goes_on_without_the_programs_of_an_earlier_one(tmp_path):
    """pip brings ninja for each build anew, in another place, and removes it afterwards."""
    pytest.importorskip("pybind11")
    (tmp_path / "bin").mkdir()
    command = "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "build"
    settings = {"BLLKERN_CUDA": "ON", "CUDACXX": str(tmp_path / "no-nvcc")}  # ends the configuration early
    (tmp_path / "bin/ninja").symlink_to(shutil.which("ninja"))
    run(*command, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", **settings)
    assert str(tmp_path / "bin/ninja") in (tmp_path / "build/CMakeCache.txt").read_text()
    (tmp_path / "bin/ninja").unlink()
    done = run(*command, **settings)
    assert "no CUDA compiler was found" in " ".join((done.stdout + done.stderr).split())


@needs_source
def test_setup_does_not_import_torch():
    pytest.importorskip("pybind11")
    code = (
        "import runpy, sys; sys.modules['torch'] = None\n"
        "sys.argv = ['setup.py', '--version']; runpy.run_path('setup.py')"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


@needs_module
def test_the_module_loads_without_torch(tmp_path):
    code = (
        "import importlib.util, sys; sys.modules['torch'] = None\n"
        f"spec = importlib.util.spec_from_file_location('bllkern._C', {_native._C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); print(module.isa())"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in _native._C.isas


@needs_module
@pytest.mark.skipif(not shutil.which("ldd"), reason="needs ldd")
def test_the_module_links_to_neither_torch_nor_cuda_nor_openmp():
    libraries = subprocess.run(["ldd", _native._C.__file__], capture_output=True, text=True, check=True).stdout
    assert not any(name in libraries for name in ("libtorch", "libc10", "libcuda", "gomp", "libomp"))


def test_the_package_works_without_the_module(tmp_path):
    code = (
        "import sys; sys.modules['bllkern._C'] = None\n"
        "import torch, bllkern\n"
        "from bllkern import backends, functional\n"
        "print(backends.choose('agreement', 'cpu', torch.float32))\n"
        "functional.agreement(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)).backward()\n"
        "with backends.backend('cpu'): functional.agreement(torch.zeros(2, 3), torch.zeros(2, 3))\n"
    )
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(Path(_native.__file__).parents[2]))
    assert done.stdout.strip() == "reference"
    reason = "backend 'cpu' cannot run agreement on cpu in torch.float32: the compiled module bllkern._C is not there"
    assert reason in done.stderr
