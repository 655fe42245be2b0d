"""The version, and which torch fastmtl needs. setup.py and the build backend run this file without the package."""

from __future__ import annotations

import re

__version__ = "0.2.0"
# the name on the package index, where `fastmtl` is another project
DISTRIBUTION = "torch-fastmtl"
# the oldest release whose stable ABI has all that csrc/ uses
OLDEST_TORCH = (2, 10)


def torch_problem(version: str) -> str | None:
    """What is wrong with a release of torch, and the way out; None: nothing."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and tuple(map(int, found.groups())) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f'fastmtl needs torch {oldest} or later, found torch {version}: pip install --upgrade "torch>={oldest}"'


def require_torch() -> None:
    """Checks the torch that is installed, before anything is imported that an older one lacks.

    Raises:
        ImportError: it is older than `OLDEST_TORCH`.
    """
    import torch

    problem = torch_problem(torch.__version__)
    if problem is not None:
        raise ImportError(problem)
