"""bench/report.py: the table and the plot from a benchmark's JSON."""

import json
import subprocess
import sys
from pathlib import Path

REPORT = Path(__file__).parent.parent / "bench" / "report.py"


def measured(which, median, peak):
    info = dict(
        peak_memory_bytes=peak, bytes_moved=1 << 20, copy_bytes_per_second=2e10, fraction_of_copy_bandwidth=0.5
    )
    return dict(group="agreement large", params={"which": which}, stats={"median": median}, extra_info=info)


def test_table_and_plot(tmp_path):
    benchmarks = [measured("eager", 0.08, 400), measured("compile", 0.02, 100), measured("bllkern", 0.01, 100)]
    (tmp_path / "results.json").write_text(json.dumps({"benchmarks": benchmarks}))
    command = [sys.executable, str(REPORT), str(tmp_path / "results.json"), str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| agreement large | 10.00 ms | 8.00 | 2.00 | 4.0 | 50% |" in printed
    assert (tmp_path / "out" / "table.md").read_text() == printed
    assert (tmp_path / "out" / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_without_arguments_it_says_how_it_is_used():
    result = subprocess.run([sys.executable, str(REPORT)], capture_output=True, text=True)
    assert result.returncode == 2 and "usage: python bench/report.py RESULTS.json" in result.stdout
