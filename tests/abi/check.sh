#!/usr/bin/env bash
# The stable-ABI claim: a wheel built against one torch imports and works under another, older or newer.
# Usage: check.sh PYTHON [TORCH...]: PYTHON makes the environments, one for each requirement (default: torch==2.10.0, the
# torch of PYTHON's own environment, and the newest; a release that comes twice is taken once). In each a wheel is built,
# and every wheel is run in each. Downloads those releases with all that they need, gigabytes, into TMPDIR.
# FASTMTL_CUDA=0 builds the CPU half alone, as is done for a torch with another major release of CUDA than nvcc's, which
# torch's build tools refuse.
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

# of the nvcc that setup.py finds
nvcc_major() {
  local nvcc
  for nvcc in "${CUDA_HOME:-}/bin/nvcc" "${CUDA_PATH:-}/bin/nvcc" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
    if [ -x "$nvcc" ]; then
      "$nvcc" --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p'
      return
    fi
  done
}

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
  cuda=${FASTMTL_CUDA:-1}
  mine=$(nvcc_major)
  theirs=$("$own" -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
  if [ "$cuda" != 0 ] && [ -n "$mine" ] && [ -n "$theirs" ] && [ "$mine" != "$theirs" ]; then
    echo "torch $version has CUDA $theirs, nvcc is of CUDA $mine: without the CUDA half"
    cuda=0
  fi
  FASTMTL_CUDA=$cuda "$own" "${pip[@]}" wheel --no-deps --no-build-isolation -w "$work/$k/wheel" "$work/$k/source"
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
