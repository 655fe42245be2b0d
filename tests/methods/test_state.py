"""State by the names of the tasks, and what a method sees beside the Gram matrix."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor

from fastmtl import methods, ops
from fastmtl.core.gradient_rows import GradientRows
from fastmtl.methods.base import NEEDS, check_needs, needs_of
from fastmtl.methods.state import Field, NamedState, StatefulMethod
from fastmtl.ops.gradients.combine import combine_into
from fastmtl.ops.gradients.gram import gram_rows

CPU = torch.device("cpu")
F64 = torch.float64


def state() -> NamedState:
    return NamedState(count=Field(0, 0.0), mean=Field(1, 5.0), rho=Field(2, -1.0))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


# --- NamedState


def test_first_values_are_the_initial_ones():
    found = state().read(["a", "b", "c"], CPU)
    assert found["count"].shape == () and found["count"] == 0
    assert found["mean"].tolist() == [5] * 3
    assert found["rho"].shape == (3, 3) and (found["rho"] == -1).all()
    assert all(x.dtype == F64 for x in found.values())


def test_values_are_found_by_name_in_any_order():
    s = state()
    rho = torch.arange(9, dtype=F64).reshape(3, 3)
    s.keep(["a", "b", "c"], None, count=numbers(7)[0], mean=numbers(1, 2, 3), rho=rho)
    found = s.read(["c", "new", "a"], CPU)
    assert found["count"] == 7
    assert found["mean"].tolist() == [3, 5, 1]
    assert found["rho"].tolist() == [[8, -1, 6], [-1, -1, -1], [2, -1, 0]]
    s.keep(["new", "b"], None, mean=numbers(10, 20), rho=numbers(1, 2, 3, 4).reshape(2, 2))
    found = s.read(["a", "b", "c", "new"], CPU)
    assert found["mean"].tolist() == [1, 20, 3, 10]
    assert found["rho"].tolist() == [[0, 1, 2, -1], [3, 4, 5, 3], [6, 7, 8, -1], [-1, 2, -1, 1]]


def test_absent_tasks_keep_what_they_had():
    s = state()
    s.keep(["a", "b", "c"], None, mean=numbers(1, 2, 3), rho=torch.zeros(3, 3))
    present = torch.tensor([True, False, True])
    nan = math.nan
    s.keep(["a", "b", "c"], present, mean=numbers(10, nan, 30), rho=torch.full((3, 3), 4.0))
    found = s.read(["a", "b", "c"], CPU)
    assert found["mean"].tolist() == [10, 2, 30]
    assert found["rho"].tolist() == [[4, 0, 4], [0, 0, 0], [4, 0, 4]]


def test_a_step_that_overflowed_leaves_the_state():
    s = state()
    s.keep(["a", "b"], None, mean=numbers(1, 2))
    for bad in (math.nan, math.inf, -math.inf):
        s.keep(["a", "b"], None, mean=numbers(8, bad), count=numbers(3)[0])
        found = s.read(["a", "b"], CPU)
        assert found["mean"].tolist() == [1, 2] and found["count"] == 3  # each field by itself


def test_what_is_read_is_not_what_is_kept():
    s = state()
    s.read(["a"], CPU)["mean"].fill_(9.0)
    assert s.read(["a"], CPU)["mean"].tolist() == [5]


def test_values_are_written_in_place():
    s = state()
    s.read(["a", "b"], CPU)
    before = {key: x.data_ptr() for key, x in zip(("count", "mean", "rho"), s.tensors(["a", "b"], CPU), strict=True)}
    s.keep(["b", "a"], None, count=numbers(1)[0], mean=numbers(1, 2), rho=torch.ones(2, 2))
    saved = s.state_dict()
    s.reset()
    s.load_state_dict(saved, "it")
    after = {key: x.data_ptr() for key, x in zip(("count", "mean", "rho"), s.tensors(["a"], CPU), strict=True)}
    assert before == after
    assert s.read(["a", "b"], CPU)["mean"].tolist() == [2, 1]


def test_saved_and_loaded():
    s = state()
    s.keep(["a", "b"], None, count=numbers(4)[0], mean=numbers(1, 2), rho=torch.full((2, 2), 3.0))
    file = io.BytesIO()
    torch.save(s.state_dict(), file)
    s.keep(["a", "b"], None, mean=numbers(8, 8))  # what was saved is a copy
    file.seek(0)
    other = state()
    other.read(["z"], CPU)
    other.load_state_dict(torch.load(file, weights_only=True), "it")
    found = other.read(["b", "c"], CPU)
    assert found["count"] == 4 and found["mean"].tolist() == [2, 5] and found["rho"][0, 0] == 3
    assert other.names == ["a", "b", "c"]


def test_reset_and_an_empty_state():
    s = state()
    assert s.state_dict() == {}
    s.keep(["a"], None, mean=numbers(1))
    s.reset()
    assert s.read(["a"], CPU)["mean"].tolist() == [5]
    s.keep(["a"], None, mean=numbers(1))
    s.load_state_dict({}, "it")
    assert s.read(["a"], CPU)["mean"].tolist() == [5]


def test_what_is_no_state_is_refused():
    s, good = state(), state()
    good.read(["a", "b"], CPU)
    saved = good.state_dict()
    for bad, text in (
        ({"names": ["a"]}, "expected that of it, names, count, mean, rho, got names"),
        ({**saved, "more": 1}, "got names, count, mean, rho, more"),
        ({**saved, "names": ["a", "a"]}, "expected different names of tasks"),
        (
            {**saved, "mean": torch.zeros(3)},
            r"expected mean of shape \[2\], .*got torch.float32 of \[3\]",
        ),
        ({**saved, "rho": [1.0]}, r"expected rho of shape \[2, 2\], floating point, got list"),
        ({**saved, "count": torch.zeros((), dtype=torch.int64)}, "torch.int64"),
    ):
        with pytest.raises(ValueError, match=text):
            s.load_state_dict(bad, "it")
    assert s.state_dict() == {}


def test_no_value_is_read_on_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        s = state()
        s.read(["a", "b"], CPU)
        s.keep(["b", "c"], torch.zeros(2, dtype=torch.bool), mean=torch.zeros(2), rho=torch.zeros(2, 2))
        assert s.read(["c", "a"], CPU)["rho"].shape == (2, 2)


# --- a method with state, called by hand


class Counting(StatefulMethod):
    """Counts the steps that each task was present in."""

    def __init__(self) -> None:
        super().__init__(steps=Field(1, 0.0))

    def _weigh(self, gram: Tensor, seen: methods.Seen, present: Tensor | None) -> Tensor:
        w = self._state.read(seen.names, gram.device)["steps"] + 1
        self._state.keep(seen.names, present, steps=w)
        return w


def test_weights_by_hand_are_of_tasks_by_position():
    method, gram = Counting(), torch.eye(3)
    assert method.weights(gram).tolist() == [1, 1, 1]
    assert method.weights(gram, present=torch.tensor([True, False, True])).tolist() == [2, 0, 2]
    assert method.weigh(gram, methods.Seen(["2", "1", "x"], [True] * 3)).tolist() == [3, 2, 1]
    assert method(torch.ones(3, 2)).tolist() == [10, 10]  # "0" and "1" were there twice, "2" three times
    assert method.state_dict()["names"] == ["0", "1", "2", "x"]
    other = Counting()
    other.load_state_dict(method.state_dict())
    assert other.weights(gram).tolist() == method.weights(gram).tolist()
    other.reset()
    assert other.weights(gram).tolist() == [1, 1, 1]


def test_methods_without_state_have_an_empty_one():
    method = methods.MGDA()
    assert method.state_dict() == {} and method.state_tensors(["a"], CPU) == []
    method.load_state_dict({})
    method.reset()
    with pytest.raises(ValueError, match="state: MGDA keeps none, got names"):
        method.load_state_dict({"names": []})


# --- what a method needs


class Doubled(methods.Method):
    """Twice the sum, written by itself."""

    needs = frozenset({"gradients"})

    def update(self, rows: GradientRows, out: list[Tensor], seen: methods.Seen) -> tuple[Tensor, None]:
        gram = gram_rows(rows)
        combine_into(torch.full((rows.num_tasks,), 2.0, dtype=F64), rows, out)
        return gram, None


class Greedy(StatefulMethod):
    needs = frozenset({"losses", "second_batch"})

    def _weigh(self, gram: Tensor, seen: methods.Seen, present: Tensor | None) -> Tensor:
        return seen.losses + seen.second.diagonal()


def test_a_method_of_the_gradients_is_called_on_them():
    g = torch.randn(3, 7)
    torch.testing.assert_close(Doubled()(g), 2 * g.sum(0))
    lists = [[row[:3], None, row[3:].clone()] for row in g]
    first, missing, last = Doubled()(lists)
    assert missing is None
    torch.testing.assert_close(torch.cat([first, last]), 2 * g.sum(0))
    with pytest.raises(TypeError, match=r"Doubled: needs the task gradients themselves: .* call it on the gradients"):
        Doubled().weights(torch.eye(3))
    with pytest.raises(TypeError, match="Doubled: has no weights of a Gram matrix"):
        methods.weights_of(Doubled(), torch.eye(2), methods.Seen(["a", "b"], [True, True]))


def test_a_method_that_needs_more_says_so():
    gram, names = torch.eye(2), ["a", "b"]
    seen = methods.Seen(names, [True, True], losses=numbers(1, 2), second=torch.eye(2, dtype=F64))
    assert Greedy().weigh(gram, seen).tolist() == [2, 3]
    text = "method Greedy: needs the tasks' losses and the task gradients of a second.* call weigh"
    with pytest.raises(TypeError, match=text):
        Greedy().weights(gram)
    with pytest.raises(TypeError, match=text):
        Greedy()(torch.ones(2, 3))
    with pytest.raises(ValueError, match="seen: method Greedy needs the tasks' losses"):
        Greedy().weigh(gram, seen._replace(losses=None))
    with pytest.raises(ValueError, match=r"second, independent batch as \[2, 2\] on cpu, got \[3, 3\]"):
        Greedy().weigh(gram, seen._replace(second=torch.eye(3)))
    with pytest.raises(ValueError, match=r"losses as \[2\] on cpu, got \[2\] on meta"):
        Greedy().weigh(gram, seen._replace(losses=torch.ones(2, device="meta")))
    with pytest.raises(ValueError, match="expected 2 tasks as in the Gram matrix, got 1 names and 2 in present"):
        Greedy().weigh(gram, seen._replace(names=["a"]))
    with pytest.raises(TypeError, match="method Sum: has no update of its own"):
        methods.Sum().update(GradientRows([], [], 2, 0), [], seen)


def test_needs_are_known_words_and_checked_by_name():
    for kind in (*methods.names.CLASSES, *(getattr(methods, name) for name in methods.names.WITH_ARGUMENTS)):
        assert kind.needs <= set(NEEDS)
    assert needs_of(lambda gram: gram[0]) == frozenset()
    check_needs(methods.Sum(), "call", {"losses": "x", "second_batch": "y", "gradients": "z"})
    with pytest.raises(ValueError, match="call: method Doubled needs the task gradients themselves: use this"):
        check_needs(Doubled(), "call", {"gradients": "use this"})


def test_the_mask_of_present_tasks_is_made_on_the_device():
    seen = methods.Seen(["a", "b"], [True, True])
    assert seen.mask(CPU) is None
    assert seen._replace(present=[True, False]).mask(CPU).tolist() == [True, False]
    here = torch.tensor([False, True])
    assert seen._replace(present=here).mask(CPU) is here


def test_a_class_derived_from_a_faster_one_keeps_its_weights():
    """`PCGrad.update` is a faster way to its weights, and no way to those of a class derived from it."""
    import fastmtl

    class Reversed(methods.PCGrad):
        def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
            return -super()._weights(gram, present)

    net = torch.nn.Linear(3, 2)
    surgery = fastmtl.backward(list(net(torch.ones(1, 3)).square()[0].unbind()), net, shared=net, method=Reversed())
    assert (surgery.weights < 0).all()
    assert (ops.pcgrad(torch.eye(2)) > 0).all()
