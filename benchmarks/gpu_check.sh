#!/usr/bin/env bash
# On a machine with a GPU and torch: build, GPU tests, GPU benchmarks, each with its own time limit.
# Usage: gpu_check.sh, with OUT (default build/gpu-check) and PYTHON (default python3, whose environment has torch,
# Triton, setuptools, ninja, pybind11, pytest and what `fastmtl bench` needs). No network is needed. All of it fits into
# 9 minutes; what a stage printed before its limit stands in its log.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0
stage() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  if timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else echo "   FAILED ($?)"; failed=1; fi
  tail -n 4 "$out/$name.log"
}
# the limits add up to 530 seconds
stage build 120 "$python" -m pip install --no-build-isolation --no-deps -e .
stage info 20 "$python" -m fastmtl info
stage tests-task 150 "$python" -m pytest -v --tb=short -m "not slow" tests/gpu/test_task_ops.py
stage tests-surgery 60 "$python" -m pytest -q tests/gpu/test_cuda_ops.py tests/test_cuda_build.py -k "not sm_"
stage bench-conv 110 "$python" -m fastmtl bench --suite conv --quick --device cuda --out "$out"
stage bench-surgery 70 "$python" -m fastmtl bench --suite surgery --quick --device cuda --out "$out"
exit $failed
