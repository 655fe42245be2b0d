#!/usr/bin/env bash
# The stable-ABI claim: a wheel built against one torch imports and works under another, older or newer.
# Usage: check.sh PYTHON [TORCH...]: PYTHON makes the environments, one for each requirement (default: torch==2.10.0, the
# torch of PYTHON's own environment, and the newest; a release that comes twice is taken once). In each a wheel is built,
# and every wheel is run in each. Downloads those releases with all that they need, gigabytes, into TMPDIR.
# FASTMTL_CUDA=0 builds the CPU half alone, as setup.py does where no nvcc fits a torch.
set -euo pipefail
python=$(realpath -s "${1:?usage: check.sh PYTHON [TORCH...]}")
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
releases=("$@")
if [ ${#releases[@]} -eq 0 ]; then
  here=$("$python" -c 'import torch; print(torch.__version__)')
  releases=(torch==2.10.0 "torch==${here%%+*}" torch)
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# of the environments alone, in the smoke test too
unset PYTHONPATH PYTHONHOME FASTMTL_BACKEND
pip=(-m pip --disable-pip-version-check -q)

declare -A environments=() # version -> its folder
versions=()
for k in "${!releases[@]}"; do
  "$python" -m venv "$work/$k"
  own=$work/$k/bin/python
  "$own" "${pip[@]}" install "${releases[k]}" numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
  version=$("$own" -c 'import torch; print(torch.__version__)')
  if [ -n "${environments[$version]:-}" ]; then
    echo "${releases[k]} is torch $version as well"
    rm -rf "${work:?}/$k"
    continue
  fi
  environments[$version]=$work/$k
  versions+=("$version")
  # a copy: objects of another release's headers must not be taken for this one's
  mkdir "$work/$k/source"
  git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$work/$k/source")
  # setup.py says itself where no toolkit fits this torch, and builds the CPU half alone then
  "$own" -m pip --disable-pip-version-check wheel -v --no-deps --no-build-isolation -w "$work/$k/wheel" "$work/$k/source" \
    >"$work/$k/build.txt" 2>&1 || { tail -n 60 "$work/$k/build.txt"; exit 1; }
  grep -o 'fastmtl: no nvcc .*' "$work/$k/build.txt" || true
  echo "built against $version"
done
for under in "${versions[@]}"; do
  for against in "${versions[@]}"; do
    own=${environments[$under]}/bin/python
    "$own" "${pip[@]}" install --no-deps --force-reinstall "${environments[$against]}"/wheel/*.whl
    echo "the wheel built against $against, under $under:"
    # outside the checkout
    (cd "$work" && "$own" "$root/tests/abi/smoke.py")
  done
done
