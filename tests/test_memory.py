"""Freed memory is kept for the next step, where glibc can be told so and nobody has told it otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from pathlib import Path
from fastmtl.core.memory import keep_freed_memory

def resident():
    return next(int(x.split()[1]) / 1e3 for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)

print(keep_freed_memory())
before = resident()
blocks = [torch.ones(5_000_000) for _ in range(10)]  # 200 MB
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
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, ["False", "False"]),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, ["False", "False"]),
    ],
)
def test_freed_memory_is_kept_unless_told_otherwise(setting: dict[str, str], kept: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | setting
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == kept, done.stderr
