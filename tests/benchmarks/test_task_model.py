"""The model of the task convolution's main loops, and the time of the host: tables that stand in the docs."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastmtl.benchmarks.gpu import host_time
from fastmtl.benchmarks.machine_code import task_model
from fastmtl.benchmarks.machine_code.cubin import Instruction, Loop
from fastmtl.benchmarks.machine_code.task_model import CARDS, Step
from fastmtl.core import dispatch
from fastmtl.tuning.gpu import MODELS
from fastmtl.tuning.table import Shape

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    dispatch.extension is None or not any(map(shutil.which, ("c++", "g++", "clang++"))) or dispatch.interpreting(),
    reason="no extension, no C++ compiler, or TRITON_INTERPRET=1",
)


def test_the_table_of_the_docs() -> None:
    """Which tile each layer takes is the code's; the loops are as last compiled."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # of tensors that nobody touches
    text = task_model.DOCS.read_text()
    found = text.split(task_model.BEGIN)[1].split(task_model.END)[0]
    assert found.split("\n") == ["", "", *task_model.table(), "", ""]


def test_the_model_that_chooses() -> None:
    """On sm_80 it has what takes less of the time of all layers together."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    for product, took in task_model.seconds(CARDS[0]).items():
        least = min(took, key=lambda backend: took[backend])
        assert MODELS[80].nearest(product, "filter", "bfloat16", Shape(576, 64)) == (least,), (product, took)
        assert MODELS[90].nearest(product, "filter", "bfloat16", Shape(576, 64)) == ("triton",)


def test_what_is_asked_of_3x3_filters() -> None:
    """On an A100 every product of theirs has 0.8 of the matrix units' rate."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    loops, _ = task_model.load()
    for layer in task_model.LAYERS:
        if layer.kernel == 3:
            assert min(task_model.fractions(layer, CARDS[0], loops)) >= 0.8, layer


def test_shares_of_a_step() -> None:
    """How much of a tile is in use, and what other taps of the same pixels have read before."""
    layers = {layer.name: layer for layer in task_model.LAYERS}
    a100, h100 = CARDS
    small, out = layers["layer1, 3x3"], layers["layer1, 1x1 out"]
    assert task_model.in_use(out, "weight gradient", "task_pieces_kernel 0") == 0.5
    assert task_model.in_use(small, "forward", "task_product_kernel 0") == 0.5
    assert task_model.again(small, a100, "task_pieces_kernel 1") == 0
    assert task_model.again(small, h100, "task_pieces_kernel 1") == pytest.approx(0.75 * (96 - 34) / 96)
    assert task_model.again(small, h100, "task_product_kernel 1") == pytest.approx(2 / 3 * (1 - (128 + 2 * 56) / 1152))
    assert task_model.again(out, h100, "task_product_kernel 0") == 0


def instruction(name: str, address: int = 0) -> Instruction:
    return Instruction(address, name, "", False, 1, 7, frozenset())


def test_a_step() -> None:
    """A warp: 4 products of 8 clocks, 4 + 2 + 4 clocks of loads from shared memory, 4 of a copy to it."""
    names = [
        *["HMMA.16816.F32.BF16"] * 4,
        "LDSM.16.M88.4",
        "LDSM.16.MT88.2",
        "LDS.128",
        "LDGSTS.E.BYPASS.128",
        "BAR.SYNC",
    ]
    ops = tuple(map(instruction, names))
    step = task_model.step_of([Loop(ops[4:], ops[4:]), Loop(ops, ops)], warps=8)
    assert step == Step(32, 8 * 14, 8 * 9, 8 * 512, 8)
    a100 = CARDS[0]
    assert step.fraction(a100) == 64 / max(64, 112, 18, 4096 / a100.l2)
    assert Step(256, 10, 10, 10, 4).fraction(a100) == 1


@pytest.mark.parametrize(("position", "launches"), [(0, 7), (1, 8), (2, 7)], ids=["conv", "gates", "linear"])
def test_launches_of_a_layer(position: int, launches: int) -> None:
    """Staging and product; staging and product, pieces, their finish and the sum over chunks of tasks, gates."""
    layer = host_time.layers()[position]
    assert host_time.count_launches(layer, "cuda") == launches


def test_a_row_of_host_time() -> None:
    row = host_time.measure(host_time.layers()[2], "cuda", 0.02)
    assert row.backend == "cuda" and min(row.forward, row.backward, row.launchers) > 0
    assert row.launchers < row.forward + row.backward
