#!/usr/bin/env bash
# On a machine with a GPU and torch: build, smoke test, then tests, rates, sanitizers and benchmarks, each stage with a
# time limit of its own.
# Usage: gpu_check.sh [PART...] with OUT (default build/gpu-check) and PYTHON (default python3, whose environment has
# torch, Triton, setuptools, ninja, pybind11, pytest and what `fastmtl bench` needs). INSTALLED=1: the package is there
# already, nothing is built. No network is needed. docs/kernels/first-gpu-run.md says what each part answers and how long it takes.
#   smoke      every op once, each launch waited for: the first to run, and quick to fail (always run)
#   surgery    tests of gradient surgery in CUDA C++
#   rates      bytes per second of each CUDA C++ kernel beside a copy's
#   triton     tests of gradient surgery in Triton
#   task       tests of the per-task ops, of the layers and of one_pass
#   hosttime   time of the host per layer
#   bench      suite surgery, quick
#   methods    suite methods, quick
#   conv       suite conv, quick; ROWS: only rows with this text
#   models     suite models, quick
#   step       suite step
#   sanitize   every CUDA kernel under memcheck and racecheck; SANITIZED: of the solvers or the kernels alone
#   profile    an ncu report of the main kernels
#   table      the slow tests: Triton on the whole table, more than 2^31 elements
# Without a part: smoke, surgery, rates, task, triton. All that a run says is in $OUT/log.txt; benchmarks leave their
# files in $OUT/results.
set -u
cd "$(dirname "$0")/../.."
known="smoke surgery rates triton task hosttime bench methods conv models step sanitize profile table"
parts=("$@")
[ $# -gt 0 ] || parts=(surgery rates task triton)
for part in "${parts[@]}"; do
  case " $known " in *" $part "*) ;; *)
    echo "no part $part; the parts: $known"
    exit 2
    ;;
  esac
done
out=${OUT:-build/gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
log=$out/log.txt
: >"$log"
failed=0
export PYTHONUNBUFFERED=1

wanted() { [[ " ${parts[*]} " = *" $1 "* ]]; }

stage() {  # NAME SECONDS COMMAND...: interrupted at its limit, so that it can still say what it found
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  echo "== $name" | tee -a "$log"
  timeout -s INT -k 30 "$limit" "$@" >"$out/stage.txt" 2>&1
  code=$?
  cat "$out/stage.txt" >>"$log"
  tail -n "${SHOW:-4}" "$out/stage.txt"
  rm "$out/stage.txt"
  if [ $code -eq 0 ]; then echo "   ok in $((SECONDS - begin)) s"; else echo "   FAILED ($code) after $((SECONDS - begin)) s"; fi |
    tee -a "$log"
  [ $code -eq 0 ] || failed=1
  return $code
}

skipped() { echo "== $1: SKIPPED, $2" | tee -a "$log"; }

tool() {  # the path of a tool of the CUDA toolkit, or nothing
  command -v "$1" || { [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/$1" ] && echo "${CUDA_HOME:-/usr/local/cuda}/bin/$1"; }
}

module() { "$python" -c "import $1" >/dev/null 2>&1; }

# kernels of Triton take seconds to compile: many processes share the work. A test that hangs ends with its traceback.
pytest=("$python" -m pytest -v --tb=short)
if module xdist; then pytest+=(-n "${WORKERS:-$(nproc)}"); fi
# Some start processes of their own, or fill the card.
if module pytest_timeout; then pytest+=(--timeout 300); fi

if ! "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "$python has no torch that sees a GPU"
  exit 1
fi
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
  export TORCH_CUDA_ARCH_LIST
fi
if [ -z "${INSTALLED:-}" ]; then
  install=("$python" -m pip install --no-build-isolation --no-deps)
  if "$python" -c 'import os, sysconfig; raise SystemExit(not os.access(sysconfig.get_path("purelib"), os.W_OK))'; then
    stage build 300 "${install[@]}" -e . || exit 1
  else
    # not ours to write to: beside the results of the build
    stage build 300 "${install[@]}" --upgrade --target build/site . || exit 1
    export PYTHONPATH=$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONSAFEPATH=1  # else `-m` would find the checkout's own fastmtl first, which has nothing built
  fi
fi
SHOW=40 stage info 60 "$python" -m fastmtl info
# without them the tests would skip, and the benchmarks measure something else
stage backends 60 "$python" -c '
from fastmtl.core import dispatch
missing = {name: dispatch.unavailable(name, "cuda") for name in ("cuda", "triton")}
print(missing)
raise SystemExit(any(missing.values()))' || exit 1
# Inductor's pool of compilers can outlive a worker of the tests and hold it up at its end
export TORCHINDUCTOR_COMPILE_THREADS=1
# many processes at once on the same cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
SHOW=12 stage smoke 150 env CUDA_LAUNCH_BLOCKING=1 "$python" -m fastmtl.benchmarks.gpu.gpu_smoke

if wanted surgery; then
  SHOW=25 stage surgery 120 "${pytest[@]}" -m "not slow" -k "not triton" \
    tests/gpu/test_cuda_*.py tests/gpu/test_surgery_steps.py
fi
if wanted rates; then SHOW=60 stage rates 90 "$python" -m fastmtl.benchmarks.gpu.surgery_check rates --backend cuda; fi
if wanted task; then
  SHOW=40 stage task 300 "${pytest[@]}" -m "not slow" tests/gpu/test_task_ops.py tests/gpu/test_low_rank_ops.py \
    tests/gpu/test_nn_layers.py tests/gpu/test_one_pass_steps.py
fi
if wanted triton; then
  SHOW=25 stage triton 200 "${pytest[@]}" -m "not slow" -k triton tests/gpu/test_cuda_*.py tests/gpu/test_surgery_steps.py
fi
if wanted hosttime; then SHOW=20 stage hosttime 120 "$python" -m fastmtl.benchmarks.gpu.host_time; fi

if wanted bench; then
  SHOW=60 stage bench 310 "$python" -m fastmtl bench --suite surgery --quick --device cuda --out "$out/results"
fi
if wanted methods; then
  SHOW=60 stage methods 200 "$python" -m fastmtl bench --suite methods --quick --device cuda --out "$out/results"
fi
if wanted conv; then
  SHOW=60 stage conv 310 "$python" -m fastmtl bench --suite conv --quick --device cuda --out "$out/results" ${ROWS:+--filter "$ROWS"}
fi
if wanted models; then
  SHOW=60 stage models 200 "$python" -m fastmtl bench --suite models --quick --device cuda --out "$out/results"
fi
if wanted step; then SHOW=70 stage step 310 "$python" -m fastmtl bench --suite step --device cuda --out "$out/results"; fi

if wanted sanitize; then
  sanitizer=$(tool compute-sanitizer)
  if [ -n "$sanitizer" ]; then
    # of torch's kernels there is nothing to learn; with its cache of memory a kernel that reads past the end of a
    # tensor still reads memory that is the process's own
    options=(--error-exitcode 9 --kernel-name kns=fastmtl --report-api-errors no)
    for what in ${SANITIZED:-solvers kernels}; do
      check=("$python" -m fastmtl.benchmarks.gpu.surgery_check "$what" --backend cuda)
      stage "memcheck $what" 160 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck "${options[@]}" "${check[@]}"
      stage "racecheck $what" 160 "$sanitizer" --tool racecheck "${options[@]}" "${check[@]}"
    done
  else
    skipped sanitize "compute-sanitizer was not found on the PATH or under CUDA_HOME"
  fi
fi
if wanted profile; then
  profiler=$(tool ncu)
  if [ -n "$profiler" ]; then
    metrics=gpu__time_duration.sum,dram__bytes.sum.per_second,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics=$metrics,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
    SHOW=80 stage profile 60 "$profiler" --clock-control none -k 'regex:gram_rows_kernel|gram_mma_kernel|combine_kernel|combine_split_kernel' \
      --metrics "$metrics" "$python" -m fastmtl.benchmarks.gpu.surgery_check profile --backend cuda
  else
    skipped profile "ncu was not found on the PATH or under CUDA_HOME"
  fi
fi
if wanted table; then
  SHOW=25 stage table 400 "${pytest[@]}" -m slow tests/gpu
fi
exit $failed
