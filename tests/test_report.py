"""bench/report.py: the table and the plot from a benchmark's JSON."""

import json
import subprocess
import sys
from pathlib import Path

REPORT = Path(__file__).parent.parent / "bench" / "report.py"


def measured(which, median, peak):
    info = dict(peak_memory_bytes=peak, bytes_moved=1 << 20, copy_bytes_per_second=2e10, fraction_of_copy_bandwidth=0.5)
    return dict(group="agreement large", params={"which": which}, stats={"median": median}, extra_info=info)


def test_table_and_plot(tmp_path):
    benchmarks = [measured("eager", 0.08, 400), measured("compile", 0.02, 100), measured("bllkern", 0.01, 100)]
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(REPORT), str(tmp_path / "results.json"), str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| agreement large | 10.00 ms | 8.00 | 2.00 | 4.0 | 50% |" in printed
    assert (tmp_path / "out" / "table.md").read_text() == printed
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_small_sizes_and_training_steps_have_tables_of_their_own(tmp_path):
    size = dict(eager_seconds=2e-5, seconds=1e-5, gain=2.0)
    variant = dict(step_seconds=0.5, peak_memory_bytes=100, time_ratio=0.86, memory_ratio=0.53)
    benchmarks = [
        measured("bllkern", 0.01, 100),
        dict(group="small sizes: prototypes forward", params={}, extra_info={"sizes": {"(1, 16)": size}}),
        dict(group="training resnet batch 32", params={}, extra_info={"variants": {"bwbpf": variant}}),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(REPORT), str(tmp_path / "results.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| prototypes forward | (1, 16) | 10.0 µs | 2.00 |" in printed
    assert "| resnet batch 32 | bwbpf | 500.00 ms | 0.86 | 0.53 |" in printed


def test_without_arguments_it_says_how_it_is_used():
    result = subprocess.run([sys.executable, str(REPORT)], capture_output=True, text=True)
    assert result.returncode == 2 and "usage: python bench/report.py RESULTS.json" in result.stdout
