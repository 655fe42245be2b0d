"""Choice of backend: forcing, nesting, the environment, and what is said when something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import cases
import cases_cuda
import pytest
import torch
from cases import BankCase
from conftest import skip_or_fail
from paths import ROOT
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

import fastmtl
from fastmtl import ops
from fastmtl.core import dispatch
from fastmtl.ops import combine, gram, pcgrad, pcgrad_coefficients, pcgrad_project

_GRADS = BankCase(3, 65).make()
_ORDER = cases.random_order(3)
CALLS = {
    "gram": lambda: gram(_GRADS),
    "gram lists": lambda: gram([[row] for row in _GRADS]),
    "combine": lambda: combine(torch.ones(3), _GRADS),
    "combine lists": lambda: combine(torch.ones(3), [[row] for row in _GRADS]),
    "pcgrad_coefficients": lambda: pcgrad_coefficients(torch.eye(3), _ORDER),
    "pcgrad": lambda: pcgrad(_GRADS, _ORDER),
    "pcgrad lists": lambda: pcgrad([[row] for row in _GRADS], _ORDER),
    "pcgrad_project": lambda: pcgrad_project(_GRADS, _ORDER),
    "pcgrad_project lists": lambda: pcgrad_project([[row] for row in _GRADS], _ORDER),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTMTL_BACKEND", raising=False)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "extension", None)
    monkeypatch.setattr(dispatch, "extension_error", "ImportError: hidden by a test")


def test_forcing_nests_and_restores() -> None:
    assert dispatch.forced_backend() is None
    with fastmtl.use_backend("reference"):
        assert dispatch.forced_backend() == "reference"
        with fastmtl.use_backend("cuda"):
            assert dispatch.forced_backend() == "cuda"
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() is None


def test_forcing_ends_with_an_error() -> None:
    with pytest.raises(KeyError), fastmtl.use_backend("reference"):
        raise KeyError
    assert dispatch.forced_backend() is None


def test_use_backend_as_decorator() -> None:
    seen = fastmtl.use_backend("reference")(dispatch.forced_backend)
    assert seen() == "reference" and seen() == "reference"
    assert dispatch.forced_backend() is None


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "fastmtl"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"use_backend: expected one of cpu, cuda, triton, reference, got '{name}'"):
        fastmtl.use_backend(name).__enter__()
    assert dispatch.forced_backend() is None


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTL_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"FASTMTL_BACKEND: expected one of .*, got 'gpu'"):
        gram(_GRADS)


def test_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTL_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' is forced but cannot serve this call"):
        gram(_GRADS)
    with fastmtl.use_backend("reference"):
        gram(_GRADS)
    monkeypatch.setenv("FASTMTL_BACKEND", "")
    assert dispatch.forced_backend() is None


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_op_runs_what_is_forced(call: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of implementations is asked for the forced one, never for another."""
    asked: list[str] = []
    choose = dispatch.choose

    def spy(op: str, device_type: str, implementations: dict) -> object:
        chosen = choose(op, device_type, implementations)
        asked.append(next(name for name, one in implementations.items() if one is chosen))
        return chosen

    for module in ("gram", "combine", "pcgrad"):
        monkeypatch.setattr(sys.modules[f"fastmtl.ops.gradients.{module}"], "choose", spy)
    with fastmtl.use_backend("reference"):
        call()
    assert asked and set(asked) == {"reference"}
    asked.clear()
    with BaseTorchFunctionMode():  # which must see every op: nothing goes past it
        call()
    assert set(asked) == {"reference" if dispatch.unavailable("cpu", "cpu") else "cpu"}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_never_falls_back(name: str, call: object) -> None:
    with (
        fastmtl.use_backend(name),
        pytest.raises(RuntimeError, match=rf"fastmtl\.\w+: backend '{name}' is forced but cannot serve this call: \w+"),
    ):
        call()


NOTHING: list[list[None]] = [[None, None], [None, None]]
OF_NOTHING = {
    "gram": lambda state: gram(NOTHING).tolist() == [[0, 0], [0, 0]],
    "combine": lambda state: combine(torch.ones(2), NOTHING) == [None, None],
    "pcgrad": lambda state: pcgrad(NOTHING, generator=state) == [None, None],
    "pcgrad_project": lambda state: pcgrad_project(NOTHING, generator=state) == NOTHING,
    "graddrop": lambda state: ops.graddrop(NOTHING, generator=state) == [None, None],
    "trimmed_mean": lambda state: ops.trimmed_mean(NOTHING, 0) == [None, None],
    "average_gradients": lambda state: (
        ops.average_gradients(NOTHING, NOTHING, torch.ones(2), torch.ones(2), gram=True).tolist() == [[0, 0], [0, 0]]
    ),
    "excess_risks": lambda state: ops.excess_risks(NOTHING, NOTHING, torch.ones(2)).tolist() == [0, 0],
}


@pytest.mark.parametrize("call", OF_NOTHING.values(), ids=OF_NOTHING)
@pytest.mark.parametrize("name", [None, *dispatch.BACKENDS])
def test_without_a_gradient_any_backend_serves(name: str | None, call: Callable[[Tensor], bool]) -> None:
    """There is no tensor that could lie on the wrong device; the draws of that step are used up all the same."""
    state = ops.order_state(3)
    with nullcontext() if name is None else fastmtl.use_backend(name):
        assert call(state)
    assert int(state[1]) == (1 if call in (OF_NOTHING[k] for k in ("pcgrad", "pcgrad_project", "graddrop")) else 0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_forced_cpu_without_extension(call: object, no_extension: None) -> None:
    with (
        fastmtl.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' is forced .*no compiled extension \(ImportError: hidden by a test\)"),
    ):
        call()


def test_reasons(no_extension: None) -> None:
    assert dispatch.unavailable("reference", "cpu") is None
    assert dispatch.unavailable("reference", "mps") is None
    for name in ("cpu", "cuda"):
        assert "hidden by a test" in dispatch.unavailable(name, name)
    assert dispatch.build_info() == {}


@pytest.fixture
def fresh_import_of_triton() -> Iterator[None]:
    dispatch._triton_import_error.cache_clear()
    yield
    dispatch._triton_import_error.cache_clear()


def test_reasons_of_triton(monkeypatch: pytest.MonkeyPatch, fresh_import_of_triton: None) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for device in ("cuda", "cpu"):
        assert "Triton cannot be imported (" in (dispatch.unavailable("triton", device) or "")


def test_triton_takes_cuda_tensors_and_cpu_ones_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.unavailable("triton", "cuda") is None
    assert dispatch.unavailable("triton", "cpu") == (
        "the triton backend takes cuda tensors, got tensors on 'cpu' "
        "(on the CPU only in its interpreter: TRITON_INTERPRET=1)"
    )
    assert dispatch.unavailable("triton", "mps") == "the triton backend takes cuda tensors, got tensors on 'mps'"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.unavailable("triton", "cpu") is None
    assert dispatch.unavailable("triton", "mps")


def test_cuda_prefers_what_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton where an op has nothing compiled for CUDA; the reference where the arguments are declined."""
    monkeypatch.setattr(dispatch, "unavailable", lambda backend, device: None)
    table = {name: (lambda name=name: name) for name in ("cpu", "triton", "reference")}
    assert dispatch.choose("op", "cuda", table)() == "triton"
    assert dispatch.choose("op", "cuda", {**table, "cuda": lambda: "cuda"})() == "cuda"
    assert dispatch.choose("op", "cuda", table, {"triton": "no float64"})() == "reference"
    with (
        fastmtl.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"fastmtl\.op: backend 'triton' is forced .*: no float64"),
    ):
        dispatch.choose("op", "cuda", table, {"triton": "no float64"})


def test_backend_of_another_device() -> None:
    if dispatch.extension is None:
        skip_or_fail(dispatch.unavailable("cpu", "cpu") or "")
    assert "takes cuda tensors, got tensors on 'cpu'" in dispatch.unavailable("cuda", "cpu")
    assert "takes cpu tensors, got tensors on 'cuda'" in dispatch.unavailable("cpu", "cuda")


def test_unforced_uses_the_extension_where_there_is_one() -> None:
    def compiled() -> str:
        return "compiled"

    def plain() -> str:
        return "plain"

    table = {"cpu": compiled, "reference": plain}
    have = dispatch.unavailable("cpu", "cpu") is None
    assert dispatch.choose("op", "cpu", table)() == ("compiled" if have else "plain")
    assert dispatch.choose("op", "mps", table)() == "plain"
    assert dispatch.choose("op", "cpu", {"reference": plain})() == "plain"


def test_levels_of_the_extension() -> None:
    extension = dispatch.extension
    if extension is None:
        skip_or_fail(dispatch.unavailable("cpu", "cpu") or "")
    info = dispatch.build_info()
    assert {"cpu_levels", "cuda_architectures", "compiler", "torch_target"} <= info.keys()
    available, before = list(extension.available_cpu_levels()), extension.cpu_level()
    assert "portable" in available and set(available) <= set(info["cpu_levels"])
    assert before in available
    try:
        for level in available:
            extension.set_cpu_level(level)
            assert extension.cpu_level() == level
        for wrong in ("sse9", "", *(set(info["cpu_levels"]) - set(available))):
            with pytest.raises(ValueError, match=wrong or "level"):
                extension.set_cpu_level(wrong)
            assert extension.cpu_level() == available[-1]
    finally:
        extension.set_cpu_level(before)


# --- in a fresh process


def _run(code: str, **environment: str) -> str:
    """stdout of `code`, run with the extension hidden; stderr must stay empty."""
    hide = "import sys; sys.modules['fastmtl._C'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", hide + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr, result.stderr
    return result.stdout


def test_missing_extension_is_said_once() -> None:
    out = _run(
        """
        import warnings
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import fastmtl, torch
            assert not seen, "importing never warns"
            g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], requires_grad=True)
            for _ in range(3):
                fastmtl.ops.gram(g).sum().backward()
                fastmtl.ops.combine(torch.ones(2), g)
                out = fastmtl.ops.pcgrad(g, torch.tensor([[1], [0]]))
        assert out.tolist() == [0.5, 1.5], out
        print(len(seen), seen[0].category.__name__, seen[0].message)
        """,
        FASTMTL_BACKEND="",
    )
    assert out.startswith("1 RuntimeWarning fastmtl runs its plain PyTorch reference: no compiled extension (")
    assert "fastmtl info" in out


def test_environment_in_a_fresh_process() -> None:
    code = """
        import warnings
        warnings.simplefilter("error")
        import fastmtl, torch
        try:
            print(fastmtl.ops.gram(torch.ones(1, 2)).item())
        except RuntimeError as error:
            print(error)
        """
    # asked for, so nothing to warn of
    assert _run(code, FASTMTL_BACKEND="reference").strip() == "2.0"
    assert "backend 'cpu' is forced but cannot serve this call: no compiled extension" in _run(
        code, FASTMTL_BACKEND="cpu"
    )


@pytest.mark.parametrize(
    ("driver", "capability", "architectures", "why"),
    [
        (12_030, (9, 0), [80, 90], None),
        (13_000, (10, 0), [80, 90], None),
        (12_020, (9, 0), [80, 90], "a driver before 12.3, got 12.2"),
        (13_000, (8, 0), [80, 90], "the device has sm_80"),
        (13_000, (9, 0), [80], r"the build has \[80\]"),
        (13_000, (9, 0), [80, 100], r"the build has \[80, 100\]"),
    ],
)
def test_when_launches_are_never_early(
    driver: int, capability: tuple[int, int], architectures: list[int], why: str | None
) -> None:
    """As a GPU test decides whether to skip; the figures are those of `launches_early`."""
    found = cases_cuda.never_early(driver, capability, architectures)
    assert found is None if why is None else re.search(why, found)
    source = (ROOT / "csrc" / "cuda" / "runtime.cu").read_text()
    assert "driver_version() < 12030" in source and "ptxVersion >= 90" in source
