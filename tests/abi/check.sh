#!/usr/bin/env bash
# The stable-ABI claim: a wheel built against one torch imports and works under another, both ways.
# Usage: check.sh PYTHON, where PYTHON's environment holds the torch to build against (2.13) and the build tools.
# Downloads two further torch releases with all that they need: gigabytes.
set -euo pipefail
python=$(realpath -s "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
other=${FASTMTL_ABI_TORCH:-torch==2.10.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

here=$("$python" -c 'import torch; print(torch.__version__)')
"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$work/here" "$root"
"$python" -m pip wheel -q --no-deps -w "$work/newest" "$root"  # isolated: against the newest release

# an environment of its own; packages that the first one has are not seen
try() {  # NAME TORCH WHEEL
  "$python" -m venv "$work/$1"
  "$work/$1/bin/python" -m pip install -q --disable-pip-version-check "$2" numpy
  "$work/$1/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$3"
  (cd "$work/$1" && bin/python "$root/tests/abi/smoke.py")
}
try other "$other" "$work"/here/*.whl
try pinned "torch==${here%%+*}" "$work"/newest/*.whl
echo "a wheel built against torch $here runs under $other; one built against the newest torch runs under $here"
