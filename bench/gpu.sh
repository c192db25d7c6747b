#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: build, GPU tests, sanitizer, ceilings, benchmarks.
# A step that fails does not keep the others from running; the last line and the exit status say whether one did.
#
# usage: bench/gpu.sh OUTPUT_DIR [WHEELS_DIR]
#
# No registry is reached: torch, triton, cmake, ninja and nvcc must be there already; WHEELS_DIR holds wheels of what is
# not (pytest, pytest-benchmark, pybind11, setuptools, ...; liger-kernel and cut-cross-entropy to be compared with).
set -uo pipefail
cd "$(dirname "$0")/.."
output=$(mkdir -p "${1:?usage: bench/gpu.sh OUTPUT_DIR [WHEELS_DIR]}" && cd "$1" && pwd)
failed=()

# step NAME COMMAND...: its output to OUTPUT_DIR/log.txt too
step() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "== $name: $((SECONDS - begin)) s"
}

site=$(mktemp -d)
install() { python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$site" "$@"; }
export PYTHONPATH=$site
# the installed package, which has the compiled module, not the folder that lies here
run_pytest() { python3 "$site/run_pytest.py" "$@"; }
printf 'import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n' >"$site/run_pytest.py"

sanitize() {
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 "$site/run_pytest.py" -q -m gpu tests/test_device.py -k "values and cuda" || return
    done
}

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
results="$output/$name-$(date +%Y-%m-%d).json"
{
    if [ -n "${2:-}" ]; then step wheels install "$2"/*.whl; fi
    step build install .
    step info python3 -P -m bllkern info
    step tests run_pytest -q -m gpu tests
    if command -v compute-sanitizer >/dev/null && grep -q cuda_built <(cd / && python3 -c \
        'from bllkern import _native; print("cuda_built" if _native.cuda_built else "")'); then
        step sanitizer sanitize
    fi
    step ceiling python3 bench/matmul_ceiling.py
    # an interrupt, unlike a kill, lets what has been measured be written
    step benchmarks timeout --signal=INT --kill-after=20 360 python3 "$site/run_pytest.py" -q bench/ --benchmark-only -m gpu \
        --benchmark-json="$results"
    step report python3 bench/report.py "$results" "$output"
    if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}"; else echo "all steps passed"; fi
} 2>&1 | tee "$output/log.txt"
tail -n 1 "$output/log.txt" | grep -q "all steps passed"
