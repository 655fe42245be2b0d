"""Freed memory is kept for the next step, where glibc can be told so and nobody has told it otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FORKED = """
import os
from fastmtl.core import memory

told = []
as_it_is = memory._keep
memory._keep = lambda most, mapped: told.append(most) or as_it_is(most, mapped)
assert memory.keep_freed_memory() and memory.keep_freed_memory()
child = os.fork()
if child == 0:
    assert memory.keep_freed_memory() and memory.keep_freed_memory()
    print(*told, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(*told)
"""

SCRIPT = """
import platform
import torch
from pathlib import Path
from fastmtl.core.memory import keep_freed_memory

# from glibc 2.36 on blocks larger than the 32 MB that it maps anew by itself
SIZE = 12_500_000 if tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 36) else 5_000_000

def resident():
    return next(int(x.split()[1]) / 1e3 for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)

print(keep_freed_memory())
before = resident()
blocks = [torch.ones(SIZE) for _ in range(200_000_000 // (4 * SIZE))]  # 200 MB
held = resident() - before
del blocks
print(held > 150 and resident() - before > 150)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ({}, ["True", "True"]),
        ({"FASTMTL_KEEP_MEMORY": "0"}, ["False", "False"]),
        ({"FASTMTL_KEEP_MEMORY": "off"}, ["False", "False"]),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, ["False", "False"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, ["False", "False"]),
    ],
)
def test_freed_memory_is_kept_unless_told_otherwise(setting: dict[str, str], kept: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | setting
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == kept, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_a_forked_process_keeps_none_until_it_asks() -> None:
    """As a worker of a DataLoader, beside a process that trains in it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, env=environment, timeout=120)
    in_child, in_parent = (line.split() for line in done.stdout.splitlines())
    assert in_child == [in_parent[0], str(64 << 20), in_parent[0]] and len(in_parent) == 1, done.stderr
