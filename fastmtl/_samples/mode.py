"""The torch function mode that sees every call of a forward pass, and takes the parameters of a bank apart by task."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastmtl._marks import describe
from fastmtl._samples.layers import Unproven, Weight, call_layer
from fastmtl._samples.names import PLAIN, RANDOM, in_python, name_of, writes
from fastmtl._samples.rules import argument, is_known, tag_of_result
from fastmtl._samples.tags import (
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
)
from fastmtl.ops import _per_task

OF_PARAMETERS = Tag(PARAM)


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
        self.boundaries: list[tuple[Tensor, Tag, _per_task.Place]] = []
        self.mixed = False  # a layer that mixes samples was met, and accepted
        self.looped: dict[Tensor, bool] = {}
        self.met: dict[Tensor, list[Samples]] = {}  # which parts of the batch each parameter saw; () all of it
        self.uses: dict[Tensor, int] = {}
        self.running = False  # a backward pass
        self.seen = False  # a tensor from outside carried samples
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
            tag: Tag = found[1]
            if tag.kind in (TOTAL, MIXING, PARAM) and not x.requires_grad:
                return CONSTANT
            return tag
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
        if isinstance(x, nn.Parameter):  # written by an optimizer inside the block: nothing stays on the model
            return
        setattr(x, ATTRIBUTE, (self.samples, tag, _graph(x)))

    # --- what layers ask for

    def weight(self, p: Tensor) -> Weight:
        """A parameter of the bank, what was computed from some, or a tensor with its own gradient."""
        if p in self.rows:
            self._use(p)
            return Weight(self.values[p], _per_task.STACKED, (self.rows[p],))
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
        tags = tag_of_result(name, args, kwargs, out, self.tag)
        if self.bounded and isinstance(tags, Tag) and tags.kind in (TOTAL, MIXING) and out.requires_grad:
            out = func(*replaced(args, self._bound), **replaced(kwargs, self._bound))
        return out, tags

    def _bound(self, x: Tensor) -> Tensor:
        """A tensor of samples at the place where it flows into a loss."""
        tag = self.tag(x)
        if tag.kind != SAMPLES or not x.requires_grad:
            return x
        place = _per_task.Place()
        self.boundaries.append((x, tag, place))
        return _per_task.Boundary.apply(x, place)

    def _on_parameters(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Parameters and constants alone."""
        out = func(*args, **kwargs)
        results = nested(out)
        if name == "setitem" and args[0].requires_grad:
            raise self._refused(name, args, kwargs, "a value computed from parameters is written into another tensor")
        if not any(x.requires_grad for x in results):
            return out, CONSTANT
        if name in RANDOM:
            raise self._refused(name, args, kwargs, f"{name} draws random numbers, which can't be drawn twice alike")
        if any(out is x for x in nested((args, kwargs))):
            if not writes(func):  # such as flatten of what is flat
                return out, self.tag(out)
            raise self._refused(name, args, kwargs, f"{name} changes in place what was computed from parameters")
        recipe = Recipe(func, args, kwargs)
        if isinstance(out, Tensor):
            return out, Tag(PARAM, recipe=Computed(recipe, 0))
        return out, [Tag(PARAM, recipe=Computed(recipe, k)) for k in range(len(results))]

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


# of a sum over samples and of parameters alone these make a sum
_SUMS = frozenset(("add", "sub", "stack", "cat", "sum"))


def _graph(x: Tensor) -> Any:
    return x.requires_grad if torch.compiler.is_compiling() else x.grad_fn


def _same_graph(x: Tensor, before: Any) -> bool:
    if before is True or before is False or torch.compiler.is_compiling():  # a compiled graph made or takes it
        return before is not False or not x.requires_grad
    return before is x.grad_fn


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
