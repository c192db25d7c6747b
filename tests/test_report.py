"""bench/report.py and report_training.py: tables and plots from the benchmarks' JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
REPORT = BENCH / "report.py"


def measured(which, median, peak):
    info = dict(peak_memory_bytes=peak, bytes_moved=1 << 20, copy_bytes_per_second=2e10, fraction_of_copy_bandwidth=0.5)
    return dict(group="agreement large", params={"which": which}, stats={"median": median}, extra_info=info)


def test_table_and_plot(tmp_path):
    benchmarks = [measured("eager", 0.08, 400), measured("compile", 0.02, 100), measured("bllkern", 0.01, 100)]
    benchmarks[-1]["extra_info"].update(bound="its arithmetic", fraction_of_bound=0.9)
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(REPORT), str(tmp_path / "results.json"), str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| agreement large | 10.00 ms | 8.00 | 2.00 | 4.0 | 50% (its arithmetic: 90%) |" in printed
    assert (tmp_path / "out" / "table.md").read_text() == printed
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_small_sizes_have_a_table_of_their_own(tmp_path):
    size = dict(eager_seconds=2e-5, seconds=1e-5, gain=2.0)
    benchmarks = [
        measured("bllkern", 0.01, 100),
        dict(group="small sizes: prototypes forward", params={}, extra_info={"sizes": {"(1, 16)": size}}),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(REPORT), str(tmp_path / "results.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| prototypes forward | (1, 16) | 10.0 µs | 2.00 |" in printed


def test_training_has_a_report_of_its_own(tmp_path):
    variants = {
        "backprop": {"step_seconds": 0.02, "time_ratio": 1.0, "memory_ratio": 1.0},
        "bll eager": {"step_seconds": 0.01868, "time_ratio": 0.934, "memory_ratio": 0.25},
    }
    depth = {"depths": [8, 16], "peak_memory_bytes": {"backprop": [1 << 20, 2 << 20], "immediate": [1 << 19, 1 << 19]}}
    benchmarks = [
        measured("bllkern", 0.01, 100),
        {"group": "training stack", "params": {"case": "stack"}, "extra_info": {"variants": variants}},
        {"group": "depth", "params": None, "extra_info": depth},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(BENCH / "report_training.py"), str(tmp_path / "results.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| training stack | bll eager | 18.7 ms | 0.93 | 0.25 |" in printed
    assert (tmp_path / "training.md").read_text() == printed
    for name in ("time_against_memory.png", "memory_against_depth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    command[1] = str(REPORT)
    kernels = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "agreement large" in kernels and "training" not in kernels


@pytest.mark.parametrize("script", ["report.py", "report_training.py"])
def test_without_arguments_it_says_how_it_is_used(script):
    result = subprocess.run([sys.executable, str(BENCH / script)], capture_output=True, text=True)
    assert result.returncode == 2 and f"usage: python bench/{script} RESULTS.json" in result.stdout
