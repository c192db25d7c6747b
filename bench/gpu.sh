#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: build, GPU tests, sanitizer, ceilings, benchmarks.
# A step that fails does not keep the others from running; the last line and the exit status say whether one did.
# First what needs no quiet machine, side by side: the tests, and what torch.compile and Triton keep of each kernel.
#
# usage: bench/gpu.sh OUTPUT_DIR [WHEELS_DIR] [SECONDS]
#
# No registry is reached: torch, triton, cmake, ninja and nvcc must be there already; WHEELS_DIR holds wheels of what is
# not (pytest, pytest-benchmark, pybind11, setuptools, ...; liger-kernel and cut-cross-entropy to be compared with).
# SECONDS, 580 by default, is when the benchmarks are interrupted; what they have measured by then is kept.
set -uo pipefail
cd "$(dirname "$0")/.."
output=$(mkdir -p "${1:?usage: bench/gpu.sh OUTPUT_DIR [WHEELS_DIR] [SECONDS]}" && cd "$1" && pwd)
budget=${3:-580}
failed=()

# step NAME COMMAND...: its output to OUTPUT_DIR/log.txt too
step() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "== $name: $((SECONDS - begin)) s, at $SECONDS s"
}

site=$(mktemp -d)
install() { python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-compile --target "$site" "$@"; }
export PYTHONPATH=$site PYTHONUNBUFFERED=1
# the installed package, which has the compiled module, not the folder that lies here
printf 'import sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))\n' >"$site/run_pytest.py"
run_pytest=(python3 "$site/run_pytest.py" -q -p no:cacheprovider -m gpu)
kernels="backward and bfloat16"  # as GPUs train
# the first ones first: what is interrupted is the last
ops=(bench/bench_{linear_cross_entropy,evidence_cross_entropy,batch_norm_relu,gram,prototypes,linear_agreement,agreement}.py)
benchmarks=(bench/bench_gpu_training.py bench/bench_offload.py "${ops[@]}" bench/bench_depth.py bench/bench_training.py)

tests() {
    local workers=()
    if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
    "${run_pytest[@]}" "${workers[@]}" --tb=short tests
}

sanitize() {
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "${run_pytest[@]}" tests/test_device.py -k "values and cuda" || return
    done
}

# what the compilers keep on the disk: each kernel of the benchmarks is run once
warm_up() {
    local pids=() run
    for run in test_beside "captured_beside or test_captured" "${ops[@]}"; do
        local file=$run chosen=$kernels
        if [ ! -f "$run" ]; then file=bench/bench_gpu_training.py chosen=$run; fi
        timeout 100 "${run_pytest[@]}" -k "$chosen" --benchmark-disable "$file" \
            >"$site/warm-up-${#pids[@]}.log" 2>&1 &
        pids+=($!)
    done
    wait "${pids[@]}"
}

all_at_once() {
    warm_up &
    local warm=$! sanitizer=
    if command -v compute-sanitizer >/dev/null && [ "$(cd / && python3 -c \
        'from bllkern import _native; print(_native.cuda_built)')" = True ]; then
        sanitize >"$site/sanitizer.log" 2>&1 &
        sanitizer=$!
    fi
    tests
    local status=$?
    if [ -n "$sanitizer" ]; then
        wait "$sanitizer" || status=1
        cat "$site/sanitizer.log"
    fi
    wait "$warm"
    return $status
}

measure() {
    # an interrupt, unlike a kill, lets what has been measured be written
    timeout --signal=INT --kill-after=20 $((budget - SECONDS)) "${run_pytest[@]}" \
        "${benchmarks[@]}" --benchmark-only -k "$kernels or training or offload or depth" \
        --benchmark-json="$results"
}

name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--' | tr '[:upper:]' '[:lower:]')
results="$output/$name-$(date +%Y-%m-%d).json"
{
    if [ -n "${2:-}" ]; then step wheels install "$2"/*.whl; fi
    step build install .
    step info python3 -P -m bllkern info
    step "tests and sanitizer" all_at_once
    step ceiling python3 bench/matmul_ceiling.py
    step benchmarks measure
    step report python3 bench/report.py "$results" "$output"
    step "report of training" python3 bench/report_training.py "$results" "$output"
    if [ ${#failed[@]} -gt 0 ]; then echo "FAILED: ${failed[*]}"; else echo "all steps passed"; fi
} 2>&1 | tee "$output/log.txt"
tail -n 1 "$output/log.txt" | grep -q "all steps passed"
