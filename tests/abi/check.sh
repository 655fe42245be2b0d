#!/usr/bin/env bash
# The stable-ABI claim: a wheel built against one torch imports and works under another, older or newer.
# Usage: check.sh PYTHON [TORCH...]: PYTHON makes the environments, one for each requirement (default: torch==2.10.0, the
# torch of PYTHON's own environment, and the newest). In each a wheel is built, and every wheel is run in each.
# Downloads those releases with all that they need: gigabytes. FASTMTL_CUDA=0 builds the CPU half alone.
set -euo pipefail
python=$(realpath -s "$1")
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
releases=("$@")
if [ ${#releases[@]} -eq 0 ]; then
  here=$("$python" -c 'import torch; print(torch.__version__)')
  releases=(torch==2.10.0 "torch==${here%%+*}" torch)
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for k in "${!releases[@]}"; do
  "$python" -m venv "$work/$k"
  in=$work/$k/bin/python
  "$in" -m pip install -q --disable-pip-version-check "${releases[k]}" numpy "setuptools>=77" wheel ninja "pybind11>=2.13"
  # a copy: objects of another release's headers must not be taken for this one's
  git -C "$root" ls-files -z | (cd "$root" && xargs -0 cp --parents -t "$(mkdir -p "$work/source$k" && echo "$work/source$k")")
  "$in" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$work/wheel$k" "$work/source$k"
  echo "built against $("$in" -c 'import torch; print(torch.__version__)')"
done
for k in "${!releases[@]}"; do
  for w in "${!releases[@]}"; do
    in=$work/$k/bin/python
    "$in" -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$work/wheel$w"/*.whl
    echo "the wheel built against ${releases[w]}, under ${releases[k]}:"
    (cd "$work/$k" && bin/python "$root/tests/abi/smoke.py")
  done
done
