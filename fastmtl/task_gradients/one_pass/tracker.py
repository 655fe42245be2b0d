"""The torch function mode that sees every call of a forward pass, and takes the parameters of a bank apart by task."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastmtl.parameters import describe
from fastmtl.task_gradients.one_pass import functions, short_ways
from fastmtl.task_gradients.one_pass.autograd.ends import Boundary, Place
from fastmtl.task_gradients.one_pass.experiments.experiment import Experiments
from fastmtl.task_gradients.one_pass.experiments.hooks import keeps_samples_apart
from fastmtl.task_gradients.one_pass.known_tensors import Held
from fastmtl.task_gradients.one_pass.layers.broadcast import copied, lift
from fastmtl.task_gradients.one_pass.layers.protocol import Followed, Unproven
from fastmtl.task_gradients.one_pass.layers.registry import run_layer
from fastmtl.task_gradients.one_pass.overrides import without_override
from fastmtl.task_gradients.one_pass.parameter_rows import ParameterRows
from fastmtl.task_gradients.one_pass.report import Report
from fastmtl.task_gradients.one_pass.rules.registry import axes_of_result, is_known
from fastmtl.task_gradients.one_pass.sample_axis import (
    CONSTANT,
    SAMPLE_SUM,
    Axes,
    Constant,
    FromParameters,
    MixedSamples,
    PerSample,
    Recipe,
    SampleSum,
    Unknown,
    reason,
)
from fastmtl.task_gradients.one_pass.task_ids import TaskIds
from fastmtl.task_gradients.one_pass.tensors import Again, SameTensor, Written, nested, replaced, versions
from fastmtl.task_gradients.one_pass.torch_call import TorchCall
from fastmtl.task_gradients.one_pass.torch_names import BACKWARDS, PLAIN, POINTWISE, RANDOM, in_python, name_of, writes

# where a constant beside parameters may be a batch
_TAKES_DATA = frozenset(
    """linear matmul rmatmul addmm baddbmm einsum bilinear embedding embedding_bag lstm gru rnn gru_cell lstm_cell
    multi_head_attention_forward conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""".split()  # noqa: SIM905
)

_frames = torch._C._dynamo.eval_frame


def _compiler_runs() -> bool:
    """Whether a compiler makes its graph of a backward pass inside the block: its calls, on tensors without values, are
    none of the user's."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


class Tracker(ParameterRows, TorchFunctionMode):
    """Follows the samples of a batch through every torch call inside the block.

    Args:
        task_ids: the task of each sample of the batch.
        batch_dim: which dimension of the tensors that come from outside carries them.
        held: for each parameter of the bank what stands for it.
        names: for each of them the name that errors give it.
        constants: tensors of the model that are no samples, whatever their size.
        partition: layers that mix samples are accepted.
        loop: parameters whose rows need a backward pass per task are accepted.
        probe: what no rule tells is found out by experiment.
        bounded: note where samples flow together, in `boundaries`.
        backward: what `loss.backward()` runs.
        outside: the task of each sample in tensors from outside, which may be in another order; None: they are not.
    """

    def __init__(
        self,
        task_ids: TaskIds,
        batch_dim: int,
        held: Mapping[Tensor, Held],
        names: Mapping[Tensor, str],
        constants: Iterable[Tensor],
        *,
        partition: bool = False,
        loop: bool = False,
        bounded: bool = False,
        probe: bool = False,
        backward: Callable[..., None],
        outside: TaskIds | None = None,
    ) -> None:
        super().__init__(task_ids, batch_dim, held, constants, outside, bounded)
        self.names = names
        self.partition, self.loop = partition, loop
        buffers = [x for x, told in self._of_model if not told]
        self.experiments = Experiments(functools.partial(self.on, False), buffers) if probe else None
        self.by_rule: dict[str, int] = {}  # how many calls of a function were followed
        self.by_word: dict[str, int] = {}  # how often the user has told what a tensor carries
        self.backward = backward
        self.off = False
        self.boundaries: list[tuple[Tensor, PerSample, Place]] = []
        self.mixed = False  # a layer that mixes samples was met, and accepted
        self.poisons: list[Tensor] = []  # 0-d, NaN where the device saw what the host would have refused
        self._of_one_task: dict[Any, bool] = {}  # plans of which each segment has samples of one task
        self._open: set[Any] = set()  # functions in Python whose calls are being followed one by one

    @contextlib.contextmanager
    def on(self, following: bool = True) -> Iterator[None]:
        """Calls inside are followed, whether or not this is inside the block; or not, even inside it."""
        before, self.off = self.off, not following
        entered = self in torch.overrides._get_current_function_mode_stack()
        try:
            with contextlib.nullcontext() if entered or not following else self._attached():
                yield
        finally:
            self.off = before

    @contextlib.contextmanager
    def _attached(self) -> Iterator[None]:
        """The mode, after the block has ended."""
        self.attach()
        try:
            with self:
                yield
        finally:
            self.detach()

    def attach(self) -> None:
        """Begins to follow: the tensors of the model are told what they are, and functions show their calls."""
        super().attach()
        functions.show_to(self)
        if "torch._dynamo" in sys.modules:
            sys.modules["torch._dynamo.eval_frame"].skip_code(Tracker.__torch_function__.__code__)

    def detach(self) -> None:
        """Ends what `attach` began."""
        functions.hide_from(self)
        super().detach()

    # --- what the rows are known from

    def count_word(self, name: str) -> None:
        """The user has told what a tensor carries."""
        if not torch.compiler.is_compiling():
            self.by_word[name] = self.by_word.get(name, 0) + 1

    def report(self) -> Report:
        tried = self.experiments
        verdicts, runs, seconds = ({}, 0, 0.0) if tried is None else (tried.verdicts, tried.runs, tried.seconds)
        return Report(dict(self.by_rule), dict(verdicts), dict(self.by_word), runs, seconds)

    # --- what layers ask for

    def engine(self, *args: Any) -> None:
        """`torch.autograd.backward`."""
        with self.backwards():
            without_override(torch.autograd.backward)(*args)

    @contextlib.contextmanager
    def backwards(self) -> Iterator[None]:
        """Around a backward pass: recomputation under checkpointing happens in there, and is followed again."""
        before, self.running = self.running, True
        try:
            with self.on():
                yield
        finally:
            self.running = before

    def _proven_hook(self, x: Tensor, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """A hook of an activation's gradient. What it makes of it must keep samples apart: with the loss of one task
        alone, the gradients of other tasks' samples are zero."""
        axis = self.axis_of(x)
        if not isinstance(axis, PerSample):
            return hook

        def proven(g: Tensor) -> Any:
            if not self.running:
                return hook(g)
            before = g._version, g.detach().clone()
            with self.on(False):
                out = hook(g)
                if out is None and g._version == before[0]:
                    return None
                name = f"one_pass: a hook of the gradient of a tensor of shape {list(x.shape)}"
                if self.bounded:
                    raise ValueError(f"{name} changes it, and memory='stream' runs two backward passes: memory='bank'")
                if not keeps_samples_apart(hook, before[1], axis):
                    raise ValueError(
                        f"{name} mixes samples: with one task's loss it would see zeros for other tasks' samples. "
                        "Change each sample's gradient by itself, or use a fastmtl.GradientBank"
                    )
            return out

        return proven

    def inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a function of torch that is written in Python so that each call in it comes back here."""
        plain = without_override(func)
        with self:
            return plain(*args, **kwargs)

    def meet_shared_statistics(self) -> None:
        if not self.partition:
            raise ValueError(
                "one_pass: a batch norm in training mode takes its statistics over samples of all tasks, so that "
                "'the gradient of one task's loss' is ambiguous. Ways out: statistics in eval mode "
                "(`norm.eval()` of these norms alone, the affine part still learns), a norm without batch statistics "
                "(GroupNorm), statistics by these very tasks (`fastmtl.nn.convert(model, tasks, 'patch', joint=True)` "
                "makes all norms `TaskBatchNorm2d`; call the model inside `fastmtl.nn.tasks(task_ids)`), "
                "a `fastmtl.GradientBank` with a forward per task; or mixing='partition', which takes each sample's "
                "part of the gradient for its task's (see docs/guides/one-pass.md)"
            )
        self.mixed = True

    def meet_task_statistics(self, y: Tensor, axis: PerSample, order: Tensor, offsets: Tensor) -> Tensor:
        if self.partition:
            return y
        compiling = torch.compiler.is_compiling()
        key = (SameTensor(order), axis.task_ids.key, axis.outer, axis.inner)
        if not compiling and key in self._of_one_task:
            return y
        mixed = axis.task_ids.meets_others(axis.outer, axis.inner, order, offsets)
        if compiling or mixed.device.type != "cpu":
            # the host can't see it without waiting
            poison = torch.where(mixed, torch.nan, 0.0)
            if compiling:
                return y + poison.to(y.dtype)
            self.poisons.append(poison)
        elif mixed:
            raise ValueError(
                "one_pass: a batch norm by task takes its statistics over samples of several tasks of one_pass, so "
                "that 'the gradient of one task's loss' is ambiguous: `fastmtl.nn.tasks` and one_pass were given "
                "different ids, or some are -1 (of no task). Ways out: the same ids; statistics in eval mode; or "
                "mixing='partition', which takes each sample's part of the gradient for its task's (see "
                "docs/guides/one-pass.md)"
            )
        if not compiling:
            self._of_one_task[key] = True
        return y

    # --- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        compiling = torch.compiler.is_compiling()
        if self.off or (not compiling and _compiler_runs()):
            return func(*args, **kwargs)
        key = None
        if not compiling:
            if _frames.get_eval_frame_callback() is not None:
                return self._uncompiled(func, types, args, kwargs)
            if not self.bounded:
                short, found = short_ways.take(self, func, args, kwargs)
                if short is not None:
                    self.by_rule[short] = self.by_rule.get(short, 0) + 1
                    return found
                key = found
        name = name_of(func)
        if name == "register_hook" and func is torch.Tensor.register_hook and not torch.compiler.is_compiling():
            return func(args[0], self._proven_hook(args[0], *args[1:], **kwargs))
        if name in PLAIN or name in BACKWARDS:
            return func(*args, **kwargs)
        if "axis" in kwargs or "keepdims" in kwargs:  # numpy's names
            kwargs = {_OWN_NAMES.get(k, k): v for k, v in kwargs.items()}
        if name == "__deepcopy__":  # its second argument has what was copied so far, and the result then
            out = func(*args, **kwargs)
            self.mark(out, self.axis_of(args[0]))
            return out
        if name == "__iter__":
            func, args, name = torch.unbind, (args[0], 0), "unbind"
            out, axes = self.follow(func, args, {})
            self._hand_on(name, args, {}, out, axes)
            return iter(out)
        if name == "grad" and func is torch.autograd.grad:
            if kwargs.get("create_graph") or (len(args) > 4 and args[4]):
                raise ValueError(
                    "one_pass: torch.autograd.grad with create_graph=True inside the block: the rows of a gradient's "
                    "own derivative (a gradient penalty) can't be told. A fastmtl.GradientBank, with a forward and "
                    "backward pass per task, takes it"
                )
            out = self.inside(func, args, kwargs)
            self._hand_on(name, args, kwargs, out, Unknown("a gradient taken inside the block can't be followed"))
            return out
        if name == "backward" and func is torch.Tensor.backward:
            return self.backward(*args, **kwargs)
        if name == "backward" and func is torch.autograd.backward:
            raise RuntimeError("one_pass: call loss.backward() inside the block, and not torch.autograd.backward")
        out, axes = self.follow(func, args, kwargs)
        if torch.compiler.is_compiling():
            if type(out) is tuple or type(out) is list:
                out = replaced(out, _fresh)
        elif is_known(name):
            self.by_rule[name] = self.by_rule.get(name, 0) + 1
        if key is not None:
            short_ways.keep(self, key, out, axes)
        self._hand_on(name, args, kwargs, out, axes)
        return out

    def _uncompiled(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call behind a graph break: dynamo would compile what follows it, too, and give one attribute another one's
        code."""
        before = _frames.set_eval_frame(None)
        try:
            return self.__torch_function__(func, types, args, kwargs)
        finally:
            _frames.set_eval_frame(before)

    def follow(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Followed:
        """The result of a call and what is known of it, or of the tensors in it in turn."""
        call = TorchCall(name_of(func), func, args, kwargs, self.axis_of)
        parameters = samples = total = False
        unknown = mixed = None
        orders: set[Any] = set()
        for x in call.tensors():
            axis = self.axis_of(x)
            if isinstance(axis, PerSample):
                samples = True
                orders.add(axis.task_ids.key)
            elif isinstance(axis, FromParameters):
                parameters = True
            elif isinstance(axis, SampleSum):
                total = True
            elif isinstance(axis, Unknown):
                unknown = axis if unknown is None else unknown
            elif isinstance(axis, MixedSamples):
                mixed = axis if mixed is None else mixed
        if self.outside.key != self.task_ids.key and {self.outside.key, self.task_ids.key} <= orders:
            raise ValueError(
                f"one_pass: {call.name} joins samples in the order of bank.sorted with samples in the order of the "
                "batch: pass all through bank.sorted, and name what only has their number by bank.constant(x)"
            )
        if not parameters:
            if samples:
                return self._on_samples(call)
            out = self.run(func, args, kwargs)
            return out, axes_of_result(call.returned(out))
        lost = mixed if unknown is None else unknown
        if lost is not None:
            raise self._refused(call, lost.why)
        if total:
            several = any(x.dim() and isinstance(self.axis_of(x), SampleSum) for x in call.tensors())
            if samples or call.name not in _SUMS or (several and call.name in ("add", "sub")):
                why = f"{call.name} joins it with a sum over the samples, which is no sum over them then"
                raise self._refused(call, why)
            self.check_no_data(call.tensors())
            return func(*args, **kwargs), SAMPLE_SUM
        if not samples:
            return self._on_parameters(call)
        if not torch.compiler.is_compiling() and self._has_gaps(call):
            raise self._refused(call, "some positions carry no sample, such as the sums of tasks that are absent")
        if not torch.compiler.is_compiling():
            self._note(call)
        try:
            return run_layer(self, call)
        except Unproven as error:
            why = str(error)
        if self.loop:
            return self._on_loop(call, why)
        raise self._refused(call, why)

    def _has_gaps(self, call: TorchCall) -> bool:
        axes = map(self.axis_of, call.tensors())
        return any(isinstance(axis, PerSample) and axis.task_ids.partial for axis in axes)

    def check_no_data(self, terms: Sequence[Tensor]) -> None:
        """Raises where a term of the loss is a batch that nobody knows the tasks of."""
        for x in terms:
            axis = self.axis_of(x)
            if isinstance(axis, FromParameters) and axis.from_data:
                raise ValueError(
                    f"one_pass: a term of the loss comes from parameters and data without tasks: {axis.from_data}. "
                    "Was it made inside the block, or does it lie along another dimension than batch_dim "
                    "(bank.samples(x, dim))? Samples of no task have the id -1. bank.constant(x): the term goes to "
                    ".grad, outside the bank"
                )

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call itself. A tensor that it writes into keeps what was known of it, though it may get a graph now."""
        first = args[0] if args and isinstance(args[0], Tensor) and not self.in_bank(args[0]) else None
        if first is None:
            return func(*args, **kwargs)
        before = self.axis_of(first)
        base = first._base if writes(func) and not torch.compiler.is_compiling() else None
        of_base = None if base is None else self.axis_of(base)
        # the view is one of a place in `boundaries`, which torch lets nobody write into
        if self.bounded and base is not None and isinstance(before, (SampleSum, MixedSamples)):
            raise ValueError(
                f"one_pass: {name_of(func)} writes into a view of a single sample's value, which memory='stream' can't "
                "follow: write x[i] = value, or use torch.where"
            )
        out = func(*args, **kwargs)
        if out is first or writes(func):
            self.mark(first, before)
        if base is not None and of_base is not None:
            self.mark(base, of_base)
        return out

    def _on_samples(self, call: TorchCall) -> Followed:
        """No parameter of the bank takes part."""
        name, func, args, kwargs = call.name, call.func, call.args, call.kwargs
        if not is_known(name) and in_python(func) and not torch.compiler.is_compiling() and func not in self._open:
            self._open.add(func)
            try:
                out = self.inside(func, args, kwargs)
            finally:
                self._open.discard(func)
            return out, [self.axis_of(x) for x in nested(out)]
        training = name == "batch_norm" and call.argument(5, "training", False)
        if self.bounded and writes(func) and not training:
            args, kwargs = self._bound_written(call)
        if writes(func):  # which gives a view of the same memory another graph (`x[1:] += y`)
            axes_before = {id(x): self.axis_of(x) for x in call.tensors()}
            call = call._replace(axis_of=lambda x: axes_before.get(id(x)) or self.axis_of(x))
        out = self.run(func, args, kwargs)
        if training and any(x.requires_grad for x in nested(out)):
            self.meet_shared_statistics()
        if training:
            call = call._replace(args=args[:5], kwargs={**kwargs, "training": False})
        if name == "task_batch_norm.default" and not args[3] and out[0].requires_grad:
            axis = self.axis_of(args[0])
            if isinstance(axis, PerSample):
                out = (self.meet_task_statistics(out[0], axis, *args[5:7]), *out[1:])
        if name in _SHAPES and writes(func):
            return out, Unknown(f"{name}_ changes the shape of a tensor in place")
        axes = self.settled(call.returned(out))
        if self._sums(axes) and any(x.requires_grad for x in nested(out)) and not writes(func):
            out = func(*replaced(call.args, self.bound), **replaced(call.kwargs, self.bound))
        return out, axes

    def settled(self, call: TorchCall) -> Axes:
        """What is known of the results of a call that has run: by a rule, or else by experiment."""
        axes = axes_of_result(call)
        if self.experiments is None or torch.compiler.is_compiling():
            return axes
        return self.experiments.settle(call, axes, formula=self.running and not torch.is_grad_enabled())

    def _bound_written(self, call: TorchCall) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call in place. A copy is written into first, to see whether samples flow together: the
        call itself can't be made a second time."""
        args, kwargs, func = call.args, call.kwargs, call.func
        first, *rest = args
        if call.name in RANDOM or not isinstance(first, Tensor) or not any(map(call.carries_samples, nested(rest))):
            return args, kwargs
        copy = first.clone()
        self.mark(copy, self.axis_of(first))
        out = self.run(func, (copy, *rest), kwargs)
        if not self._sums(axes_of_result(call._replace(args=(copy, *rest)).returned(out))):
            return args, kwargs
        return (first, *replaced(rest, self.bound)), replaced(kwargs, self.bound)

    def _sums(self, axes: Axes) -> bool:
        """Whether samples flow together here, and note must be taken of it."""
        found = axes if isinstance(axes, list) else [axes]
        return self.bounded and any(isinstance(axis, (SampleSum, MixedSamples)) for axis in found)

    def bound(self, x: Tensor) -> Tensor:
        """A tensor of samples at the place where it flows into a loss."""
        axis = self.axis_of(x)
        if not isinstance(axis, PerSample) or not x.requires_grad:
            return x
        place = Place()
        self.boundaries.append((x, axis, place))
        return Boundary.apply(x, place)

    def _on_parameters(self, call: TorchCall) -> Followed:
        """Parameters and constants alone."""
        name, func, args, kwargs = call.name, call.func, call.args, call.kwargs
        random = (name in RANDOM or name in _ATTENTION) and not _is_identity(call)
        if random:
            found = self._on_copied(call)
            if found is not None:
                return found
        again = self._drawn_again(call) if random or name in _RECURRENT or not is_known(name) else func
        compiling, tensors = torch.compiler.is_compiling(), call.tensors()
        axes, versions_before = [self.axis_of(x) for x in tensors], () if compiling else versions(tensors)
        into_constant = not compiling and writes(func) and isinstance(self.axis_of(args[0]), Constant)
        constant = args[0].detach().clone() if into_constant else None
        out = func(*args, **kwargs)
        results = call.returned(out).results()
        data = ""
        for x, axis in zip(tensors, axes, strict=True):
            if isinstance(axis, FromParameters):
                data = axis.from_data or data
            elif isinstance(axis, Constant) and x.dim():
                if axis.from_samples:
                    raise self._refused(call, f"it meets what depends on several samples: {axis.from_samples}")
                if name in _TAKES_DATA and not self._is_constant(x):
                    data = f"{name} of a tensor of shape {list(x.shape)} that carries no samples"
        if not any(x.requires_grad for x in results):
            return out, CONSTANT
        if again is None:
            raise self._refused(call, f"{name} draws random numbers, which can't be drawn twice alike")
        if writes(func) or (not compiling and versions(tensors) != versions_before):
            if compiling or name in _SHAPES or not results or results[0] is not args[0]:
                raise self._refused(call, f"{name} changes in place what was computed from parameters")
            again, args = Written(again), (args[0] if constant is None else constant, *args[1:])
        elif any(out is x for x in tensors):  # such as flatten of what is flat
            return out, self.axis_of(out)
        recipe = Recipe(again, args, kwargs, axes, compiling=compiling)
        if isinstance(out, Tensor) or name == "setitem":
            return out, FromParameters(recipe, 0, data)
        return out, [FromParameters(recipe, k, data) for k in range(len(results))]

    def _drawn_again(self, call: TorchCall) -> Callable[..., Any] | None:
        """The function, so that it draws the same random numbers for each row; None: they can't be drawn again."""
        tensors = call.tensors()
        cuda = any(x.device.type == "cuda" for x in tensors)
        given = call.kwargs.get("generator") is not None
        if torch.compiler.is_compiling() or given or (cuda and torch.cuda.is_current_stream_capturing()):
            return None if _draws(call) else call.func
        return Again(call.func, tensors)

    def _on_copied(self, call: TorchCall) -> Followed | None:
        """What was copied for every sample, such as queries, before a call that is not the same for each row of a bank:
        each sample's copy is its own from here on. None: there is nothing of the kind."""
        n = len(self.task_ids)
        if n < 2 or torch.compiler.is_compiling():
            return None
        lifted: dict[Tensor, Tensor] = {}
        for x in call.tensors():
            if not isinstance(self.axis_of(x), FromParameters) or x in lifted:
                continue
            dims = [
                d
                for d in range(x.dim())
                if x.shape[d] == n and copied(self.axis_of(x), x, d, PerSample(d, self.task_ids))
            ]
            if len(dims) == 1:
                lifted[x] = lift(self, x, x.dim() - dims[0], PerSample(dims[0], self.task_ids))
        if not lifted:
            return None
        args, kwargs = (replaced(given, lambda x: lifted.get(x, x)) for given in (call.args, call.kwargs))
        return self.follow(call.func, args, kwargs)

    def _on_loop(self, call: TorchCall, why: str) -> Followed:
        """A call whose parameters get their rows from a backward pass per task."""
        args, kwargs = replaced(call.args, self._leaf), replaced(call.kwargs, self._leaf)
        out = call.func(*args, **kwargs)
        # without a graph, in which parameters would count as what carries the gradient, and samples as constants
        ran = TorchCall(
            call.name, call.func, args, kwargs, self._axis_beside_leaves, replaced(out, lambda x: x.detach())
        )
        axes = self.settled(ran)
        for axis in axes if isinstance(axes, list) else [axes]:
            if not isinstance(axis, PerSample):
                raise self._refused(call, f"{why}; {reason(axis) or f'{call.name} sums over the samples'}", loop=False)
        return out, axes

    def _hand_on(self, name: str, args: Any, kwargs: Any, out: Any, axes: Axes) -> None:
        """Marks the results of a call, and what it wrote to."""
        if name == "setitem":
            assert not isinstance(axes, list)
            self.mark(args[0], axes)
            written = args[0]
        else:
            results = nested(out)
            if isinstance(axes, list):
                for x, axis in zip(results, axes, strict=True):
                    self.mark(x, axis)
            else:
                for x in results:
                    self.mark(x, axes)
            written = out if args and out is args[0] else None
        if isinstance(written, Tensor) and name not in _RETURNS_ITS_ARGUMENT and not torch.compiler.is_compiling():
            self._written(name, written, nested((args[1:], kwargs)))

    def _written(self, name: str, x: Tensor, others: Sequence[Tensor]) -> None:
        """What is written into a view changes its base.

        Args:
            x: what was written into.
            others: the other tensors of the call.
        """
        base = x._base
        if base is None or base is x or not x.numel():
            return
        axis, before = self.axis_of(x), self.axis_of(base)
        if isinstance(axis, Constant):
            if isinstance(before, Constant) and before.arange_length is not None:
                self.mark(base, CONSTANT)  # no longer an arange
            return
        if name in POINTWISE and all(isinstance(self.axis_of(other), Constant) for other in others):
            return  # each element is still made of itself alone
        if isinstance(axis, PerSample):
            place = _place_in(base, x, axis.axis)
            if isinstance(before, PerSample) and axis.task_ids.key == before.task_ids.key:
                if place is None or place == before.axis:
                    return
            elif isinstance(before, Constant) and not before.from_samples and place is not None:
                self.mark(base, axis.at(place))  # memory that is filled part by part
                return
        self.mark(base, Unknown(f"{name} wrote into a view of it"))

    def _refused(self, call: TorchCall, why: str, *, loop: bool = True) -> ValueError:
        found = [x for x in call.tensors() if isinstance(self.axis_of(x), FromParameters)]
        leaves = [leaf for x in found for leaf in self._leaves(x)]
        which = describe(leaves[0], self.names[leaves[0]]) if leaves else "a parameter"
        ways = (
            "Tensors made inside the block count as constants; bank.samples(x, dim) and bank.constant(x) tell what a "
            "tensor carries"
        )
        if loop and not self.loop:
            ways += "; fallback='loop' computes such parameters by a backward pass per task"
        ways += "; shared= or fastmtl.mark_per_task leaves a parameter out of the bank"
        return ValueError(
            f"one_pass: {which} meets the samples in {call.name}, and its rows can't be told: {why}. {ways}"
        )


_RECURRENT = frozenset(("lstm", "gru", "rnn"))
_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))

# what they return may be what they were given, though nothing was written
_RETURNS_ITS_ARGUMENT = frozenset(
    """contiguous to type type_as float double half bfloat16 reshape flatten view expand squeeze atleast_1d alias
    cpu cuda requires_grad_""".split()  # noqa: SIM905
)

_SHAPES = frozenset(("squeeze", "unsqueeze", "transpose", "t", "resize", "resize_as", "set", "as_strided", "data.set"))

_OWN_NAMES = {"axis": "dim", "keepdims": "keepdim"}

# of a sum over samples and of parameters alone these make a sum
_SUMS = frozenset(("add", "sub", "stack", "cat", "sum"))


def _place_in(base: Tensor, view: Tensor, dim: int) -> int | None:
    """The dimension of a tensor that one of a view of it runs through from beginning to end; None: it can't be told."""
    size, stride = view.shape[dim], view.stride(dim)
    if size == 1:  # a batch of one sample, whose is all
        return dim if base.dim() == view.dim() and base.shape[dim] == 1 else None
    if not base.is_contiguous():
        return None
    for own in range(base.dim()):
        if base.shape[own] == size and base.stride(own) == stride:
            first = (view.storage_offset() - base.storage_offset()) // stride % size
            return own if first == 0 else None
    return None


def _draws(call: TorchCall) -> bool:
    """Whether it is known to draw random numbers."""
    if call.name == "scaled_dot_product_attention":
        return bool(call.argument(4, "dropout_p", 0.0))
    if call.name == "multi_head_attention_forward":
        return bool(call.argument(10, "dropout_p") and call.argument(13, "training", True))
    return call.name in RANDOM


def _is_identity(call: TorchCall) -> bool:
    """Dropout that drops nothing."""
    if "dropout" not in call.name:
        return False
    return call.argument(2, "training", True) is False or call.argument(1, "p", 0.5) == 0


def _fresh(x: Tensor) -> Tensor:
    """torch.compile lets one of several results have no attributes."""
    return x.view_as(x)
