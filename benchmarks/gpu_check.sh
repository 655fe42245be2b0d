#!/usr/bin/env bash
# On a machine with a GPU and torch: build, GPU tests, GPU benchmarks, each with its own time limit.
# Usage: gpu_check.sh, with OUT (default build/gpu-check) and PYTHON (default python3, whose environment has torch,
# setuptools, ninja, pybind11, pytest and rich). No network is needed. All of it fits into 9 minutes.
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
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else echo "   FAILED ($?)"; failed=1; fi
  tail -n 4 "$out/$name.log"
}
stage build 150 "$python" -m pip install --no-build-isolation --no-deps -e .
stage info 30 "$python" -m fastmtl info
stage tests 150 "$python" -m pytest -q tests/gpu tests/test_cuda_build.py
stage bench 200 "$python" -m fastmtl bench --suite surgery --quick --device cuda --out "$out"
exit $failed
