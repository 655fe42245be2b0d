"""What a gradient method is, what it may be handed, and how one is asked for its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmtl import ops
from fastmtl.core.gradient_rows import GradientRows, bank_rows, first_of_params
from fastmtl.methods.arguments import check_mapping
from fastmtl.ops.gradients.arguments import (
    Grads,
    check_bank,
    check_gram,
    check_gram_values,
    check_present,
    is_bank,
    read_lists,
)
from fastmtl.ops.gradients.combine import with_absent

# what a method may need beside the Gram matrix, in words for an error
NEEDS = {
    "losses": "the tasks' losses",
    "second_batch": "the task gradients of a second, independent batch",
    "gradients": "the task gradients themselves",
}


def as_it_is(x: Tensor) -> Tensor:
    return x


class Seen(NamedTuple):
    """What a surgery hands a method beside the Gram matrix. Tensors are on the device of the Gram matrix.

    Attributes:
        names: of the T tasks, no two of which are equal. State is kept by them.
        present: which tasks take part; `[T]` bool where the device alone knows.
        losses: `[T]` float64, without the loss scale, 0 for absent tasks; with several ranks their mean over the ranks,
            as of the gradients. None unless the method needs them.
        second: `[T, T]` floating point, without the loss scale: inner products `g_i . g'_j` with the task gradients g'
            of a second, independent batch. None unless the method needs them.
        loss_scale: what the rows that `Method.update` gets are multiplied by; None: by nothing. Nothing else here has
            it.
        first: the first rank's tensor, where several ranks ask at once: for random numbers, which must be equal on all.
            The same tensor else. Float64 only; every rank must come to it.
        total: `[T, T]` sum over the ranks of Gram matrices of the columns that each of them has; the same matrix where
            all have every column. Every rank must come to it.
    """

    names: Sequence[str]
    present: Sequence[bool] | Tensor
    losses: Tensor | None = None
    second: Tensor | None = None
    loss_scale: float | Tensor | None = None
    first: Callable[[Tensor], Tensor] = as_it_is
    total: Callable[[Tensor], Tensor] = as_it_is

    def mask(self, device: torch.device) -> Tensor | None:
        """`present` as a `[T]` bool tensor on that device; None if all are present. Nothing waits for the host."""
        return self.present if isinstance(self.present, Tensor) else _on_device(self.present, device)


def check_names(seen: Seen) -> None:
    """Raises TypeError where it is no `Seen`, or has names that are no strings; ValueError where two tasks have one."""
    if not isinstance(seen, Seen):
        raise TypeError(f"seen: expected a methods.Seen, got {type(seen).__name__}")
    for name in seen.names:
        if not isinstance(name, str):
            raise TypeError(f"seen: expected strings as names of the tasks, got {type(name).__name__}")
    if len(set(seen.names)) != len(seen.names):
        raise ValueError(f"seen: expected different names of the tasks, got {list(seen.names)}")


def seen_by_position(num_tasks: int, present: Tensor | None = None) -> Seen:
    """What a method sees that is called by hand: tasks named "0" to "T-1"."""
    return Seen([str(t) for t in range(num_tasks)], [True] * num_tasks if present is None else present)


class Method:
    """A method that turns T task gradients into one update.

    Most make weights w of the Gram matrix, and the update is `w^T G`: a subclass implements `_weights`. Everything
    stays on the device of the Gram matrix: nothing waits for the host, so that a step can be captured in a CUDA graph.

    Attributes:
        needs: what it must be handed beside the Gram matrix: any of `"losses"`, `"second_batch"` and `"gradients"`. Who
            calls it raises where that is not there. With `"losses"` or `"second_batch"` a subclass overrides `weigh`;
            with `"gradients"` it overrides `update`, and has no weights of its own.
        by_group: whether it can be asked for groups of parameters apart, one after the other.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_group: bool = True

    def weights(self, gram: Tensor, *, present: Tensor | None = None) -> Tensor:
        """The weight of each task.

        Args:
            gram: `[T, T]` floating-point Gram matrix, T from 1 to 128.
            present: `[T]` bool, on the device of `gram`: tasks that take part. The others get weight 0 and are
                not in the problem; what `gram` holds in their rows and columns is not looked at. None: all.

        Returns:
            `[T]` float64, on the device of `gram`. Where no task is present all weights are 0, and what the method
            keeps stays as it is.

        Raises:
            TypeError: dtypes other than the above; a method that needs more than a Gram matrix.
            ValueError: shapes or devices that do not agree.

        A method with state takes the tasks for those named "0" to "T-1".
        """
        m = self._read(gram, present)
        if self.needs:
            raise self._needs_more()
        w = self._weights(m, present)
        return w if present is None else torch.where(present, w, 0.0)

    def weigh(self, gram: Tensor, seen: Seen) -> Tensor:
        """`weights`, with all that a surgery knows: what a surgery calls.

        Raises:
            ValueError: `seen` does not have what the method needs, or of other tasks than `gram`.
            TypeError: a method whose update is no weighted sum.
        """
        self._check_seen(gram, seen)
        return self.weights(gram, present=seen.mask(gram.device))

    def weigh_groups(self, grams: Tensor, seen: Sequence[Seen]) -> Tensor:
        """`weigh` for each of L groups of parameters, in turn.

        Args:
            grams: `[L, T, T]` Gram matrices.
            seen: of each group. They differ in `names` and in `second` alone.

        Returns:
            `[L, T]` float64, 0 for absent tasks.

        A method that solves for all of them at once overrides it. Where its class has an `update` too, that is not
        called for groups then.
        """
        return torch.stack([weights_of(self, m, x) for m, x in zip(grams.unbind(0), seen, strict=True)])

    def update(self, rows: GradientRows, out: Sequence[Tensor], seen: Seen) -> tuple[Tensor, Tensor | None]:
        """The whole method on these task gradients, of a method that needs them (or is faster with them).

        Args:
            rows: the T task gradients, multiplied by `seen.loss_scale` (`rows.by_param()` has them by parameter and
                task). Those of tasks that are not present are missing, or have any value. With several ranks that have
                columns of their own there may be none at all.
            out: memory for the update, one tensor for each parameter that has a gradient, in order: of its shape,
                dtype and dense layout. It may be the memory of the first of that parameter's task gradients, and of no
                other. What is written is multiplied by `seen.loss_scale`, as the rows are.

        Returns:
            The `[T, T]` Gram matrix of the rows, or of what the method keeps in their place (running averages); and the
            weights `[T]` float64 with which their sum is the update, or None if the update is no such sum.
        """
        if "gradients" in self.needs:
            raise self._lacks("update(rows, out, seen)")
        raise TypeError(f"method {type(self).__name__}: has no update of its own, but weights")

    def __call__(self, grads: Grads) -> Tensor | list[Tensor | None]:
        """The update itself: `[T, P] -> [P]`, or T lists of n tensors (None: zero) -> a list of n tensors.

        Raises what `fastmtl.ops.gram` raises for `grads`, and TypeError for a method that needs losses or a second
        batch.
        """
        if "gradients" not in self.needs:
            return ops.combine(self.weights(ops.gram(grads)), grads)
        if self.needs != {"gradients"}:
            raise self._needs_more()
        return self._updated(grads)

    def state_dict(self) -> dict[str, Any]:
        """What the method keeps from one call to the next, for `torch.save`: nothing, for most."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            TypeError, ValueError: not the state of such a method. Nothing has changed then.
        """
        self.check_state(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises TypeError or ValueError where `load_state_dict` would not take this, and changes nothing: a method
        around another one asks it before either loads. A subclass that keeps something overrides it."""
        check_mapping(state, "state")
        if state and type(self).load_state_dict is Method.load_state_dict:
            raise ValueError(f"state: {type(self).__name__} keeps none, got {', '.join(map(str, state))}")

    def reset(self) -> None:
        """Forgets what it keeps from one call to the next."""

    def state_tensors(self, names: Sequence[str], device: torch.device) -> list[Tensor]:
        """The small float64 tensors of the state, made ready for these tasks. With several ranks they are made the
        first rank's, in place, at each surgery."""
        return []

    def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
        """`[T, T]` float64 with zeros for absent tasks -> `[T]` float64; absent entries are overwritten."""
        raise self._lacks("_weights(gram, present)")

    def _read(self, gram: Tensor, present: Tensor | None) -> Tensor:
        """`gram` in float64 with zeros for absent tasks, checked."""
        check_gram(gram)
        m = gram.to(torch.float64)
        if present is not None:
            check_present(present, gram)
        check_gram_values(gram, present)
        if present is None:
            return m
        return torch.where(present[:, None] & present, m, 0.0)

    def _check_seen(self, gram: Tensor, seen: Seen) -> None:
        """Raises where this is not what `weigh` takes."""
        check_gram(gram)
        if "gradients" in self.needs:
            name = type(self).__name__
            raise TypeError(f"method {name}: has no weights of a Gram matrix, but makes its update of the gradients")
        self._check_handed(seen, gram.shape[0], "in the Gram matrix", gram.device)

    def _check_handed(self, seen: Seen, num_tasks: int, where: str, device: torch.device | None = None) -> None:
        """Raises where `seen` is not of these tasks, or lacks what the method needs. device: None is any."""
        check_names(seen)
        if len(seen.names) != num_tasks or len(seen.present) != num_tasks:
            raise ValueError(
                f"seen: expected {num_tasks} tasks as {where}, got {len(seen.names)} names and "
                f"{len(seen.present)} in present"
            )
        for need, x, shape in (
            ("losses", seen.losses, (num_tasks,)),
            ("second_batch", seen.second, (num_tasks, num_tasks)),
        ):
            if need not in self.needs:
                continue
            name = f"seen: method {type(self).__name__}"
            if x is None:
                raise ValueError(f"{name} needs {NEEDS[need]}")
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected {NEEDS[need]} as a tensor, got {type(x).__name__}")
            if x.shape != shape or (device is not None and x.device != device):
                on = "" if device is None else f" on {device}"
                raise ValueError(
                    f"{name}: expected {NEEDS[need]} as {list(shape)}{on}, got {list(x.shape)} on {x.device}"
                )

    def _lacks(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"method {type(self).__name__}: has no {what}, which a subclass implements")

    def _needs_more(self) -> TypeError:
        name = type(self).__name__
        missing = [NEEDS[need] for need in NEEDS if need in self.needs]
        ways = "use it in fastmtl.backward, a GradientBank or one_pass"
        if "gradients" not in self.needs:
            ways += ", or call weigh(gram, methods.Seen(...))"
        elif self.needs == {"gradients"}:
            ways += ", or call it on the gradients"
        return TypeError(f"method {name}: needs {' and '.join(missing)}: {ways}")

    def _updated(self, grads: Grads) -> Tensor | list[Tensor | None]:
        """`update` in new memory."""
        if is_bank(grads):
            check_bank(grads)
            out = grads.new_empty(grads.shape[1:])
            with torch.no_grad():
                self.update(bank_rows(grads.detach()), [out], seen_by_position(grads.shape[0]))
            return out
        rows = read_lists(grads)
        columns = [torch.empty_like(x) for x in first_of_params(rows.tensors, rows.index, rows.num_params).values()]
        with torch.no_grad():
            rows = rows._replace(tensors=[x.detach() for x in rows.tensors])
            self.update(rows, columns, seen_by_position(rows.num_tasks))
        return with_absent(columns, rows.index, rows.num_params)


Weighting: TypeAlias = Method | Callable[[Tensor], Tensor]


def check_inner_state(method: Weighting, state: Mapping[str, Any], who: str) -> None:
    """Raises where this is not the state of the method that `who` is around; changes nothing."""
    if isinstance(method, Method):
        method.check_state(state)
        return
    check_mapping(state, f"state: {who}: method")
    if state:
        got = ", ".join(map(str, state))
        raise ValueError(f"state: {who}: expected none of {name_of(method)}, a callable, which keeps none, got {got}")


def needs_of(method: Weighting) -> frozenset[str]:
    """What a method needs beside the Gram matrix; a callable needs nothing."""
    return method.needs if isinstance(method, Method) else frozenset()


def check_needs(method: Weighting, call: str, missing: Mapping[str, str]) -> None:
    """Raises ValueError where the method needs what is missing in this call: need -> how it is supplied."""
    for need, way in missing.items():
        if need in needs_of(method):
            raise ValueError(f"{call}: method {type(method).__name__} needs {NEEDS[need]}: {way}")


def weights_of(method: Weighting, gram: Tensor, seen: Seen) -> Tensor:
    """Weights `[T]` float64 of the tasks, 0 for absent ones, from a `Method` or any callable `[T, T] -> [T]`.

    A callable sees the Gram matrix of the present tasks only, so that the host must know them. What comes back is
    checked. Where the host knows that no task is present the method is not asked: all weights are 0.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: the wrong length or device.
    """
    num_tasks = gram.shape[0]
    if isinstance(method, Method):
        if not isinstance(seen.present, Tensor) and not any(seen.present):
            return gram.new_zeros(num_tasks, dtype=torch.float64)
        w = method.weigh(gram, seen)
        _check_weights(method, w, num_tasks, gram.device)
        return w.to(torch.float64)
    present = seen.present.tolist() if isinstance(seen.present, Tensor) else seen.present
    tasks = [t for t, here in enumerate(present) if here]
    out = gram.new_zeros(num_tasks, dtype=torch.float64)
    if not tasks:
        return out
    if len(tasks) == num_tasks:
        check_gram_values(gram)
        w = method(gram)
        _check_weights(method, w, num_tasks, gram.device)
        return w.to(torch.float64)
    # a list of rows, and not an index: indexing with a Python list copies it to the device, and waits
    part = torch.stack([torch.stack([gram[s, t] for t in tasks]) for s in tasks])
    check_gram_values(part)
    w = method(part)
    _check_weights(method, w, len(tasks), gram.device)
    for k, t in enumerate(tasks):
        out[t] = w[k]
    return out


def group_weights_of(method: Weighting, grams: Tensor, seen: Sequence[Seen]) -> Tensor:
    """`weights_of` for each of L groups: `[L, T]` float64. Raises what that does."""
    if not isinstance(method, Method):
        return torch.stack([weights_of(method, m, x) for m, x in zip(grams.unbind(0), seen, strict=True)])
    present = seen[0].present
    if not isinstance(present, Tensor) and not any(present):
        return grams.new_zeros(grams.shape[:2], dtype=torch.float64)
    w = method.weigh_groups(grams, seen)
    if not isinstance(w, Tensor) or w.shape != grams.shape[:2] or w.device != grams.device:
        got = f"{list(w.shape)} on {w.device}" if isinstance(w, Tensor) else type(w).__name__
        raise ValueError(
            f"method {name_of(method)}: expected weights {list(grams.shape[:2])} on {grams.device}, got {got}"
        )
    return w.to(torch.float64)


def _on_device(present: Sequence[bool], device: torch.device) -> Tensor | None:
    """`[T]` bool written by fills on the device: a copy from the host would wait. None if all are present."""
    if all(present):
        return None
    mask = torch.ones(len(present), dtype=torch.bool, device=device)
    for t, here in enumerate(present):
        if not here:
            mask[t].fill_(False)
    return mask


def name_of(method: Weighting) -> str:
    """What errors call a method: a function by its name."""
    return repr(method) if isinstance(method, Method) else getattr(method, "__qualname__", repr(method))


def _check_weights(method: Weighting, weights: Tensor, count: int, device: torch.device) -> None:
    who = f"method {name_of(method)}"
    if not isinstance(weights, Tensor):
        raise TypeError(f"{who}: expected a tensor of {count} weights, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"{who}: expected floating-point weights, got {weights.dtype}")
    if weights.shape != (count,):
        raise ValueError(f"{who}: expected {count} weights, shape [{count}], got shape {list(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"{who}: expected weights on {device}, got {weights.device}")
