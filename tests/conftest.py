"""Fixtures of every test: backends and CPU levels, poisoned uninitialised memory, seeds."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

import fastmtl
from fastmtl.core import dispatch
from fastmtl.core.schemas import PUBLIC_OPS
from fastmtl.tuning import search
from fastmtl.tuning.table import DEFAULTS

# cuBLAS is deterministic only with this, and says so by raising
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# by the same ways on every machine, whatever its table says
search._given = DEFAULTS

REQUIRE_EXTENSION = os.environ.get("FASTMTL_REQUIRE_EXTENSION") == "1"


class Backend(NamedTuple):
    """A backend that a test runs on; `level`: the CPU vector level, None for the reference or the default."""

    name: str
    level: str | None = None

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name}_{self.level}"


def _cpu_levels() -> list[str | None]:
    return list(dispatch.extension.available_cpu_levels()) if dispatch.extension is not None else [None]


BACKENDS = [Backend("reference"), Backend("cpu")]
BACKENDS_AND_LEVELS = [Backend("reference"), *(Backend("cpu", level) for level in _cpu_levels())]


def skip_or_fail(reason: str) -> None:
    """Skips, or fails where the extension is required (CI, `make test`)."""
    if REQUIRE_EXTENSION:
        pytest.fail(f"FASTMTL_REQUIRE_EXTENSION=1, but: {reason}")
    pytest.skip(reason)


def _forced(backend: Backend) -> Iterator[Backend]:
    reason = dispatch.unavailable(backend.name, "cpu")
    if reason is not None:
        skip_or_fail(reason)
    extension = dispatch.extension
    before = extension.cpu_level() if backend.level is not None else None
    if backend.level is not None:
        extension.set_cpu_level(backend.level)
    try:
        with fastmtl.use_backend(backend.name):
            yield backend
    finally:
        if before is not None:
            extension.set_cpu_level(before)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test on the reference and on the compiled CPU code at its best level."""
    yield from _forced(request.param)


@pytest.fixture(params=BACKENDS_AND_LEVELS, ids=str)
def level(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs the test on the reference and on the compiled CPU code at every level that this CPU can run."""
    yield from _forced(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin, here and in C++, give NaN (the largest integer), so an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch would keep three formatted call stacks of it, for devices that never start
        torch.default_generator.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads that a test has changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile without what earlier tests left in its caches."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than a few seconds")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--check", action="store_true", help="of each test its first case on each backend (`make check`)")


def first_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test function that is not slow and needs no GPU: the first case on the reference, and on the CPU's best
    level; of one that goes through the ops, of each op."""
    found: dict[tuple[str, ...], pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("gpu"):
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        backend = next((value for value in parameters.values() if isinstance(value, Backend)), None)
        if backend is not None and backend.level not in (None, _cpu_levels()[-1]):
            continue
        ops = [value for value in parameters.values() if isinstance(value, str) and value in PUBLIC_OPS]
        found.setdefault((item.nodeid.split("[")[0], backend.name if backend else "", *ops), item)
    return list(found.values())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Garbage is looked for among what tests make: a million objects are there before, half a second each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--check"):
        kept = first_cases(items)
        left = set(map(id, kept))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in left])
        items[:] = kept
    if torch.cuda.is_available():
        return
    reason = "no CUDA device: " + ("torch has no CUDA" if torch.version.cuda is None else "none was found")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
