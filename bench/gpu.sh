#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: build, GPU tests, sanitizer, ceilings, benchmarks.
# Needs no registry: torch, triton, pybind11, cmake, ninja and nvcc are there already.  Usage: bench/gpu.sh OUTPUT_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:?usage: bench/gpu.sh OUTPUT_DIR}
mkdir -p "$output"

pip install --no-build-isolation --no-deps .
bllkern info | tee "$output/info.txt"
pytest -m gpu tests | tee "$output/tests.txt"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -q -m gpu tests/test_native_agreement.py | tail -n 3 | tee "$output/$tool.txt"
    done
fi

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
results="$output/$name-$(date +%Y-%m-%d).json"
timeout 420 pytest bench/ --benchmark-only -m gpu --benchmark-json="$results"
python bench/matmul_ceiling.py | tee "$output/matmul.txt"
python bench/report.py "$results" "$output"
