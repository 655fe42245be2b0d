"""Which backend makes a layer by task on a card: tables as files, models, the order in which backends are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmtl
from fastmtl.benchmarks.tuning import cli
from fastmtl.benchmarks.tuning import gpu as measuring
from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights
from fastmtl.ops.task_weights import choice
from fastmtl.tuning import gpu
from fastmtl.tuning.gpu import BACKENDS, DTYPES, KINDS, MODELS, PRODUCTS, GpuTable
from fastmtl.tuning.table import Shape, TableError

CARD = "NVIDIA Test 80GB"


def fastest(entries: Any) -> dict[str, dict[str, Any]]:
    return {product: {name: dict(entries) for name in gpu.KEYS} for product in PRODUCTS}


def table() -> GpuTable:
    """Large filters by CUDA C++, small ones by Triton."""
    entries = {Shape(576, 64): ("triton", "torch", "cuda"), Shape(4608, 512): ("cuda",)}
    return GpuTable(CARD, "measured", fastest(entries), {"date": "?"})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return gpu.cache_path(CARD)


def test_a_file_is_read_as_it_was_written(cache: Path) -> None:
    cli.write_whole(table().to_json(), cache)
    assert cache.name == "tuned-gpu-nvidia-test-80gb.json" and list(cache.parent.iterdir()) == [cache]
    found, refused = gpu.find(CARD, 90)
    assert refused is None and found == table()
    assert found.nearest("forward", "filter", "float32", Shape(600, 70))[0] == "triton"
    # what the fastest declines goes to the next, and to what was not measured last
    assert found.order("forward", "filter", "bfloat16", Shape(600, 70)) == ("triton", "torch", "cuda")
    assert found.order("backward", "filter", "bfloat16", Shape(4000, 500)) == ("cuda", "triton", "torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 1}, "no table of a GPU of schema 2"),
        ({"source": "model"}, "was not measured"),
        ({"card": "another"}, "of another card: 'another'"),
        *(({"fastest": entry}, "no entries of forward, pixelwise float32") for entry in ({}, [1], "x", {"forward": 3})),
        ({"fastest": fastest({"0x64": ["cuda"]})}, "the shape of a weight, such as 256x768, got '0x64'"),
        *(
            ({"fastest": fastest({"9x64": names})}, f"a list of cuda, triton, torch, got {names!r}")
            for names in (["cpu"], "cuda", [], ["cuda", "cuda"], [["cuda"]])
        ),
    ],
)
def test_a_file_that_is_refused(change: dict[str, Any], message: str, cache: Path) -> None:
    """Then it is the model of its architecture."""
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({**json.loads(table().to_json()), **change}))
    found, refused = gpu.find(CARD, 90)
    assert found is MODELS[90] and message in (refused or "")


def test_a_damaged_file() -> None:
    with pytest.raises(TableError, match="it is damaged"):
        gpu.parse("{")


@pytest.mark.parametrize(
    ("capability", "card"), [(75, "sm_80"), (80, "sm_80"), (89, "sm_80"), (90, "sm_90"), (120, "sm_90")]
)
def test_models(capability: int, card: str, cache: Path) -> None:
    """Kernels that have not run on a card come last whatever a model says of them."""
    found, refused = gpu.find(CARD, capability)
    assert (found.card, found.source, refused) == (card, "model", None)
    for product in PRODUCTS:
        for kind in KINDS:
            for dtype in DTYPES:
                order = found.order(product, kind, dtype, Shape(576, 64))
                assert sorted(order) == sorted(BACKENDS) and order[0] in gpu.HAVE_RUN


def test_order_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """By kind of layer, and whether all samples see one weight."""
    x = torch.empty(3, 4, 5, 5)
    first = dict(zip(KINDS, ("cuda", "triton", "torch", "cuda"), strict=True))
    entries = {gpu.key(kind, dtype): {Shape(1, 1): (one,)} for kind, one in first.items() for dtype in DTYPES}
    monkeypatch.setattr(gpu, "current", lambda device: GpuTable(CARD, "measured", dict.fromkeys(PRODUCTS, entries)))
    gpu._order.cache_clear()
    for shape, one_weight, kind in (
        ((6, 4), False, "pixelwise"),
        ((6, 4, 1, 1), True, "pixelwise of one weight"),
        ((6, 4, 3, 3), False, "filter"),
        ((0, 0, 3, 3), True, "filter of one weight"),
    ):
        found = gpu.order("forward", x, shape, one_weight)
        assert found[0] == first[kind] and sorted(found) == sorted(BACKENDS)
    gpu._order.cache_clear()


def test_what_tune_measures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All groups and shapes, on tensors of the CPU with launchers and clock of its own."""
    import importlib

    took = {
        "cuda": {"forward": 1.0, "backward": 3.0, "weight_grad": 1.0},
        "triton": dict.fromkeys(PRODUCTS, 2.0),
        "torch": dict.fromkeys(PRODUCTS, 0.5),
    }
    called: list[tuple[str, str]] = []
    for layer in ("task_linear", "task_conv2d"):
        op = importlib.import_module(f"fastmtl.ops.task_weights.{layer}")
        for product, name in zip(PRODUCTS, ("_FORWARD", "_BACKWARD", "_WEIGHT_GRAD"), strict=True):
            for backend in BACKENDS:
                plain = getattr(op, name)["reference"]

                def run(*args: Any, at: tuple[str, str] = (backend, product), plain: Any = plain) -> Any:
                    called.append(at)
                    return plain(*args)

                monkeypatch.setitem(getattr(op, name), backend, run)

    def timer(call: Any, calls: int) -> Any:
        call()  # as it will be made on a card
        backend, product = called[-1]
        return lambda: took[backend][product]

    sizes = measuring.Sizes(matrices=((8, 16),), filters=((3, 5),), samples=4, rows=2, side=3, tasks=2)
    found = measuring.measured(CARD, torch.device("cpu"), {}, sizes, timer, lambda part: None)
    # torch in bfloat16 alone, linear layers and where all see one weight; once to be checked, once as it is measured
    assert len(called) == 2 * len(PRODUCTS) * (2 * len(KINDS) * len(DTYPES) + 3)
    assert found.nearest("forward", "filter", "bfloat16", Shape(1, 1)) == ("cuda", "triton")
    assert found.nearest("backward", "pixelwise", "float32", Shape(1, 1)) == ("triton", "cuda")
    for kind in ("pixelwise", "pixelwise of one weight", "filter of one weight"):
        assert found.nearest("forward", kind, "bfloat16", Shape(1, 1)) == ("torch", "cuda", "triton")
        assert found.nearest("forward", kind, "float32", Shape(1, 1)) == ("cuda", "triton")
    assert set(found.fastest["forward"]["filter float32"]) == {Shape(27, 5)}
    assert gpu.parse(found.to_json()) == found


def test_nothing_wrong_is_timed() -> None:
    x = torch.tensor([1.0, -2.0])
    calls = {"cuda": lambda: [x, x], "triton": lambda: [x, x + 0.001]}
    with pytest.raises(ValueError, match=r"forward: cuda and triton differ by 0\.001, of results up to 2"):
        measuring.check("forward", calls, torch.float32)
    measuring.check("forward", calls, torch.bfloat16)
    with pytest.raises(ValueError, match="differ by nan"):
        measuring.check("forward", {"cuda": lambda: [x], "triton": lambda: [x * torch.nan]}, torch.bfloat16)


def test_kernels_that_have_run_on_no_card_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where nothing else is left; only where they are asked for, or were measured on this card."""
    x, order, offsets = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3])
    call = TaskConvCall(TaskWeights(torch.randn(6, 4), [], [], None), SortedBatch(order, offsets), Geometry(), None)
    monkeypatch.setattr(choice, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(choice.cuda, "declines", lambda *a: None)
    assert "have not run on a card" in str(choice.of_layer("forward", x, call).unsupported["cuda"])
    narrow = choice.of_layer("forward", x.bfloat16(), call)
    assert "has not run on a card" in str(narrow.unsupported["torch"]) and narrow.order[0] == "triton"
    with fastmtl.use_backend("cuda"):
        assert choice.of_layer("forward", x, call).unsupported["cuda"] is None
    measured = gpu.MODELS[80]._replace(source="measured")
    monkeypatch.setattr(gpu, "current", lambda device: measured)
    gpu._order.cache_clear()
    found = choice.of_layer("forward", x, call)
    gpu._order.cache_clear()
    assert found.unsupported["cuda"] is None and found.order == ("cuda", "triton", "torch")
