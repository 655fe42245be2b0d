"""The CUDA kernels of the task convolution on CPU tensors, by `csrc/cuda/task_weights/launch.h`, as `host_kernels` runs
those of gradient surgery. `forward` and `backward` are what the ops' launchers do."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import host_kernels as host
import torch
from torch import Tensor

from fastmtl.core.task_weights import Geometry, SortedBatch, TaskConvCall, TaskWeights

_int, _int64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
LISTED = 64


class _Struct(ctypes.Structure):
    pass


class PictureStrides(_Struct):
    _fields_ = (("n", _int64), ("h", _int64), ("w", _int64))

    @classmethod
    def of(cls, x: Tensor) -> PictureStrides:
        """Of `[N, C, H, W]` with channels next to each other."""
        assert x.stride(1) == 1 or x.shape[1] == 1
        return cls(*(0 if x.shape[d] == 1 else x.stride(d) for d in (0, 2, 3)))


class FilterStrides(_Struct):
    _fields_ = (("co", _int64), ("ci", _int64), ("kh", _int64), ("kw", _int64))


class TaskBatch(_Struct):
    _fields_ = (
        ("order", _pointer),
        ("offsets", _pointer),
        ("num_samples", _int64),
        ("num_tasks", _int),
        ("step", _int),
    )


class ConvShape(_Struct):
    _fields_ = tuple(
        (name, _int)
        for name in (
            *("channels", "features", "height", "width", "out_height", "out_width", "kh", "kw"),
            *("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
        )
    )


class TaskPointers(_Struct):
    _fields_ = (
        ("stacked", _pointer),
        ("task_stride", _int64),
        ("table", _pointer),
        ("listed", _int64 * LISTED),
        ("table_aligned16", ctypes.c_bool),
        ("any", ctypes.c_bool),
    )


class Values(_Struct):
    _fields_ = (("data", _pointer), ("dtype", _int))

    @classmethod
    def of(cls, x: Tensor | None) -> Values:
        if x is None:
            return cls()
        assert x.is_contiguous()
        return cls(x.data_ptr(), host.DTYPES[x.dtype])


class StagedWeights(_Struct):
    _fields_ = (
        ("data", _pointer),
        ("slot_stride", _int64),
        ("column_stride", _int64),
        ("slot", _pointer),
        ("own", ctypes.c_bool),
    )


class StageParams(_Struct):
    _fields_ = (
        ("batch", TaskBatch),
        ("shape", ConvShape),
        ("for_input_gradient", ctypes.c_bool),
        ("dtype", _int),
        ("weight_dtype", _int),
        ("weight", _pointer),
        ("weight_strides", FilterStrides),
        ("delta", TaskPointers),
        ("delta_strides", FilterStrides),
        ("gate", Values),
    )


class ProductParams(_Struct):
    _fields_ = (
        ("batch", TaskBatch),
        ("shape", ConvShape),
        ("input_gradient", ctypes.c_bool),
        ("dtype", _int),
        ("input", _pointer),
        ("in_strides", PictureStrides),
        ("out", _pointer),
        ("out_strides", PictureStrides),
        ("weights", StagedWeights),
        ("bias", Values),
        ("bias_task_stride", _int64),
    )


class Choice(_Struct):
    """Below 0: chosen by the kernels' own model."""

    _fields_ = (("tile", _int), ("blocks", _int64), ("split_rows", _int64), ("chunks", _int))

    @classmethod
    def of(cls, tile: int = -1, blocks: int = -1, split_rows: int = -1, chunks: int = -1) -> Choice:
        return cls(tile, blocks, split_rows, chunks)


class WeightGradParams(_Struct):
    _fields_ = (
        ("batch", TaskBatch),
        ("shape", ConvShape),
        ("dtype", _int),
        ("x", _pointer),
        ("x_strides", PictureStrides),
        ("grad_out", _pointer),
        ("grad_out_strides", PictureStrides),
        ("weight_dtype", _int),
        ("delta", TaskPointers),
        ("delta_strides", FilterStrides),
        ("gate", Values),
        ("grad_delta", TaskPointers),
        ("grad_delta_strides", FilterStrides),
        ("grad_weight", _pointer),
        ("grad_weight_strides", FilterStrides),
        ("grad_gate", _pointer),
        ("grad_bias", _pointer),
        ("grad_bias_dtype", _int),
        ("grad_bias_by_task", ctypes.c_bool),
    )


class WeightGradPlan(_Struct):
    _fields_ = (
        ("tile", _int),
        ("split_rows", _int64),
        ("splits", _int64),
        ("chunks", _int),
        ("chunk_tasks", _int),
        ("bias_split_rows", _int64),
        ("bias_splits", _int64),
        ("together", ctypes.c_bool),
        ("workspace_bytes", _int64),
    )


def _library() -> ctypes.CDLL:
    found = host.library()
    if not hasattr(found, "structs_are_checked"):
        found.host_stage_bytes.restype = _int64
        bytes_ = (_int64 * 7)()
        found.host_struct_bytes(bytes_)
        twins = (TaskPointers, StageParams, StagedWeights, ProductParams, WeightGradParams, WeightGradPlan, Choice)
        assert [ctypes.sizeof(one) for one in twins] == list(bytes_), "a struct of launch.h has changed"
        found.structs_are_checked = True
    return found


class _Memory:
    """A workspace of bits that are all set, and what lies behind it, which must stay so."""

    MARGIN = 1024

    def __init__(self, count: int) -> None:
        # begins on 16 bytes, as torch's memory does
        self.bytes = torch.full((count + self.MARGIN,), 255, dtype=torch.uint8)
        self.count = count

    def check(self) -> None:
        assert (self.bytes[self.count :] == 255).all(), "written beyond the workspace"


def _nhwc(x: Tensor) -> Tensor:
    """As the launcher reads it: channels next to each other, by a copy where they are not."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def _batch(batch: SortedBatch) -> TaskBatch:
    assert batch.order.is_contiguous() and batch.offsets.is_contiguous()
    return TaskBatch(batch.order.data_ptr(), batch.offsets.data_ptr(), batch.order.shape[0], batch.num_tasks, 1)


def _shape(weights: TaskWeights, geometry: Geometry, size: Sequence[int]) -> ConvShape:
    assert geometry.groups == 1
    features, channels, kh, kw = weights.shape
    out = geometry.output_size(size, (kh, kw))
    return ConvShape(channels, features, *size, *out, kh, kw, *geometry.stride, *geometry.padding, *geometry.dilation)


@dataclass
class _Filters:
    """One filter for each task, or none for some, as the kernels take them; keeps alive what they point to."""

    pointers: TaskPointers
    strides: FilterStrides
    keep: Any

    @classmethod
    def of(cls, tensors: Sequence[Tensor], tasks: Sequence[int], num_tasks: int) -> _Filters:
        if not tensors:
            return cls(TaskPointers(), FilterStrides(), None)
        if not tasks:
            (stacked,) = tensors
            pointers = TaskPointers(stacked=stacked.data_ptr(), task_stride=stacked.stride(0), any=True)
            return cls(pointers, FilterStrides(*stacked.stride()[1:]), stacked)
        strides = tensors[0].stride()
        held = [
            x if x.stride() == strides else torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
            for x in tensors
        ]
        words = [0] * num_tasks
        for t, x in zip(tasks, held, strict=True):
            words[t] = x.data_ptr()
        if num_tasks <= LISTED:
            pointers, table = TaskPointers(listed=(_int64 * LISTED)(*words), any=True), None
        else:
            table = torch.tensor(words)
            aligned = all(word % 16 == 0 for word in words)
            pointers = TaskPointers(table=table.data_ptr(), table_aligned16=aligned, any=True)
        return cls(pointers, FilterStrides(*strides), (table, held))


def _stage(x: Tensor, size: Sequence[int], call: TaskConvCall, back: bool, schedule: int) -> tuple[StagedWeights, Any]:
    """What the product multiplies with. x: for its dtype; size: of the layer's input."""
    weights, batch, geometry, _ = call
    deltas = _Filters.of(weights.delta, weights.delta_tasks, batch.num_tasks)
    params = StageParams(
        batch=_batch(batch),
        shape=_shape(weights, geometry, size),
        for_input_gradient=back,
        dtype=host.DTYPES[x.dtype],
        weight_dtype=host.DTYPES[weights.like.dtype],
        weight=None if weights.weight is None else weights.weight.data_ptr(),
        weight_strides=FilterStrides() if weights.weight is None else FilterStrides(*weights.weight.stride()),
        delta=deltas.pointers,
        delta_strides=deltas.strides,
        gate=Values.of(weights.gate),
    )
    staged = StagedWeights()
    if _library().host_as_they_are(ctypes.byref(params), ctypes.byref(staged)):
        return staged, deltas
    memory = _Memory(_library().host_stage_bytes(ctypes.byref(params)))
    status = _library().host_stage(
        ctypes.byref(params), _pointer(memory.bytes.data_ptr()), ctypes.byref(staged), ctypes.c_uint64(schedule)
    )
    host._checked(status)
    memory.check()
    return staged, (deltas, memory)


def _product(
    given: Tensor, like: Tensor, call: TaskConvCall, back: bool, choice: Choice, schedule: int
) -> tuple[Tensor, int]:
    """The result in the memory order of channels_last, and the tile. like: of the layer's input in shape."""
    weights, batch, geometry, bias = call
    given = _nhwc(given)
    size = like.shape[2:]
    staged, keep = _stage(given, size, call, back, schedule)
    shape = _shape(weights, geometry, size)
    n = given.shape[0]
    out_shape = (n, *size, shape.channels) if back else (n, shape.out_height, shape.out_width, shape.features)
    made = host.Output(out_shape, given.dtype)
    out = made.tensor.movedim(-1, 1)
    if back:
        bias = None
    params = ProductParams(
        batch=_batch(batch),
        shape=shape,
        input_gradient=back,
        dtype=host.DTYPES[given.dtype],
        input=given.data_ptr(),
        in_strides=PictureStrides.of(given),
        out=out.data_ptr(),
        out_strides=PictureStrides.of(out),
        weights=staged,
        bias=Values.of(bias),
        bias_task_stride=0 if bias is None or bias.dim() == 1 else bias.shape[1],
    )
    tile = _int64(-1)
    status = _library().host_product(
        ctypes.byref(params), ctypes.byref(choice), ctypes.byref(tile), ctypes.c_uint64(schedule)
    )
    host._checked(status)
    made.check()
    del keep
    return out, tile.value


def forward(x: Tensor, call: TaskConvCall, choice: Choice | None = None, schedule: int = host.FORWARD) -> Tensor:
    """`task_conv2d` of CPU tensors by the CUDA kernels."""
    return _product(x, x, call, False, choice or Choice.of(), schedule)[0]


def input_gradient(
    grad_out: Tensor, x: Tensor, call: TaskConvCall, choice: Choice | None = None, schedule: int = host.FORWARD
) -> Tensor:
    return _product(grad_out, x, call, True, choice or Choice.of(), schedule)[0]


def weight_gradients(
    grad_out: Tensor,
    x: Tensor,
    call: TaskConvCall,
    wanted: Sequence[bool],
    wanted_delta: Sequence[int],
    choice: Choice | None = None,
    schedule: int = host.FORWARD,
) -> list[Tensor]:
    """Of weight, `delta[k]` for k in `wanted_delta`, gate and bias, the wanted; `wanted`: of weight, gate, bias."""
    weights, batch, geometry, bias = call
    x, grad_out = _nhwc(x), _nhwc(grad_out)
    want_weight, want_gate, want_bias = (
        want and one is not None for want, one in zip(wanted, (weights.weight, weights.gate, bias), strict=True)
    )
    made: list[host.Output] = []

    def output(like: Tensor | None, is_wanted: bool = True) -> host.Output | None:
        if not is_wanted or like is None:
            return None
        made.append(host.Output(like.shape, like.dtype))
        return made[-1]

    grad_weight = output(weights.weight, want_weight)
    grads = [output(weights.delta[k]) for k in wanted_delta]
    grad_gate, grad_bias = output(weights.gate, want_gate), output(bias, want_bias)
    tasks = [weights.delta_tasks[k] for k in wanted_delta] if weights.delta_tasks else []
    deltas = _Filters.of(weights.delta, weights.delta_tasks, batch.num_tasks)
    grad_delta = _Filters.of([one.tensor for one in grads], tasks, batch.num_tasks)
    pointer = lambda one: None if one is None else one.tensor.data_ptr()  # noqa: E731
    params = WeightGradParams(
        batch=_batch(batch),
        shape=_shape(weights, geometry, x.shape[2:]),
        dtype=host.DTYPES[x.dtype],
        x=x.data_ptr(),
        x_strides=PictureStrides.of(x),
        grad_out=grad_out.data_ptr(),
        grad_out_strides=PictureStrides.of(grad_out),
        weight_dtype=host.DTYPES[weights.like.dtype],
        delta=deltas.pointers,
        delta_strides=deltas.strides,
        gate=Values.of(weights.gate),
        grad_delta=grad_delta.pointers,
        grad_delta_strides=grad_delta.strides,
        grad_weight=pointer(grad_weight),
        grad_weight_strides=FilterStrides() if grad_weight is None else FilterStrides(*grad_weight.tensor.stride()),
        grad_gate=pointer(grad_gate),
        grad_bias=pointer(grad_bias),
        grad_bias_dtype=0 if bias is None else host.DTYPES[bias.dtype],
        grad_bias_by_task=bias is not None and bias.dim() == 2,
    )
    plan = WeightGradPlan()
    choice = choice or Choice.of()
    _library().host_plan_weight_grads(ctypes.byref(params), ctypes.byref(choice), ctypes.byref(plan))
    memory = _Memory(plan.workspace_bytes)
    status = _library().host_weight_grads(
        ctypes.byref(params), ctypes.byref(plan), _pointer(memory.bytes.data_ptr()), ctypes.c_uint64(schedule)
    )
    host._checked(status)
    memory.check()
    for one in made:
        one.check()
    return [one.tensor for one in made]
