"""Cases of suite `conv` beside the layers: each task's weight gradient, scale and shift, batch norm, a batch's sort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.benchmarks.baselines import conv as baselines
from fastmtl.benchmarks.runner.registry import Candidate, Case, Check
from fastmtl.benchmarks.suites.conv_check import Oracle, error, largest
from fastmtl.benchmarks.suites.conv_shapes import (
    SHORT,
    Batch,
    Direction,
    Layout,
    Spec,
    dtype_name,
    like_layer,
    random_ids,
)
from fastmtl.core.task_weights import SortedBatch
from fastmtl.ops.task_weights import reference


@dataclass
class Graded:
    """A batch and memory for each task's weight gradient, or None."""

    batch: Batch
    out: Tensor | None


def weight_grad_case(spec: Spec, *, out: bool) -> Case:
    """Each task's gradient of a shared weight; `out`: into rows of a bank that is wider than the layer."""
    layer = spec.layer
    op = "task_linear_weight_grad" if layer.linear else "task_conv2d_weight_grad"
    size = torch.Size(layer.weight_shape).numel()

    def make(device: torch.device) -> Graded:
        bank = torch.ones(spec.num_tasks, size + 4096, dtype=spec.dtype, device=device) if out else None
        rows = None if bank is None else bank[:, 4096:].view(spec.num_tasks, *layer.weight_shape)
        return Graded(spec.make(device), rows)

    def ours(g: Graded) -> Tensor:
        b = g.batch
        if layer.linear:
            return ops.task_linear_weight_grad(b.x, b.grad_out, b.plan, spec.num_tasks, out=g.out)
        geometry = {"stride": layer.stride, "padding": layer.padding}
        return ops.task_conv2d_weight_grad(b.x, b.grad_out, b.plan, spec.num_tasks, layer.kernel, **geometry, out=g.out)

    def check(graded: Graded, call: Callable[[Any], Any]) -> Check:
        b = graded.batch
        oracle = Oracle(b)
        x, g = b.x.double(), oracle.pick(b.grad_out, oracle.outputs)
        if layer.linear:
            expected = reference.task_linear_weight_grad(x, g, oracle.batch)
        else:
            expected = reference.task_conv2d_weight_grad(x, g, oracle.batch, (layer.kernel,) * 2, oracle.geometry)
        got = call(graded)[:, oracle.outputs]
        errors = [error(a, e) for a, e in zip(got, expected, strict=True)]
        return largest(errors, spec.dtype, b.x.device)

    return Case(
        suite="conv",
        name=f"{op}{'_out' if out else ''} {spec.name}".replace(" fwd", ""),
        op=op,
        covers=frozenset({f"{op}_out" if out else op}),
        params=spec.params | {"direction": "weight gradient"},
        make=make,
        candidates=(
            Candidate("ours", ours, f"fastmtl.ops: {op}, plan given", "ours", graph=True),
            Candidate(
                "shared",
                lambda g: baselines.shared_weight_grad(g.batch),
                "one gradient for all",
                "yardstick",
                graph=True,
            ),
            Candidate(
                "loop",
                lambda g: baselines.loop_weight_grad(g.batch, g.out),
                "a call per task, copied into its row",
                graph=True,
            ),
        ),
        check=check,
        input_bytes=spec.samples_bytes + spec.num_tasks * spec.weight_bytes,
        moved={"floor": spec.num_tasks * spec.weight_bytes},
        floor_from="shared",
        quick=spec.quick,
    )


@dataclass
class Patch:
    """Pictures and two tables of channels."""

    x: Tensor
    scale: Tensor
    shift: Tensor
    ids: Tensor
    grad_out: Tensor


def scale_shift_case(
    num_tasks: int, batch: int, channels: int, size: int, dtype: torch.dtype, *, train: bool, quick: bool = False
) -> Case:
    """`task_scale_shift`, on bytes alone."""
    shape = (batch, channels, size, size)
    moved = torch.Size(shape).numel() * dtype.itemsize

    def make(device: torch.device) -> Patch:
        x, g = (like_layer(shape, "channels_last", dtype, device) for _ in range(2))
        scale, shift = (torch.randn(num_tasks, channels, dtype=dtype, device=device) for _ in range(2))
        ids = random_ids(num_tasks, (batch,), sort=False).to(device)
        if train:
            for leaf in (x, scale, shift):
                leaf.requires_grad_()
        return Patch(x, scale, shift, ids, g)

    def timed(function: Callable[..., Tensor]) -> Callable[[Patch], Any]:
        def call(p: Patch) -> Any:
            y = function(p.x, p.scale, p.shift, p.ids)
            return (y, torch.autograd.grad(y, (p.x, p.scale, p.shift), p.grad_out)) if train else y

        return call

    def check(p: Patch, call: Callable[[Any], Any]) -> Check:
        result = call(p)
        y, grads = result if train else (result, ())
        with torch.no_grad():
            x, scale, shift = (v.detach().double() for v in (p.x, p.scale, p.shift))
            errors = [error(y, reference.task_scale_shift(x, scale, shift, p.ids))]
            if train:
                wanted = [True, True, True]
                expected = reference.task_scale_shift_backward(p.grad_out.double(), x, scale, shift, p.ids, wanted)
                errors += [error(a, e) for a, e in zip(grads, expected, strict=True)]
        return largest(errors, dtype, p.x.device, "float64 oracle on the timed inputs")

    direction: Direction = "both" if train else "forward"
    params = {"N": batch, "C": channels, "H": size, "W": size, "T": num_tasks, "B": batch, "dtype": dtype_name(dtype)}
    params |= {"direction": direction, "sorted": False, "layout": "channels_last"}
    return Case(
        suite="conv",
        name=f"task_scale_shift {SHORT[direction]} {list(shape)} T={num_tasks} {dtype_name(dtype)}",
        op="task_scale_shift",
        covers=frozenset({"task_scale_shift"}),
        params=params,
        make=make,
        candidates=(
            Candidate("ours", timed(ops.task_scale_shift), "fastmtl.ops", "ours", graph=True),
            Candidate("plain", timed(baselines.gathered_scale_shift), "gather, `torch.addcmul`", graph=True),
        ),
        check=check,
        input_bytes=moved * (2 if train else 1),
        # forward: x read, y written; backward: x and the gradient read, dx written
        moved={"floor": moved * (5 if train else 2)},
        quick=quick,
    )


@dataclass
class Norm:
    """Pictures, each task's weight and bias and running statistics in lists, and a plan of the batch."""

    x: Tensor
    weight: list[Tensor]
    bias: list[Tensor]
    running: tuple[list[Tensor], list[Tensor]]
    plan: ops.TaskPlan
    rows: list[tuple[int, Tensor | slice]]  # of each present task
    grad_out: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.weight, *self.bias]


def _task_batch_norm(b: Norm, training: bool) -> Tensor:
    return ops.task_batch_norm(b.x, b.plan, b.weight, b.bias, *b.running, training=training)


def batch_norm_case(
    num_tasks: int,
    batch: int,
    channels: int,
    size: int,
    dtype: torch.dtype,
    *,
    direction: Direction,
    layout: Layout = "channels_last",
    sort: bool = False,
    quick: bool = False,
) -> Case:
    """`task_batch_norm`, on bytes alone; `direction` "forward" is eval mode, "both" is training."""
    shape = (batch, channels, size, size)
    moved = torch.Size(shape).numel() * dtype.itemsize
    train = direction != "forward"

    def make(device: torch.device) -> Norm:
        x, g = (like_layer(shape, layout, dtype, device) for _ in range(2))
        weight, bias = ([torch.randn(channels, device=device) for _ in range(num_tasks)] for _ in "wb")
        means = [torch.randn(channels, device=device) for _ in range(num_tasks)]
        variances = [torch.rand(channels, device=device) + 0.5 for _ in range(num_tasks)]
        ids = random_ids(num_tasks, (batch,), sort=sort)
        rows: list[tuple[int, Tensor | slice]] = []
        for t in ids.unique().tolist():
            own = (ids == t).nonzero()[:, 0]
            rows.append((t, slice(int(own[0]), int(own[-1]) + 1) if sort else own.to(device)))
        made = Norm(x, weight, bias, (means, variances), ops.task_plan(ids.to(device), num_tasks), rows, g)
        if train:
            for leaf in made.leaves:
                leaf.requires_grad_()
        return made

    def timed(function: Callable[[Norm, bool], Tensor]) -> Callable[[Norm], Any]:
        def call(b: Norm) -> Any:
            y = function(b, train)
            return (y, torch.autograd.grad(y, b.leaves, b.grad_out, allow_unused=True)) if train else y

        return call

    def check(b: Norm, call: Callable[[Any], Any]) -> Check:
        statistics = [[] if train else [v.double() for v in table] for table in b.running]
        result = call(b)
        y, grads = result if train else (result, ())
        with torch.no_grad():
            x, sorted_batch = b.x.detach().double(), SortedBatch(b.plan.order, b.plan.offsets)
            weight, bias = ([p.detach().double() for p in table] for table in (b.weight, b.bias))
            expected, mean, var = reference.task_batch_norm(x, weight, bias, *statistics, sorted_batch, 1e-5)
            errors = [error(y, expected)]
            if train:
                dx, *tables = reference.task_batch_norm_backward(
                    b.grad_out.double(), x, weight, mean, var, sorted_batch, True, 1e-5, [True] * 3
                )
                wanted = [dx, *tables[0], *tables[1]]
                errors += [error(a, e) for a, e in zip(grads, wanted, strict=True)]
        return largest(errors, dtype, b.x.device, "float64 oracle on the timed inputs")

    params = {"N": batch, "C": channels, "H": size, "W": size, "T": num_tasks, "B": batch, "dtype": dtype_name(dtype)}
    params |= {"direction": direction, "sorted": sort, "layout": layout}
    order = " sorted" if sort else ""
    form = "" if layout == "channels_last" else f" {layout}"
    return Case(
        suite="conv",
        name=f"task_batch_norm {SHORT[direction]} {list(shape)} T={num_tasks} {dtype_name(dtype)}{form}{order}",
        op="task_batch_norm",
        covers=frozenset({"task_batch_norm", "task_batch_norm_update"}),
        params=params,
        make=make,
        candidates=(
            Candidate("ours", timed(_task_batch_norm), "fastmtl.ops, lists and a plan given", "ours", graph=True),
            Candidate("loop", timed(baselines.loop_batch_norm), "`F.batch_norm` of each task's samples", graph=True),
            Candidate("shared", timed(baselines.shared_batch_norm), "one for the whole batch", "yardstick", graph=True),
        ),
        check=check,
        input_bytes=moved * (2 if train else 1),
        # as of scale and shift: what is read twice may lie in a cache
        moved={"floor": moved * (5 if train else 2)},
        quick=quick,
    )


def plan_case(num_tasks: int, shape: tuple[int, ...]) -> Case:
    """The sort of a batch: latency, not bytes, so it has no floor."""

    def check(ids: Tensor, call: Callable[[Any], Any]) -> Check:
        plan = call(ids)
        order, offsets = reference.task_plan(ids, num_tasks)
        same = torch.equal(plan.order, order) and torch.equal(plan.offsets, offsets)
        return Check(0.0 if same else float("inf"), 0.0, "oracle, exactly")

    return Case(
        suite="conv",
        name=f"task_plan {'x'.join(map(str, shape))} ids T={num_tasks}",
        op="task_plan",
        covers=frozenset({"task_plan"}),
        params={"T": num_tasks, "B": shape[0], "ids": list(shape), "dtype": "int64"},
        make=lambda device: random_ids(num_tasks, shape, sort=False).to(device),
        candidates=(
            Candidate("ours", lambda ids: ops.task_plan(ids, num_tasks), "fastmtl.ops", "ours", graph=True),
            Candidate("plain", lambda ids: baselines.sort_and_count(ids, num_tasks), "stable argsort, bincount"),
        ),
        check=check,
    )
