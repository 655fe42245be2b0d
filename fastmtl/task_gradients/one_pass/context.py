"""`one_pass`: the whole gradient bank from one forward and one backward, where every sample has one task."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from fastmtl.core.dispatch import checking
from fastmtl.core.tensors import COMPLEX_DTYPES, FLOAT_DTYPES
from fastmtl.distributed.wrappers import find_ranks
from fastmtl.ops.task_weights.arguments import check_ids, hint_of_ids
from fastmtl.parameters import Params, describe, is_per_task, read_params
from fastmtl.task_gradients.bank import read_names
from fastmtl.task_gradients.one_pass.bank import OnePassBank
from fastmtl.task_gradients.one_pass.batch import Batch, BatchOptions
from fastmtl.task_gradients.sharing import check_within

_MIXING = ("error", "partition")
_FALLBACK = ("error", "loop")
_MEMORY = ("bank", "stream")
_UNKNOWN = ("probe", "error")
_REDUCTION = ("sum", "mean")

_CALL = "fastmtl.one_pass"

_active: list[Batch] = []


class one_pass:
    """Fills a bank of T task gradients by one forward and one `.backward()`, where every sample has one task.

    Inside the block every torch call is followed: which axis of each tensor carries the samples is known from
    `batch_dim` on, through views, transposes and reshapes, and never guessed. Where a parameter of the bank meets
    samples, its gradient is taken apart by task as it arises, by the kernels of `fastmtl.ops`. The model is not
    changed, and `.grad` of the parameters in the bank is not touched until `bank.apply`.

    Row t is the gradient of task t's part of the loss as written; nothing is renormalised. Terms made of parameters
    alone (weight penalties) go to `.grad`, outside the bank.

    Args:
        model: a module or an iterable of parameters. Those that need a gradient are in the bank, except such as are
            marked by `fastmtl.mark_per_task`.
        task_ids: `[N]` int32 or int64, from 0 to T - 1, or -1: that sample's gradient is added unprojected. Ids on the
            CPU let the block know which tasks are absent without waiting for a device.
        num_tasks: T, 1 to 128 (tasks named "0", "1", ...), or T different names.
        batch_dim: the dimension that carries the samples in tensors from outside: those whose size there is N. Others
            can be named by `bank.samples(x, dim)`, and taken out by `bank.constant(x)`.
        mixing: `"error"`, or `"partition"`: batch norm in training mode is accepted; the rows are then the parts of the
            batch's gradient by samples, not the gradients of the tasks' losses; `cosines()` and `conflicts()` raise.
        fallback: `"error"`, or `"loop"`: parameters of calls that can be followed or tried, but not taken apart (a
            diagonal in `einsum`) get their rows by T backward passes on masked losses.
        memory: `"bank"`: T x P; or `"stream"`: the Gram matrix layer by layer as gradients arise, and in `apply` one
            more backward pass with each sample's cotangent scaled by its task's weight. Nothing of size T x P is held,
            there are no rows to look at, and `apply` must be called before the graph is freed.
        unknown: `"probe"`: a call without a rule, in which no parameter of the bank takes part, is run again with other
            values for some samples, and followed if what their elements show proves where the samples are; that is
            remembered for later steps, and costs the first one alone. Such functions run more than once: what they
            print or write comes several times. `"error"`: nothing is known of the results of such calls. Compiled
            models are never tried.
        sort: the batch is put in the order of its tasks by `bank.sorted`, so that each task's samples are neighbours
            and no layer has to gather them. Tensors from outside that do not go through it keep their order, and raise
            where they meet such as do.
        check: compare the first step of this model with T backward passes, and raise where a row differs.
        shared: the parameters (or the module) in the bank. The others keep their ordinary gradient in `.grad`: heads
            belong there, whose gradients would change the norms.
        loss_reduction: how each rank's loss was made, under a process group: see docs/guides/distributed.md.
        process_group: the ranks that share a batch.
        bank: the bank of an earlier block, to which the rows are added: gradient accumulation.

    Raises:
        TypeError, ValueError: arguments other than the above; ids out of range on the CPU (on a GPU that can't be seen
            without waiting, and the update is NaN); inside the block, a call in which a parameter of the bank meets
            samples and that can't be followed, naming both; a batch norm in training mode.
        RuntimeError: a block inside another one; `backward` called twice inside one, outside it or through
            `torch.autograd.backward`; a model changed inside it, or since the
            block that filled `bank`.

    Source: the gradient of a shared weight apart by task is the weight gradient over each task's samples; PCGrad and
    every method of the Gram matrix as in `fastmtl.backward`.

    Example:
        >>> net = torch.nn.Linear(4, 1)
        >>> x, ids = torch.ones(3, 4), torch.tensor([1, 0, 1])
        >>> with one_pass(net, ids, 2) as bank:
        ...     net(x).square().mean().backward()
        >>> bank.apply("pcgrad").weights.shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: Params,
        task_ids: Tensor,
        num_tasks: int | Sequence[str],
        *,
        batch_dim: int = 0,
        mixing: str = "error",
        fallback: str = "error",
        memory: str = "bank",
        unknown: str = "probe",
        sort: bool = False,
        check: bool = False,
        shared: Params | None = None,
        loss_reduction: str = "sum",
        process_group: Any = None,
        bank: OnePassBank | None = None,
    ) -> None:
        for argument, value, known in (
            ("mixing", mixing, _MIXING),
            ("fallback", fallback, _FALLBACK),
            ("memory", memory, _MEMORY),
            ("unknown", unknown, _UNKNOWN),
            ("loss_reduction", loss_reduction, _REDUCTION),
        ):
            if value not in known:
                raise ValueError(f"{argument}: expected {known[0]!r} or {known[1]!r}, got {value!r}")
        if check and mixing == "partition":
            raise ValueError(
                "check: with mixing='partition' no row is the gradient of a task's loss, so that there is nothing to "
                "compare it with"
            )
        if not isinstance(sort, bool):
            raise TypeError(f"sort: expected a bool, got {type(sort).__name__}")
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
            raise TypeError(f"batch_dim: expected an int, got {type(batch_dim).__name__}")
        modules = [x if isinstance(x, nn.Module) else None for x in (model, shared)]
        where = (modules[0], modules[1], process_group)
        ranks = find_ranks(*where, _CALL)
        if ranks is not None and ranks.sharded:
            raise TypeError(f"{_CALL}: fully_shard modules work with fastmtl.backward and GradientBank")
        if ranks is not None and memory == "stream":
            raise ValueError("memory: 'stream' needs the Gram matrix of the whole batch, which is no sum over ranks")
        names = read_names(num_tasks, "num_tasks")
        params = _read_bank_params(model, shared)
        if ranks is not None:
            ranks.check_params(params, _CALL)
        _check_task_ids(task_ids, len(names))
        if bank is None:
            bank = OnePassBank(params, names)
        else:
            bank._check_same(params, names)
            if memory == "stream":
                raise ValueError("bank: memory='stream' keeps no rows that others could be added to")
        self._bank, self._where, self._loss_reduction = bank, where, loss_reduction
        options = BatchOptions(
            batch_dim,
            partition=mixing == "partition",
            loop=fallback == "loop",
            stream=memory == "stream",
            check=check,
            probe=unknown == "probe",
            sort=sort,
            shared_named=shared is not None,
        )
        self._batch = Batch(model, params, names, task_ids, options)

    def __enter__(self) -> OnePassBank:
        if _active:
            raise RuntimeError(
                "one_pass: already inside a one_pass block; blocks can't be nested, and a process has one at a time, "
                "in whichever thread"
            )
        self._bank._open(self._batch, self._where, self._loss_reduction)
        _active.append(self._batch)
        return self._bank

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self._batch)
        self._batch.leave()


def _read_bank_params(model: Params, shared: Params | None) -> dict[Tensor, str]:
    named = read_params(model, "model")
    if shared is not None:
        chosen = read_params(shared, "shared")
        check_within(chosen, named)
        named = {p: name for p, name in named.items() if p in chosen}
    params = {p: name.replace("_orig_mod.", "") for p, name in named.items() if p.requires_grad and not is_per_task(p)}
    if not params:
        raise ValueError(
            "model: expected at least one parameter that needs a gradient and is shared, got none (of a network that "
            "fastmtl.nn.convert has frozen: joint=True trains the shared weights too)"
        )
    first = next(iter(params))
    for p, name in params.items():
        if type(p) is not nn.Parameter and type(p) is not Tensor:
            raise TypeError(
                f"{describe(p, name)}: expected a plain parameter, got {type(p).__name__}; sharded parameters work "
                "with fastmtl.backward and GradientBank (docs/guides/distributed.md)"
            )
        if p.dtype not in (*FLOAT_DTYPES, *COMPLEX_DTYPES):
            raise TypeError(
                f"{describe(p, name)}: expected float64, float32, bfloat16, float16, complex128 or complex64, got "
                f"{p.dtype}"
            )
        if p.device != first.device:
            raise ValueError(
                f"{describe(p, name)} is on {p.device}, but {describe(first, params[first])} is on {first.device}: "
                "the parameters in one Gram matrix must be on one device; shared= names those of one, the others keep "
                "their ordinary gradient"
            )
    return params


def _check_task_ids(task_ids: Any, num_tasks: int) -> None:
    if not isinstance(task_ids, Tensor):
        raise TypeError(
            f"task_ids: expected an int64 or int32 tensor, got {type(task_ids).__name__}{hint_of_ids(task_ids)}"
        )
    check_ids(task_ids)
    if task_ids.dim() != 1:
        raise ValueError(f"task_ids: expected shape [N], one task for each sample, got {list(task_ids.shape)}")
    if task_ids.shape[0] == 0:
        raise ValueError("task_ids: expected at least one sample, got none")
    if task_ids.device.type == "cpu" or checking():
        low, high = (int(x) for x in task_ids.aminmax())
        if low < -1 or high >= num_tasks:
            raise ValueError(f"task_ids: expected -1 (no task) or 0..{num_tasks - 1}, got {low if low < -1 else high}")
