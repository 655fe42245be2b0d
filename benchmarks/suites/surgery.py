"""Suite `surgery`: the ops on task gradients, as one bank and as lists, over T, P and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmtl
from fastmtl import ops
from fastmtl.benchmarks.baselines import peers
from fastmtl.benchmarks.baselines import surgery as baselines
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.workloads.gradients import (
    Inputs,
    check_combined,
    check_gram,
    oracle_gram,
    random_bank,
    resnet18_shapes,
    resnet50_shapes,
    transformer_shapes,
)
from fastmtl.core import dispatch
from fastmtl.ops.gradients import reference

TASKS = (2, 4, 8, 16, 32, 64)
SIZES = (100_000, 1_000_000, 11_000_000, 25_000_000)
DTYPES = (torch.float32, torch.bfloat16)
# a bank larger than this is left out: baselines hold a copy of it, and the machine has other work
MOST_BYTES = 3 << 30

GPU_SIZES = (100_000, 1_000_000, 25_600_000, 100_000_000, 1_000_000_000)
# multi-task reinforcement learning: many tasks, small networks
RL = ((50, 100_000), (50, 1_000_000))
# up to this size what is launched matters, not what is moved
SMALL = 1_000_000
# of the device's memory, for a bank; where there is no device to ask, an H200's
GPU_SHARE, GPU_BYTES = 0.85, 141_000_000_000
# compiling unrolls the T steps of the T x T problem
MOST_COMPILED_TASKS = 16


def _norm_weights(gram: Tensor) -> Tensor:
    """The simplest method there is: every gradient at unit length."""
    return gram.diagonal().rsqrt()


def _coefficients(inputs: Inputs) -> Tensor:
    return reference.pcgrad_coefficients(oracle_gram(inputs.grads), inputs.order)


# --- the cases


@dataclass(frozen=True)
class _Op:
    """An op that reads gradients: its call, its baselines, its bytes in units of P b, its oracle's weights."""

    covers: tuple[str, ...]
    ours: Callable[[Inputs], Any]
    naive: Callable[[list[Tensor], Inputs], Any]  # takes the flat rows
    naive_passes: Callable[[int], float]
    plain: Callable[[Tensor, Inputs], Any]  # takes the matrix
    blocked: Callable[[Tensor, Inputs], Any] | None  # faster than `plain` on a CPU
    stays: Callable[[Tensor, Inputs], Any] | None  # the same without waiting for the host
    moved: Callable[[int], int]
    two_reads: bool
    flops: Callable[[int], int]  # per column
    weights: Callable[[Inputs], Tensor] | None  # None: the result is the Gram matrix


def _pairs(t: int) -> int:
    return t * (t + 1)


OPS: dict[str, _Op] = {
    "gram": _Op(
        covers=("gram",),
        ours=lambda x: ops.gram(x.grads),
        naive=lambda rows, x: baselines.naive_gram(rows),
        naive_passes=lambda t: 2 * t * t,
        plain=lambda g, x: g @ g.T,
        blocked=lambda g, x: baselines.blocked_gram(g),
        stays=lambda g, x: baselines.blocked_gram(g),
        moved=lambda t: t,
        two_reads=False,
        flops=_pairs,
        weights=None,
    ),
    "combine": _Op(
        covers=("combine",),
        ours=lambda x: ops.combine(x.weights, x.grads, out=x.out),
        naive=lambda rows, x: baselines.naive_combine(x.weights, rows),
        naive_passes=lambda t: 5 * t,
        plain=lambda g, x: baselines.plain_combine(x.weights, g, x.out),
        blocked=lambda g, x: baselines.axpy_combine(x.weights, g, x.out),
        stays=None,
        moved=lambda t: t + 1,
        two_reads=False,
        flops=lambda t: 2 * t,
        weights=lambda x: x.weights,
    ),
    "gram+combine": _Op(
        covers=("gram", "combine"),
        ours=lambda x: ops.combine(_norm_weights(ops.gram(x.grads)), x.grads, out=x.out),
        naive=lambda rows, x: baselines.naive_combine(_norm_weights(baselines.naive_gram(rows)), rows),
        naive_passes=lambda t: 2 * t * t + 5 * t,
        plain=lambda g, x: baselines.plain_combine(_norm_weights(g @ g.T), g, x.out),
        blocked=lambda g, x: baselines.axpy_combine(_norm_weights(baselines.blocked_gram(g)), g, x.out),
        stays=lambda g, x: baselines.plain_combine(_norm_weights(baselines.blocked_gram(g)), g, x.out),
        moved=lambda t: 2 * t + 1,
        two_reads=True,
        flops=lambda t: _pairs(t) + 2 * t,
        weights=lambda x: _norm_weights(oracle_gram(x.grads)),
    ),
    "pcgrad": _Op(
        covers=("pcgrad",),
        ours=lambda x: ops.pcgrad(x.grads, x.order, out=x.out),
        naive=lambda rows, x: baselines.naive_pcgrad(rows, x.order),
        naive_passes=lambda t: t * t * 5.5,
        plain=lambda g, x: baselines.plain_pcgrad(g, x.order, x.out),
        blocked=lambda g, x: baselines.blocked_pcgrad(g, x.order, x.out),
        stays=lambda g, x: baselines.blocked_pcgrad(g, x.order, x.out, combine=baselines.plain_combine),
        moved=lambda t: 2 * t + 1,
        two_reads=True,
        flops=lambda t: _pairs(t) + 2 * t,
        weights=lambda x: _coefficients(x).sum(0),
    ),
    "pcgrad_project": _Op(
        covers=("pcgrad_project",),
        ours=lambda x: ops.pcgrad_project(x.grads, x.order),
        naive=lambda rows, x: torch.stack(baselines.naive_project(rows, x.order)),
        naive_passes=lambda t: t * t * 5.5,
        plain=lambda g, x: baselines.plain_project(g, x.order),
        blocked=None,
        stays=None,
        moved=lambda t: 3 * t,
        two_reads=False,
        flops=lambda t: _pairs(t) + 2 * t * t,
        weights=_coefficients,
    ),
}


def _jacobians_to_grads(x: Inputs, gramian: bool) -> Any:
    return peers.jacobians_to_grads(x.params, gramian=gramian)


def _candidates(op: str, num_tasks: int, row_bytes: int, lists: bool) -> tuple[Candidate, ...]:
    it = OPS[op]
    naive_traffic = int(it.naive_passes(num_tasks) * row_bytes)
    found = [
        Candidate("ours", it.ours, f"fastmtl.ops: {op}", "ours", traffic=it.moved(num_tasks) * row_bytes, graph=True),
        Candidate(
            "naive",
            lambda x: it.naive(x.rows, x),
            "flat copies and a Python loop over pairs of tasks",
            traffic=naive_traffic,
        ),
        Candidate("plain", lambda x: it.plain(x.matrix, x.flat), "`G @ G.T`, T x T problem, `w @ G`", graph=True),
    ]
    blocked = it.blocked
    if blocked is not None:
        detail = "batched product over blocks of columns, T passes of `add_`"
        found.append(Candidate("plain_blocked", lambda x: blocked(x.matrix, x.flat), detail))
    found += _peers(op, lists)
    if lists:
        on_bank = Candidate("bank", lambda x: it.ours(x.on_bank), "ours on one bank", "yardstick", graph=True)
        found.append(on_bank)
    if op not in ("gram", "pcgrad_project"):
        detail = "ours, into new memory"
        found.append(Candidate("fresh", lambda x: it.ours(replace(x, out=None)), detail, "yardstick", graph=True))
    return tuple(found)


def _peers(op: str, lists: bool) -> list[Candidate]:
    if op != "pcgrad":
        return []
    if not lists:
        return [peers.candidate("torchjd", lambda x: peers.aggregate(x.matrix), "PCGrad aggregator on the bank")]
    return [
        peers.candidate(
            label,
            partial(_jacobians_to_grads, gramian=gramian),
            f"jac_to_grad, PCGrad, optimize_gramian_computation={gramian}",
        )
        for label, gramian in (("torchjd", False), ("torchjd_gramian", True))
    ]


def _by(backend: str, call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    def run(inputs: Inputs) -> Any:
        with fastmtl.use_backend(backend):
            return call(inputs)

    return run


def on_gpu(case: Case, *, tuned: bool = False) -> Case:
    """A case of `bank_case` or `list_case` with what else a GPU has: Triton, torch.compile, a given order.

    Args:
        tuned: with torch.compile's search for the best kernels too, which takes a minute and more.
    """
    it = OPS[case.op]
    num_tasks, num_params = case.params["T"], case.params["P"]
    stays = it.stays
    found = [x for x in case.candidates if x.label != "plain_blocked"]
    # products of 16-bit types are not blocked: their sums would be rounded to 16 bits once per block
    if stays is not None and case.params["dtype"] == "float32":
        detail = "batched product over blocks of columns"
        found.insert(3, Candidate("plain_blocked", lambda x: stays(x.matrix, x.flat), detail, graph=True))
    if case.params["layout"] == "bank":
        solved = case.op.startswith("pcgrad")
        slow = solved and num_tasks > MOST_COMPILED_TASKS
        reason = f"compiling {num_tasks} unrolled steps takes minutes" if slow else None
        for label, mode in (("plain_compiled", "default"), ("plain_autotuned", "max-autotune-no-cudagraphs")):
            if mode == "default" or tuned:
                compiled = baselines.Compiled(lambda g, x: it.plain(g, replace(x, out=None)), mode)
                call = partial(_on_matrix, compiled)
                detail = f"torch.compile of `plain`, mode {mode}"
                found.append(Candidate(label, call, detail, graph=True, unavailable=reason, builds=True))
    missing = dispatch.unavailable("triton", "cuda")
    triton = _by("triton", it.ours)
    detail = "ours, by Triton"
    found.append(Candidate("triton", triton, detail, "yardstick", graph=True, unavailable=missing, builds=True))
    if case.op == "pcgrad" and num_params <= SMALL:
        detail = "ours, with a given order instead of a drawn one"
        given = Candidate("given", lambda x: it.ours(replace(x, order=x.given)), detail, "yardstick", graph=True)
        found.append(given)
    backend = "triton" if dispatch.unavailable("cuda", "cuda") else "cuda"
    return replace(case, params={**case.params, "backend": backend}, candidates=tuple(found))


def _on_matrix(call: Callable[[Tensor, Inputs], Any], inputs: Inputs) -> Any:
    return call(inputs.matrix, inputs.flat)


def _check(op: str, dtype: torch.dtype) -> Callable[[Inputs, Callable[[Inputs], Any]], Check]:
    def check(inputs: Inputs, ours: Callable[[Inputs], Any]) -> Check:
        num_tasks = inputs.weights.shape[0]
        generator = torch.Generator().manual_seed(1)
        order = ops.random_order(num_tasks, generator=generator).to(inputs.weights.device)
        inputs = replace(inputs, order=order)
        result = ours(inputs)
        weights = OPS[op].weights
        if weights is None:
            return check_gram(result, inputs)
        return check_combined(result, weights(inputs), inputs, dtype)

    return check


def _size(num_params: int) -> str:
    return f"{num_params / 1e6:g}M" if num_params >= 1_000_000 else f"{num_params / 1e3:g}k"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bank_case(
    op: str, num_tasks: int, num_params: int, dtype: torch.dtype = torch.float32, *, quick: bool = False
) -> Case:
    """A case of `op` (a key of `OPS`) on a `[T, P]` bank."""
    row_bytes = num_params * dtype.itemsize
    seeds = itertools.count()

    def make(device: torch.device) -> Inputs:
        seed = next(seeds)
        weights = torch.rand(num_tasks, generator=torch.Generator().manual_seed(seed)).to(device)
        out = torch.ones(num_params, dtype=dtype, device=device) if it.two_reads or op == "combine" else None
        given = ops.random_order(num_tasks, generator=torch.Generator().manual_seed(seed)).to(device)
        return Inputs(random_bank(num_tasks, num_params, dtype, device, seed), weights, out=out, given=given)

    it = OPS[op]
    moved = {"floor": it.moved(num_tasks) * row_bytes}
    if it.two_reads:
        moved["two_reads"] = 2 * num_tasks * row_bytes
    return Case(
        suite="surgery",
        name=f"{op} T={num_tasks} P={_size(num_params)} {_dtype(dtype)}",
        op=op,
        covers=frozenset(it.covers),
        params={"T": num_tasks, "P": num_params, "dtype": _dtype(dtype), "layout": "bank"},
        make=make,
        candidates=_candidates(op, num_tasks, row_bytes, lists=False),
        check=_check(op, dtype),
        input_bytes=num_tasks * row_bytes,
        moved=moved,
        flops=it.flops(num_tasks) * num_params,
        quick=quick,
    )


def list_case(
    op: str,
    num_tasks: int,
    shapes: Sequence[tuple[int, ...]],
    network: str,
    dtype: torch.dtype = torch.float32,
    *,
    quick: bool = False,
) -> Case:
    """A case of `op` on T lists of separate tensors, as autograd makes them; the bank of the same size beside it."""
    num_params = sum(torch.Size(shape).numel() for shape in shapes)
    bank = bank_case(op, num_tasks, num_params, dtype)

    def make(device: torch.device) -> Inputs:
        inputs = bank.make(device)
        like = [torch.empty(shape, device="meta") for shape in shapes]
        grads = [[x.clone() for x in baselines.unflatten(row, like)] for row in inputs.grads.unbind(0)]
        params = peers.jacobian_params(grads) if op == "pcgrad" and peers.torchjd_missing() is None else ()
        out = None if inputs.out is None else [torch.ones_like(x) for x in grads[0]]
        return replace(inputs, grads=grads, bank=inputs.grads, params=params, out=out, flat_out=inputs.out)

    return replace(
        bank,
        name=f"{op} T={num_tasks} {network} lists {_dtype(dtype)}",
        covers=frozenset(f"{name}_list" for name in bank.covers),
        params={**bank.params, "layout": "list", "tensors": len(shapes), "network": network},
        make=make,
        candidates=_candidates(op, num_tasks, num_params * dtype.itemsize, lists=True),
        quick=quick,
    )


def coefficients_case(num_tasks: int, *, quick: bool = False, triton: bool = False) -> Case:
    """The T x T problem alone: latency, not bytes, so it has no floor. `triton`: by Triton too, on a GPU."""

    def make(device: torch.device) -> Inputs:
        bank = random_bank(num_tasks, 1000, torch.float32, device, seed=num_tasks)
        order = ops.random_order(num_tasks, generator=torch.Generator().manual_seed(0)).to(device)
        return Inputs(bank @ bank.T, torch.ones(num_tasks, device=device), order)

    def check(inputs: Inputs, ours: Callable[[Inputs], Any]) -> Check:
        expected = reference.pcgrad_coefficients(inputs.grads, inputs.order)
        error = (ours(inputs) - expected).abs().max() / expected.abs().max()
        return Check(float(error), 1e-9, "float64 oracle on the timed inputs")

    def naive(x: Inputs) -> Tensor:
        c = torch.eye(num_tasks, device=x.grads.device)
        for i, visits in enumerate(x.order.tolist()):
            for j in visits:
                dot = c[i] @ x.grads[:, j]
                if j != i and dot < 0:
                    c[i, j] -= dot / x.grads[j, j]
        return c

    def ours(x: Inputs) -> Tensor:
        return ops.pcgrad_coefficients(x.grads, x.order)

    missing = dispatch.unavailable("triton", "cuda")
    by_triton = Candidate(
        "triton", _by("triton", ours), "ours, by Triton", "yardstick", graph=True, unavailable=missing, builds=True
    )
    return Case(
        suite="surgery",
        name=f"pcgrad_coefficients T={num_tasks}",
        op="pcgrad_coefficients",
        covers=frozenset({"pcgrad_coefficients"}),
        params={"T": num_tasks, "dtype": "float64"},
        make=make,
        candidates=(
            Candidate("ours", ours, "fastmtl.ops", "ours", graph=True),
            Candidate("naive", naive, "a Python loop over pairs of tasks"),
            Candidate("plain", lambda x: baselines.solve(x.grads, x.order), "all rows at once", graph=True),
            peers.candidate("torchjd", lambda x: peers.coefficients(x.grads), "PCGradWeighting"),
            *([by_triton] if triton else []),
        ),
        check=check,
        quick=quick,
    )


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The suite; `quick`: a telling few. On a GPU larger banks, and more candidates."""
    found = _cuda_cases(device) if device.type == "cuda" else _cpu_cases()
    return [case for case in found if case.quick or not quick]


def _cpu_cases() -> list[Case]:
    million, f32, bf16 = 1_000_000, torch.float32, torch.bfloat16
    telling = {("gram", 8, 11 * million, f32), ("combine", 8, 11 * million, f32), ("pcgrad_project", 8, million, f32)}
    telling |= {("gram+combine", 8, 11 * million, dtype) for dtype in DTYPES}
    telling |= {("pcgrad", t, million, f32) for t in TASKS}
    telling |= {("pcgrad", t, 11 * million, f32) for t in (2, 8)} | {("pcgrad", 8, 11 * million, bf16)}
    grid = [("pcgrad", t, p, f32) for p in SIZES for t in TASKS]
    grid += [("gram+combine", t, p, f32) for p in SIZES[1:] for t in TASKS]
    grid += [(op, t, 11 * million, bf16) for op in ("pcgrad", "gram+combine") for t in TASKS]
    grid += [(op, t, p, f32) for op in ("gram", "combine", "pcgrad_project") for p in SIZES[1:3] for t in (2, 8, 32)]
    found = [
        bank_case(op, t, p, dtype, quick=(op, t, p, dtype) in telling)
        for op, t, p, dtype in grid
        if t * p * 4 <= MOST_BYTES and not (op == "pcgrad_project" and t * p > 16 * 11 * million)
    ]
    shapes = resnet18_shapes()
    found += [
        list_case("pcgrad", t, shapes, "ResNet-18", dtype, quick=(t, dtype) == (8, f32))
        for dtype in DTYPES
        for t in (2, 8, 16)
    ]
    found += [list_case(op, 8, shapes, "ResNet-18") for op in ("gram+combine", "pcgrad_project")]
    return [*found, *(coefficients_case(t, quick=True) for t in (8, 64))]


def _largest_bank(device: torch.device) -> float:
    there = torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else GPU_BYTES
    return GPU_SHARE * there


def _cuda_cases(device: torch.device) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    small, million, resnet50, billion = 100_000, 1_000_000, 25_600_000, 1_000_000_000
    # the rows that have a target, and some beside them
    telling = {("pcgrad", 8, p, f32) for p in (small, million, resnet50)}
    telling |= {("pcgrad", 8, resnet50, bf16), ("pcgrad", 4, billion, bf16), ("pcgrad", 50, small, f32)}
    telling |= {("pcgrad", 50, million, f32), ("pcgrad", 64, resnet50, f32), ("pcgrad", 64, resnet50, bf16)}
    telling |= {("gram+combine", t, resnet50, f32) for t in (2, 8)} | {("gram+combine", 8, resnet50, bf16)}
    telling |= {(op, 8, resnet50, f32) for op in ("gram", "combine", "pcgrad_project")}
    grid = [(op, t, p, d) for op in ("pcgrad", "gram+combine") for p in GPU_SIZES for t in TASKS for d in DTYPES]
    grid += [("pcgrad", t, p, f32) for t, p in RL]
    grid += [(op, t, resnet50, d) for op in ("gram", "combine", "pcgrad_project") for t in (2, 8, 32) for d in DTYPES]
    grid += [("pcgrad", t, resnet50, f32) for t in (12, 128)]
    most = _largest_bank(device)
    tuned = {("gram+combine", 8, resnet50, d) for d in DTYPES}
    found = [
        on_gpu(bank_case(*spec, quick=spec in telling), tuned=spec in tuned)
        for spec in grid
        # C G writes a second bank
        if spec[1] * spec[2] * spec[3].itemsize * (2 if spec[0] == "pcgrad_project" else 1) <= most
    ]
    shapes, name = resnet50_shapes(), "ResNet-50"
    found += [
        on_gpu(list_case("pcgrad", t, shapes, name, d, quick=(t, d) == (8, f32))) for d in DTYPES for t in (2, 8, 32)
    ]
    found += [on_gpu(list_case(op, 8, shapes, name)) for op in ("gram+combine", "pcgrad_project")]
    # lists and the bank beside them
    shapes, name = transformer_shapes(), "1.2B transformer"
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes) * bf16.itemsize
    found += [on_gpu(list_case("pcgrad", t, shapes, name, bf16, quick=t == 4)) for t in (2, 4, 8) if t * size <= most]
    return [*found, *(coefficients_case(t, quick=True, triton=True) for t in (8, 64))]
