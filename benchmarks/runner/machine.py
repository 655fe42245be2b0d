"""Which machine, which versions, which commit: what a figure means nothing without."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastmtl
from fastmtl.tuning.processor import cpu_name

PACKAGES = ("torchjd", "LibMTL", "quadprog", "cvxpy", "clarabel", "ecos", "scipy", "numpy", "scikit-learn", "triton")


def versions() -> dict[str, str | None]:
    """Versions of Python, fastmtl and the packages that matter; None: not installed."""
    # of torch with the build (+cu130), which the package's metadata may lack
    known = {"python": platform.python_version(), "fastmtl": fastmtl.__version__, "torch": torch.__version__}
    found: dict[str, str | None] = dict(known)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def caches() -> dict[str, str]:
    """Caches of the first core, by level and type: `{"L1 data": "48K", ...}`."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        found[f"L{level}" if kind == "Unified" else f"L{level} {kind.lower()}"] = size
    return found


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _git(*arguments: str) -> str | None:
    # the checkout that this file lies in; an installed wheel has none, and must not report the user's own repository
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: torch.device) -> dict[str, Any]:
    """Device, machine, versions, commit and date."""
    cpu = {"name": cpu_name(), "count": os.cpu_count(), "threads": torch.get_num_threads(), "caches": caches()}
    gpu = None
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        gpu = {
            "name": p.name,
            "memory_bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "multiprocessors": p.multi_processor_count,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cuda": torch.version.cuda,
        }
    return {
        "device": gpu["name"] if gpu else f"{cpu['name']}, {cpu['threads']} threads",
        "device_type": device.type,
        "cpu": cpu,
        "gpu": gpu,
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(machine: dict[str, Any]) -> str:
    """A file name for the device: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
