"""Thin driver: builds bllkern._C by calling CMake (CMakeLists.txt).  Never imports torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def check_settings() -> str:
    cuda = os.environ.get("BLLKERN_CUDA", "AUTO").upper()
    if cuda not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"environment variable BLLKERN_CUDA must be AUTO, ON or OFF, got {cuda!r}")
    return cuda


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"building bllkern needs {name!r}, which is not installed")
    return found


class CMakeBuild(build_ext):
    """Configure and build out of the source tree, then copy the module to its place."""

    def build_extension(self, ext):
        build = (ROOT / self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        settings = {
            "BLLKERN_CUDA": check_settings(),
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": program("ninja"),  # not the one of an earlier build, which pip may have removed
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "BLLKERN_SANITIZE": os.environ.get("BLLKERN_SANITIZE", "OFF"),
        }
        cmake = program("cmake")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        self.run_step(configure + [f"-D{name}={value}" for name, value in settings.items()])
        self.run_step([cmake, "--build", str(build)])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / target.name, target)

    def run_step(self, command):
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"building bllkern._C failed in: {' '.join(command)} (exit status {error.returncode}; see the "
                "messages above; a C++17 compiler is needed, and nvcc unless BLLKERN_CUDA=OFF)"
            ) from None


setup(ext_modules=[Extension("bllkern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
