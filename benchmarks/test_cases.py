"""The cases of `fastmtl bench` under pytest-benchmark, one benchmark per candidate, grouped by case."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastmtl.benchmarks.runner import registry

pytest.importorskip("pytest_benchmark")


def _id(case: registry.Case, candidate: registry.Candidate) -> str:
    # without spaces and "=", so that `-k` takes any part of it
    return f"{case.suite}-{case.name}-{candidate.label}".replace(" ", "-").replace("=", "").replace("+", "-")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.config.getoption("--bench-device", None)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    quick = not metafunc.config.getoption("--bench-full", False)
    cases = registry.collect(registry.SUITES, device, quick=quick)
    metafunc.parametrize(
        ("checked", "candidate"),
        [((case, device), candidate) for case in cases for candidate in case.candidates],
        ids=[_id(case, candidate) for case in cases for candidate in case.candidates],
        indirect=["checked"],
        scope="module",
    )


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> Iterator[tuple[registry.Case, Any, torch.device]]:
    """A case with inputs on which ours agreed with the oracle; made once for all candidates of the case."""
    case, device = request.param
    if case.suite == "step":
        pytest.importorskip("sklearn")
    inputs = case.make(device)
    check = case.check(inputs, case.ours.call)
    assert check.passed, f"{case.name}: error {check.error:.2g} > {check.tolerance:.2g} ({check.against})"
    yield case, inputs, device
    del inputs
    gc.collect()


def test_case(checked: tuple[registry.Case, Any, torch.device], candidate: registry.Candidate, benchmark: Any) -> None:
    case, inputs, device = checked
    if candidate.unavailable:
        pytest.skip(candidate.unavailable)
    if candidate.traffic > 40e9:
        pytest.skip(f"a call moves {candidate.traffic / 1e9:.0f} GB")
    benchmark.group = f"{case.suite}/{case.name}"
    benchmark.extra_info.update({key: str(value) for key, value in case.params.items()}, detail=candidate.detail)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (case.prepare(inputs, candidate.label) if case.prepare else inputs,), {}

    def call(argument: Any) -> None:
        candidate.call(argument)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(call, setup=setup, rounds=7, warmup_rounds=1)
