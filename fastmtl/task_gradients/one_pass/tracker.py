"""The torch function mode that sees every call of a forward pass, and takes the parameters of a bank apart by task."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastmtl.parameters import describe
from fastmtl.task_gradients.one_pass import autograd
from fastmtl.task_gradients.one_pass.layers import Unproven, Weight, call_layer, copied, lift
from fastmtl.task_gradients.one_pass.rules import argument, is_known, tag_of_result
from fastmtl.task_gradients.one_pass.sample_axis import (
    ATTRIBUTE,
    CONST,
    CONSTANT,
    MIXING,
    PARAM,
    SAMPLES,
    SUM,
    TOTAL,
    UNKNOWN,
    Computed,
    Recipe,
    Samples,
    Tag,
    nested,
    replaced,
    unknown,
    versions,
)
from fastmtl.task_gradients.one_pass.torch_names import PLAIN, RANDOM, in_python, name_of, writes

OF_PARAMETERS = Tag(PARAM)
NAMED = Tag(CONST, axis=-1)  # by the user: never one that a rule has made

# where a constant beside parameters may be a batch
_TAKES_DATA = frozenset(
    """linear matmul rmatmul addmm baddbmm einsum bilinear embedding embedding_bag lstm gru rnn gru_cell lstm_cell
    multi_head_attention_forward conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d""".split()  # noqa: SIM905
)


class Follow(TorchFunctionMode):
    """Follows the samples of a batch through every torch call inside the block.

    Args:
        samples: the batch: task of each sample.
        batch_dim: which dimension of the tensors that come from outside carries them.
        rows: for each parameter of the bank the stand-in `[R, ...]` that receives its rows.
        values: for each parameter of the bank the value that layers compute with.
        names: for each of them the name that errors give it.
        constants: tensors of the model that are no samples, whatever their size.
        partition: layers that mix samples are accepted.
        loop: for parameters whose rows need a backward pass per task, a leaf of their own; None: refuse them.
        bounded: note where samples flow together, in `boundaries`.
    """

    def __init__(
        self,
        samples: Samples,
        batch_dim: int,
        rows: Mapping[Tensor, Tensor],
        values: Mapping[Tensor, Tensor],
        names: Mapping[Tensor, str],
        constants: Mapping[Tensor, bool],
        *,
        partition: bool = False,
        loop: Mapping[Tensor, Tensor] | None = None,
        bounded: bool = False,
        backward: Callable[..., None],
    ) -> None:
        super().__init__()
        self.samples, self.batch_dim = samples, batch_dim
        self.rows, self.values, self.names, self.constants = rows, values, names, constants
        self.partition, self.loop, self.bounded = partition, loop, bounded
        self.backward = backward
        self.off = False
        self.boundaries: list[tuple[Tensor, Tag, autograd.Place]] = []
        self.mixed = False  # a layer that mixes samples was met, and accepted
        self.looped: dict[Tensor, bool] = {}
        self.met: dict[Tensor, list[Samples]] = {}  # which parts of the batch each parameter saw; () all of it
        self.uses: dict[Tensor, int] = {}
        self.running = False  # a backward pass
        self.seen = False  # a tensor from outside carried samples
        self._tagged: list[weakref.ref[Tensor]] = []
        self._open: set[Any] = set()  # functions in Python whose calls are being followed one by one
        self._unbound: dict[Tensor, tuple[Tensor, ...]] = {}

    @contextlib.contextmanager
    def on(self, following: bool = True) -> Iterator[None]:
        """Calls inside are followed, whether or not this is inside the block; or not, even inside it."""
        before, self.off = self.off, not following
        entered = self in torch.overrides._get_current_function_mode_stack()
        try:
            with contextlib.nullcontext() if entered or not following else self:
                yield
        finally:
            self.off = before

    # --- tags

    def tag(self, x: Tensor) -> Tag:
        if x in self.rows:
            return OF_PARAMETERS if torch.is_grad_enabled() else CONSTANT
        found = getattr(x, ATTRIBUTE, None)
        # a tensor that got another graph since is the result of a torch.autograd.Function, whose backward is not seen
        if found is not None and found[0] is self.samples and _same_graph(x, found[2]):
            tag = Tag(*found[1])
            if tag.kind in (TOTAL, MIXING) and not x.requires_grad:
                return Tag(CONST, why=tag.why or "a number of the whole batch")
            return CONSTANT if tag.kind == PARAM and not x.requires_grad else tag
        return self._outside(x)

    def _outside(self, x: Tensor) -> Tag:
        """Of a tensor that no call inside the block has made."""
        if isinstance(x, nn.Parameter) or x in self.constants:
            return CONSTANT
        if torch.compiler.is_compiling():
            if x.requires_grad:
                return unknown("a call that torch.compile does not show, such as F.pad or a torch.autograd.Function")
        elif x.grad_fn is not None:
            return unknown(
                f"a tensor of shape {list(x.shape)} was computed outside the block, or by what torch does not show "
                f"(a torch.autograd.Function, a scripted module): {type(x.grad_fn).__name__}"
            )
        dim = self.batch_dim + x.dim() if self.batch_dim < 0 else self.batch_dim
        if 0 <= dim < x.dim() and x.shape[dim] == len(self.samples):
            if not torch.compiler.is_compiling():
                self.seen = True
            return Tag(SAMPLES, dim, self.samples)
        return CONSTANT

    def mark(self, x: Tensor, tag: Tag) -> None:
        if isinstance(x, nn.Parameter) or x in self.constants:  # written inside the block: nothing stays on the model
            return
        if tag.kind == SAMPLES:
            size = tag.outer * len(tag.samples) * tag.inner
            if not 0 <= tag.axis < x.dim() or x.shape[tag.axis] != size:
                tag = unknown("the axis of the samples was lost")
        # the tag as a plain tuple: dynamo of torch 2.11 loses the fields of a named one on its way out of a graph
        setattr(x, ATTRIBUTE, (self.samples, tuple(tag), _graph(x)))
        if not torch.compiler.is_compiling() and x.grad_fn is None:
            self._tagged.append(weakref.ref(x))

    def clear(self) -> None:
        """Leaves nothing on tensors that came from outside."""
        for ref in self._tagged:
            x = ref()
            if x is not None:
                x.__dict__.pop(ATTRIBUTE, None)
        self._tagged.clear()

    # --- what layers ask for

    def weight(self, p: Tensor) -> Weight:
        """A parameter of the bank, what was computed from some, or a tensor with its own gradient."""
        if p in self.rows:
            self._use(p)
            return Weight(self.values[p], autograd.STACKED, (self.rows[p],))
        tag = self.tag(p)
        if tag.kind != PARAM:
            return Weight(p, 0, ())
        value = p if self.bounded else p.detach()
        return Weight(value, self.samples.num_rows, self.twins(p))

    def _use(self, p: Tensor) -> None:
        """Rows of a parameter arrive from each of its uses; those of a recomputation are no more of them."""
        if not torch.compiler.is_compiling() and not self.running:
            self.uses[p] = self.uses.get(p, 0) + 1

    def twins(self, p: Tensor) -> tuple[Tensor, ...]:
        """What was computed from parameters, computed again from each task's copies of them."""
        if p in self.rows:
            found = self._unbound.get(p)
            if found is None:
                self._use(p)
                found = self.rows[p].unbind(0)
                if not torch.compiler.is_compiling():
                    self._unbound[p] = found
            return found
        computed: Computed = self.tag(p).recipe
        recipe = computed.recipe
        if recipe.twins is None:
            params = [x for x in nested((recipe.args, recipe.kwargs)) if self.tag(x).kind == PARAM]
            if not torch.compiler.is_compiling() and recipe.versions != versions((recipe.args, recipe.kwargs)):
                raise RuntimeError(
                    f"one_pass: what {name_of(recipe.func)} computed from parameters can't be computed again: its "
                    "arguments were changed in place since"
                )
            copies = [self.twins(x) for x in params]
            made = []
            for r in range(self.samples.num_rows):
                # by position: tensors are found again in the order in which `nested` lists them
                here = iter([c[r] for c in copies])
                change = functools.partial(self._copy_of, here)
                out = recipe.func(*replaced(recipe.args, change), **replaced(recipe.kwargs, change))
                made.append(nested(out))
            recipe.twins = made
        return tuple(row[computed.pick] for row in recipe.twins)

    def _copy_of(self, copies: Any, x: Tensor) -> Tensor:
        return next(copies) if self.tag(x).kind == PARAM else x

    def engine(self, *args: Any) -> None:
        """`torch.autograd.backward`; recomputation under checkpointing happens in there, and is followed again."""
        self.running = True
        try:
            with self.on():
                _without_override(torch.autograd.backward)(*args)
        finally:
            self.running = False

    def inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a function of torch that is written in Python so that each call in it comes back here."""
        plain = _without_override(func)
        with self:
            return plain(*args, **kwargs)

    def meet_shared_statistics(self) -> None:
        if not self.partition:
            raise ValueError(
                "one_pass: a batch norm in training mode takes its statistics over samples of all tasks, so that "
                "'the gradient of one task's loss' is ambiguous. Ways out: statistics in eval mode "
                "(`module.eval()`, the affine part still learns), a norm without batch statistics (GroupNorm), "
                "a `fastmtl.GradientBank` with a forward per task; or mixing='partition', which takes each sample's "
                "part of the gradient for its task's (see docs/one-pass.md)"
            )
        self.mixed = True

    # --- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in PLAIN or self.off:
            return func(*args, **kwargs)
        if "axis" in kwargs or "keepdims" in kwargs:  # numpy's names
            kwargs = {_OWN_NAMES.get(k, k): v for k, v in kwargs.items()}
        if name == "__iter__":
            func, args, name = torch.unbind, (args[0], 0), "unbind"
            out, tags = self.call(func, args, {})
            self._hand_on(func, name, args, out, tags)
            return iter(out)
        if name == "grad" and func is torch.autograd.grad:
            out = self.inside(func, args, kwargs)
            self._hand_on(func, name, args, out, unknown("a gradient taken inside the block can't be followed"))
            return out
        if name == "backward" and func is torch.Tensor.backward:
            return self.backward(*args, **kwargs)
        if name == "backward" and func is torch.autograd.backward:
            raise RuntimeError("one_pass: call loss.backward() inside the block, and not torch.autograd.backward")
        out, tags = self.call(func, args, kwargs)
        if torch.compiler.is_compiling() and (type(out) is tuple or type(out) is list):
            out = replaced(out, _fresh)
        self._hand_on(func, name, args, out, tags)
        return out

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The result of a call and its tag, or the tags of its tensors in turn."""
        name = name_of(func)
        kinds: dict[str, bool] = {}
        for x in nested((args, kwargs)):
            kinds[self.tag(x).kind] = True
        if PARAM not in kinds:
            if SAMPLES not in kinds:
                out = self.run(func, args, kwargs)
                return out, tag_of_result(name, args, kwargs, out, self.tag)
            return self._on_samples(name, func, args, kwargs)
        if SAMPLES not in kinds and TOTAL not in kinds and MIXING not in kinds and UNKNOWN not in kinds:
            return self._on_parameters(name, func, args, kwargs)
        for kind in (UNKNOWN, MIXING):
            if kind in kinds:
                why = next(t.why for t in map(self.tag, nested((args, kwargs))) if t.kind == kind)
                raise self._refused(name, args, kwargs, why)
        if TOTAL in kinds:
            if SAMPLES in kinds or name not in _SUMS:
                raise self._refused(
                    name, args, kwargs, f"{name} joins it with a sum over the samples, which is no sum over them then"
                )
            self.check_no_data(nested((args, kwargs)))
            return func(*args, **kwargs), SUM
        if not torch.compiler.is_compiling():
            self._note(args, kwargs)
        try:
            return call_layer(self, name, func, args, kwargs)
        except Unproven as reason:
            why = str(reason)
        if self.loop is not None:
            return self._on_loop(name, func, args, kwargs, why)
        raise self._refused(name, args, kwargs, why)

    def check_no_data(self, terms: Sequence[Tensor]) -> None:
        """Raises where a term of the loss is a batch that nobody knows the tasks of."""
        for x in terms:
            tag = self.tag(x)
            if tag.kind == PARAM and tag.why:
                raise ValueError(
                    f"one_pass: a term of the loss comes from parameters and data without tasks: {tag.why}. Was it "
                    "made inside the block, or does it lie along another dimension than batch_dim (bank.samples(x, "
                    "dim))? Samples of no task have the id -1. bank.constant(x): the term goes to .grad, outside the "
                    "bank"
                )

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The call itself. A tensor that it writes into keeps what was known of it, though it may get a graph now."""
        first = args[0] if args and isinstance(args[0], Tensor) and args[0] not in self.rows else None
        if first is None:
            return func(*args, **kwargs)
        before = self.tag(first)
        out = func(*args, **kwargs)
        if out is first or writes(func):
            self.mark(first, before)
        return out

    def _on_samples(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """No parameter of the bank takes part."""
        if not is_known(name) and in_python(func) and not torch.compiler.is_compiling() and func not in self._open:
            self._open.add(func)
            try:
                out = self.inside(func, args, kwargs)
            finally:
                self._open.discard(func)
            return out, [self.tag(x) for x in nested(out)]
        training = name == "batch_norm" and argument(args, kwargs, 5, "training", False)
        out = self.run(func, args, kwargs)
        if training and any(x.requires_grad for x in nested(out)):
            self.meet_shared_statistics()
        if training:
            kwargs = {**kwargs, "training": False}
            args = args[:5]
        if name in _SHAPES and writes(func):
            return out, unknown(f"{name}_ changes the shape of a tensor in place")
        tags = tag_of_result(name, args, kwargs, out, self.tag)
        if self.bounded and isinstance(tags, Tag) and tags.kind in (TOTAL, MIXING) and out.requires_grad:
            out = func(*replaced(args, self.bound), **replaced(kwargs, self.bound))
        return out, tags

    def bound(self, x: Tensor) -> Tensor:
        """A tensor of samples at the place where it flows into a loss."""
        tag = self.tag(x)
        if tag.kind != SAMPLES or not x.requires_grad:
            return x
        place = autograd.Place()
        self.boundaries.append((x, tag, place))
        return autograd.Boundary.apply(x, place)

    def _on_parameters(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Parameters and constants alone."""
        random = name in RANDOM and not _is_identity(name, args, kwargs)
        if random or name in _ATTENTION:
            found = self._on_copies(func, args, kwargs)
            if found is not None:
                return found
        out = func(*args, **kwargs)
        results = nested(out)
        data = ""
        for x in nested((args, kwargs)):
            tag = self.tag(x)
            if tag.kind == CONST and tag.why and x.dim():
                raise self._refused(name, args, kwargs, f"it meets what depends on several samples: {tag.why}")
            if tag.kind == PARAM and tag.why:
                data = tag.why
            elif tag.kind == CONST and name in _TAKES_DATA and x.dim() and not self._is_constant(x):
                data = f"{name} of a tensor of shape {list(x.shape)} that carries no samples"
        if name == "setitem" and args[0].requires_grad:
            raise self._refused(name, args, kwargs, "a value computed from parameters is written into another tensor")
        if not any(x.requires_grad for x in results):
            return out, CONSTANT
        if random:
            raise self._refused(name, args, kwargs, f"{name} draws random numbers, which can't be drawn twice alike")
        if any(out is x for x in nested((args, kwargs))):
            if not writes(func):  # such as flatten of what is flat
                return out, self.tag(out)
            raise self._refused(name, args, kwargs, f"{name} changes in place what was computed from parameters")
        recipe = Recipe(func, args, kwargs)
        if isinstance(out, Tensor):
            return out, Tag(PARAM, recipe=Computed(recipe, 0), why=data)
        return out, [Tag(PARAM, recipe=Computed(recipe, k), why=data) for k in range(len(results))]

    def _on_copies(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What was copied for every sample, such as queries, before a call that is not the same for each row of a bank:
        each sample's copy is its own from here on. None: there is nothing of the kind."""
        n = len(self.samples)
        if n < 2 or torch.compiler.is_compiling():
            return None
        lifted: dict[Tensor, Tensor] = {}
        for x in nested((args, kwargs)):
            if self.tag(x).kind != PARAM or x in lifted:
                continue
            axes = [d for d in range(x.dim()) if x.shape[d] == n and copied(self, x, d)]
            if len(axes) == 1:
                lifted[x] = lift(self, x, x.dim() - axes[0], Tag(SAMPLES, axes[0], self.samples))
        if not lifted:
            return None
        return self.call(func, replaced(args, lambda x: lifted.get(x, x)), replaced(kwargs, lambda x: lifted.get(x, x)))

    def _is_constant(self, x: Tensor) -> bool:
        """Whether it is known to be no batch: a buffer, a parameter outside the bank, or named by `bank.constant`."""
        found = getattr(x, ATTRIBUTE, None)
        named = found is not None and found[0] is self.samples and found[1] == NAMED
        return named or x in self.constants or isinstance(x, nn.Parameter)

    def _on_loop(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], why: str) -> tuple[Any, Any]:
        """A call whose parameters get their rows from a backward pass per task."""
        assert self.loop is not None
        if not is_known(name):
            raise self._refused(name, args, kwargs, why, loop=False)
        args, kwargs = replaced(args, self._leaf), replaced(kwargs, self._leaf)
        out = func(*args, **kwargs)
        tags = tag_of_result(name, args, kwargs, out, self._parameters_are_constant)
        for t in tags if isinstance(tags, list) else [tags]:
            if t.kind != SAMPLES:
                raise self._refused(name, args, kwargs, t.why or f"{name} sums over the samples", loop=False)
        return out, tags

    def _leaf(self, x: Tensor) -> Tensor:
        if x in self.rows:
            assert self.loop is not None
            self.looped[x] = True
            return self.loop[x]
        if self.tag(x).kind == PARAM:
            computed: Computed = self.tag(x).recipe
            recipe = computed.recipe
            out = recipe.func(*replaced(recipe.args, self._leaf), **replaced(recipe.kwargs, self._leaf))
            return nested(out)[computed.pick]
        return x

    def _parameters_are_constant(self, x: Tensor) -> Tag:
        tag = self.tag(x)
        return CONSTANT if tag.kind == PARAM or (tag.kind == UNKNOWN and x.grad_fn is not None) else tag

    def _hand_on(self, func: Any, name: str, args: Any, out: Any, tags: Any) -> None:
        if name == "setitem":
            self.mark(args[0], tags)
            written = args[0]
        else:
            results = nested(out)
            if isinstance(tags, Tag):
                for x in results:
                    self.mark(x, tags)
            else:
                for x, t in zip(results, tags, strict=True):
                    self.mark(x, t)
            written = out if args and out is args[0] else None
        if isinstance(written, Tensor) and not torch.compiler.is_compiling():
            self._written(name, written)

    def _written(self, name: str, x: Tensor) -> None:
        """What is written into a view changes its base."""
        base = x._base
        if base is None or base is x:
            return
        tag, before = self.tag(x), self.tag(base)
        if tag.kind == CONST and before.kind == CONST and before.recipe is not None:
            self.mark(base, CONSTANT)  # no longer an arange
        if tag.kind == CONST or (tag.kind == SAMPLES == before.kind and tag.samples.key == before.samples.key):
            return
        self.mark(base, unknown(f"{name} wrote into a view of it"))

    def _note(self, args: Any, kwargs: Any) -> None:
        """Which samples the parameters meet here."""
        tensors = nested((args, kwargs))
        parts = [t.samples for t in map(self.tag, tensors) if t.kind == SAMPLES]
        for p in tensors:
            if self.tag(p).kind == PARAM:
                for leaf in self._leaves(p):
                    self.met.setdefault(leaf, []).extend(parts)

    def _leaves(self, p: Tensor) -> list[Tensor]:
        """The parameters that something was computed from."""
        if p in self.rows:
            return [p]
        recipe = self.tag(p).recipe.recipe
        return [leaf for x in nested((recipe.args, recipe.kwargs)) if self.tag(x).kind == PARAM
                for leaf in self._leaves(x)]  # fmt: skip

    def _refused(self, name: str, args: Any, kwargs: Any, why: str, *, loop: bool = True) -> ValueError:
        found = nested((args, kwargs))
        leaves = [leaf for p in found if self.tag(p).kind == PARAM for leaf in self._leaves(p)]
        which = describe(leaves[0], self.names[leaves[0]]) if leaves else "a parameter"
        ways = (
            "Tensors made inside the block count as constants; bank.samples(x, dim) and bank.constant(x) tell what a "
            "tensor carries"
        )
        if loop and self.loop is None and is_known(name):
            ways += "; fallback='loop' computes such parameters by a backward pass per task"
        ways += "; shared= or fastmtl.mark_per_task leaves a parameter out of the bank"
        return ValueError(f"one_pass: {which} meets the samples in {name}, and its rows can't be told: {why}. {ways}")


_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))

_SHAPES = frozenset(("squeeze", "unsqueeze", "transpose", "t", "resize", "resize_as", "set", "as_strided", "data.set"))

_OWN_NAMES = {"axis": "dim", "keepdims": "keepdim"}

# of a sum over samples and of parameters alone these make a sum
_SUMS = frozenset(("add", "sub", "stack", "cat", "sum"))


def _graph(x: Tensor) -> Any:
    """What tells the graphs of a tensor apart, without holding one."""
    if torch.compiler.is_compiling():
        return x.requires_grad
    return None if x.grad_fn is None else x.grad_fn._sequence_nr()


def _same_graph(x: Tensor, before: Any) -> bool:
    if before is True or before is False or torch.compiler.is_compiling():  # a compiled graph made or takes it
        return before is not False or not x.requires_grad
    return before == _graph(x)


def _is_identity(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Dropout that drops nothing."""
    if "dropout" not in name:
        return False
    p, training = argument(args, kwargs, 1, "p", 0.5), argument(args, kwargs, 2, "training", True)
    return training is False or p == 0


def _fresh(x: Tensor) -> Tensor:
    """torch.compile lets one of several results have no attributes."""
    return x.view_as(x)


def _no_override(*args: Any) -> bool:
    return False


_plain: dict[Any, Any] = {}


def _without_override(func: Any) -> Any:
    """A copy of a function that does not ask for overrides, so that its body runs."""
    copy = _plain.get(func)
    if copy is None:
        scope = dict(func.__globals__)
        scope.update(dict.fromkeys((n for n in scope if n.startswith("has_torch_function")), _no_override))
        copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _plain[func] = copy
    return copy
