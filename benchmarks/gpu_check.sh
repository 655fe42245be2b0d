#!/usr/bin/env bash
# On a machine with a GPU and torch: build, then tests, sanitizers and benchmarks, each stage with its own time limit.
# Usage: gpu_check.sh [surgery|sanitize|table|bench|task|step|all], with OUT (default build/gpu-check) and PYTHON (default
# python3, whose environment has torch, Triton, setuptools, ninja, pybind11, pytest and what `fastmtl bench` needs).
# No network is needed. The limits of a part add up to less than 9 minutes, the build (of the card's own architecture,
# unless TORCH_CUDA_ARCH_LIST says otherwise) included; what a stage printed before its limit stands in its log.
#   surgery   the tests of gradient surgery, CUDA and Triton forced; bytes per second of each kernel beside a copy's
#   sanitize  every CUDA kernel under memcheck and racecheck; an ncu report of the main kernels
#   table     the slow tests of gradient surgery: Triton on the whole table, more than 2^31 elements
#   bench     suite surgery
#   task      tests of the per-task ops, suite conv
#   step      suite step
set -u
cd "$(dirname "$0")/.."
part=${1:-all}
out=${OUT:-build/gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0
case $part in surgery | sanitize | table | bench | task | step | all) ;; *)
  sed -n '3,4p' "$0"
  exit 2
  ;;
esac

wanted() { [ "$part" = all ] || [ "$part" = "$1" ]; }

stage() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  if timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else echo "   FAILED ($?)"; failed=1; fi
  tail -n 4 "$out/$name.log"
}

skipped() { echo "== $1" && echo "   SKIPPED: $2"; }

tool() {  # the path of a tool of the CUDA toolkit, or nothing
  command -v "$1" || { [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/$1" ] && echo "${CUDA_HOME:-/usr/local/cuda}/bin/$1"; }
}

module() { "$python" -c "import $1" >/dev/null 2>&1; }

# Triton compiles a kernel for seconds: several processes share the work
workers() { if module xdist; then echo "-n $1"; fi; }

if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  export TORCH_CUDA_ARCH_LIST
fi
stage build 180 "$python" -m pip install --no-build-isolation --no-deps -e .
stage info 20 "$python" -m fastmtl info
# without them the tests would skip, and the benchmarks measure something else
stage backends 20 "$python" -c '
from fastmtl import _backend
missing = {name: _backend.unavailable(name, "cuda") for name in ("cuda", "triton")}
print(missing)
raise SystemExit(any(missing.values()))'
# many processes at once on the same cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

if wanted surgery; then  # with the build 530 seconds
  # shellcheck disable=SC2046
  stage tests-surgery 230 "$python" -m pytest -q --tb=short $(workers 8) -m "not slow" \
    tests/gpu/test_cuda_ops.py tests/gpu/test_surgery_steps.py
  stage rates 80 "$python" -m fastmtl.benchmarks.surgery_check rates
  cat "$out/rates.log"
fi

if wanted sanitize; then  # with the build 530 seconds
  sanitizer=$(tool compute-sanitizer)
  if [ -n "$sanitizer" ]; then
    # of torch's kernels there is nothing to learn; with its cache of memory a kernel that reads past the end of a
    # tensor still reads memory that is the process's own
    options="--error-exitcode 9 --kernel-regex kns=fastmtl --report-api-errors no"
    check="$python -m fastmtl.benchmarks.surgery_check kernels --backend cuda"
    # shellcheck disable=SC2086
    stage memcheck 130 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck $options $check
    # shellcheck disable=SC2086
    stage racecheck 130 "$sanitizer" --tool racecheck $options $check
  else
    skipped sanitizers "compute-sanitizer was not found on the PATH or under CUDA_HOME"
  fi
  profiler=$(tool ncu)
  if [ -n "$profiler" ]; then
    metrics=gpu__time_duration.sum,dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics=$metrics,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
    stage ncu 50 "$profiler" --clock-control none -k 'regex:gram_rows_kernel|gram_mma_kernel|combine_kernel' \
      --metrics "$metrics" "$python" -m fastmtl.benchmarks.surgery_check profile --backend cuda
    grep -E 'kernel|dram__|gpu__time|registers|warps' "$out/ncu.log"
  else
    skipped ncu "ncu was not found on the PATH or under CUDA_HOME"
  fi
fi

if wanted table; then  # with the build 530 seconds
  # shellcheck disable=SC2046
  stage table 310 "$python" -m pytest -q --tb=short $(workers 12) -m slow tests/gpu/test_cuda_ops.py
fi

if wanted bench; then  # with the build 530 seconds
  stage bench-surgery 310 "$python" -m fastmtl bench --suite surgery --quick --device cuda --out "$out"
  tail -n 60 "$out/bench-surgery.log"
fi

if wanted task; then  # with the build 530 seconds
  stage tests-task 190 "$python" -m pytest -v --tb=short -m "not slow" tests/gpu/test_task_ops.py
  stage bench-conv 120 "$python" -m fastmtl bench --suite conv --quick --device cuda --out "$out"
fi

if wanted step; then  # with the build 530 seconds
  stage tests-one-pass 90 "$python" -m pytest -v --tb=short tests/gpu/test_one_pass_steps.py
  stage bench-step 260 "$python" -m fastmtl bench --suite step --device cuda --out "$out"
  tail -n 70 "$out/bench-step.log"
fi
exit $failed
