"""`pytest benchmarks/`: the same cases under pytest-benchmark."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-full", action="store_true", help="every benchmark case instead of the quick few")
    parser.addoption("--bench-device", default=None, help="cpu or cuda (default: cuda where there is one)")
