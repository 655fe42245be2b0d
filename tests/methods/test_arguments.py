"""Arguments of methods, their states and their Gram matrices: what is read, and what is refused in which words."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases_backward import make
from torch import Tensor

import fastmtl
from fastmtl import methods, ops
from fastmtl.methods import Method, Seen
from fastmtl.methods.arguments import Argument, TaskNumbers, choice, read_count, read_flag, read_number

CPU, F64 = torch.device("cpu"), torch.float64

# every exported method, as it is made without more than it must have
MAKE: dict[str, Callable[[], Method]] = {
    name: found
    for name in methods.__all__
    if isinstance(found := getattr(methods, name), type) and issubclass(found, Method) and found is not Method
} | {
    "CRMOGM": lambda: methods.CRMOGM(methods.GradVac()),
    "Every": lambda: methods.Every(methods.PCD(), 2),
    "ParetoMTL": lambda: methods.ParetoMTL([[1.0, 2.0, 1.0], [2.0, 1.0, 1.0]], 0),
    "TrimmedMean": lambda: methods.TrimmedMean(1),
}


# --- numbers, counts, choices


def test_a_number_is_any_real_one():
    for x in (1, 1.0, np.float32(1), np.int64(1), Fraction(1, 1)):
        assert read_number(x, "a", least=0.0) == 1.0 and type(read_number(x, "a")) is float
    for x in (True, "1", None, [1.0], torch.tensor(1.0), 1j, np.bool_(True)):
        with pytest.raises(TypeError, match=f"^a: expected a number, got {type(x).__name__}$"):
            read_number(x, "a")


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "expected"),
    [
        ({}, [-1e300, 0.0], [math.nan, math.inf, -math.inf], "a number"),
        ({"least": 0.0}, [0.0, 5.0], [-1e-9, math.nan, math.inf], "a number from 0"),
        ({"above": 0.0}, [1e-9], [0.0, -1.0, math.nan, math.inf], "a positive number"),
        ({"least": 0.0, "below": 1.0}, [0.0, 0.999], [1.0, -0.1], "a number from 0 to below 1"),
        ({"above": 0.0, "most": 1.0}, [1.0, 1e-9], [0.0, 1.1], "a number above 0 to 1"),
        ({"least": 0.1, "most": 100.0}, [0.1, 100.0], [0.0, 101.0], "a number from 0.1 to 100"),
    ],
)
def test_bounds_of_a_number(bounds: dict[str, float], good: list[float], bad: list[float], expected: str):
    for x in good:
        assert read_number(x, "a", **bounds) == x
    for x in bad:
        with pytest.raises(ValueError, match=f"^a: expected {expected}, got {x!r}$"):
            read_number(x, "a", **bounds)


def test_counts_choices_and_flags():
    assert read_count(np.int64(3), "k") == 3 and read_count(0, "k") == 0
    for x in (1.0, True, "1", None):
        with pytest.raises(TypeError, match=f"^k: expected an integer, got {type(x).__name__}$"):
            read_count(x, "k")
    with pytest.raises(ValueError, match=r"^k: expected an integer from 1 to 4, got 5$"):
        read_count(5, "k", least=1, most=4)
    assert choice("a", "b")("b", "way") == "b"
    for x in ("c", 3, None, ["a"]):
        with pytest.raises(ValueError, match=r"^way: expected 'a', 'b' or 'c', got"):
            choice("a", "b", "c")("d" if x == "c" else x, "way")
    assert read_flag(False, "f") is False
    with pytest.raises(TypeError, match=r"^f: expected True or False, got int$"):
        read_flag(1, "f")


OUT_OF_RANGE = [
    ("CAGrad", "c", 0.3, -1.0),
    ("FairGrad", "alpha", 2.0, 0.0),
    ("NashMTL", "max_norm", 0.5, 0.0),
    ("UPGrad", "reg_eps", 1e-3, 0.0),
    ("DualProj", "reg_eps", 1e-3, 0.0),
    ("AlignedMTL", "scale", "rmse", "max"),
    ("AlignedMTL", "reduction", "sum", "max"),
    ("Krum", "selected", 2, 0),
    ("Krum", "squared", False, 0),
    ("PCGrad", "reduction", "mean", "max"),
    ("PCGrad", "include_self", True, "yes"),
    ("PCGrad", "order", torch.tensor([[1, 2], [2, 0], [0, 1]]), 3),
    ("PCGrad", "generator", torch.Generator().manual_seed(5), 3),
    ("GradVac", "order", torch.tensor([[1, 2], [2, 0], [0, 1]]), "random"),
    ("GradVac", "generator", torch.Generator().manual_seed(5), 3),
    ("RandomWeights", "generator", torch.Generator().manual_seed(5), 3),
    ("GradVac", "beta", 0.5, 2.0),
    ("GradVac", "reduction", "mean", "max"),
    ("PCD", "tau", 0.5, 2.0),
    ("PCD", "tau", {"0": 0.5}, {"0": 2.0}),
    ("PCD", "beta", 0.5, 1.0),
    ("PCD", "eps", 0.5, -1.0),
    ("PCD", "primary", "1", 1),
    ("SDMGrad", "lr", 0.1, 0.0),
    ("SDMGrad", "momentum", 0.0, 1.0),
    ("SDMGrad", "steps", 3, 0),
    ("SDMGrad", "lambda_", 0.0, -1.0),
    ("SDMGrad", "preferences", [1.0, 2.0, 3.0], [-1.0, 1.0, 1.0]),
    ("MoDo", "gamma", 0.5, 0.0),
    ("MoDo", "rho", 0.0, -1.0),
    ("UPGrad", "preferences", {"0": 1.0, "1": 2.0, "2": 4.0}, {"0": 0.0}),
    ("CRMOGM", "momentum", 0.25, 1.0),
    ("CRMOGM", "method", "upgrad", "graddrop"),
    ("Every", "method", "upgrad", "graddrop"),
    ("Every", "k", 1, 0),
    ("ParetoMTL", "preferences", torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 4.0]]), [[-1.0, 0.0, 1.0]]),
    ("ParetoMTL", "index", 1, 2),
    ("ParetoMTL", "max_start_steps", 0, -1),
    ("MoCo", "beta", 1.0, 0.0),
    ("MoCo", "projection", "softmax", "max"),
    ("DBMTL", "beta", 0.0, 1.0),
    ("ExcessMTL", "warmup", 3, 0),
    ("TrimmedMean", "trim", 0, -1),
    ("GradDrop", "leak", [0.5, 1.0, 0.0], [2.0, 0.0, 0.0]),
]


def asked(method: Method, steps: int = 3) -> list[list[float]]:
    """Updates of a few steps, by whatever the method is handed."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    found = []
    for _ in range(steps):
        grads = torch.randn(3, 6, generator=g, dtype=F64)
        other = torch.randn(3, 6, generator=g, dtype=F64)
        losses = torch.rand(3, generator=g, dtype=F64) + 0.5
        seen = Seen(["0", "1", "2"], [True] * 3, losses=losses, second=grads @ other.mT)
        if "gradients" in method.needs:
            out = [torch.empty(6, dtype=F64)]
            method.update(fastmtl.core.gradient_rows.bank_rows(grads), out, seen)
            found.append(out[0].tolist())
        else:
            found.append((method.weigh(grads @ grads.mT, seen) @ grads).tolist())
    return found


# the same in every process of a run: some values would show their address
@pytest.mark.parametrize(
    ("name", "argument", "good", "bad"),
    OUT_OF_RANGE,
    ids=[f"{name}-{argument}-{k}" for k, (name, argument, *_) in enumerate(OUT_OF_RANGE)],
)
def test_an_attribute_can_be_set_and_is_checked(name: str, argument: str, good: Any, bad: Any):
    """Set later, it acts as if it had been given at first; refused, it leaves the method as it was."""
    method = MAKE[name]()
    before = getattr(method, argument)
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}.*: expected"):
        setattr(method, argument, bad)
    assert getattr(method, argument) is before or getattr(method, argument) == before
    first = asked(copy.deepcopy(method))
    setattr(method, argument, good)
    # some make no difference to gradients as ordinary as these
    alike = {("Krum", "squared"), ("ExcessMTL", "warmup"), ("PCGrad", "include_self"), ("ParetoMTL", "max_start_steps")}
    assert asked(method) != first or (name, argument) in alike


def test_an_order_and_a_generator_exclude_each_other():
    order, generator = torch.tensor([[1], [0]]), torch.Generator()
    for method in (methods.PCGrad(order=order), methods.GradVac(order=order)):
        with pytest.raises(ValueError, match=r"^generator: expected None beside a given order"):
            method.generator = generator
        assert method.generator is None
        method.order, method.generator = None, generator
        with pytest.raises(ValueError, match=r"^generator: expected None beside a given order"):
            method.order = order
        assert method.order is None and method.generator is generator


def test_an_argument_that_is_called_as_a_method_is_not_set_in_vain():
    method = methods.GradVac()
    with pytest.raises(AttributeError, match="is the attribute target_update"):
        method.update = "triggered"
    assert method.target_update == "always" and callable(method.update)
    with pytest.raises(ValueError, match=r"^update: expected 'always' or 'triggered', got 'z'$"):
        method.target_update = "z"
    method.target_update = "triggered"
    assert "update='triggered'" in repr(method)


def test_a_method_that_is_set_is_asked_at_once():
    gram = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    every = methods.Every(lambda gram: gram.new_ones(2), 10)
    every.weights(gram)
    every.method = methods.SDMGrad()
    assert every.needs == {"second_batch"}
    every.method = "mgda"
    assert not every.needs and torch.equal(every.weights(gram), methods.MGDA().weights(gram))
    average = methods.CRMOGM("mgda", momentum=0.5)
    before = average.weights(gram)
    average.method = lambda gram: gram.new_ones(2)
    torch.testing.assert_close(average.weights(gram), 0.5 * before + 0.5)
    for method in (every, average):
        with pytest.raises(TypeError, match=r"^method: expected one"):
            method.method = methods.Every("mgda", 2)


def test_other_preference_vectors_must_have_that_of_the_index():
    method = methods.ParetoMTL([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], 2)
    with pytest.raises(ValueError, match=r"^preferences: expected at least 3 vectors for index 2, got 1$"):
        method.preferences = [[1.0, 1.0]]
    assert len(method.preferences) == 3


def test_what_was_set_acts_as_if_given():
    gram = torch.tensor([[2.0, -1.0], [-1.0, 1.0]])
    for made, changed in (
        (methods.CAGrad(0.2), ("c", 0.2)),
        (methods.NashMTL(0.5), ("max_norm", 0.5)),
        (methods.UPGrad(preferences=[1.0, 3.0]), ("preferences", [1.0, 3.0])),
        (methods.AlignedMTL("rmse"), ("scale", "rmse")),
    ):
        method = type(made)()
        assert not torch.equal(method.weights(gram), made.weights(gram))
        setattr(method, *changed)
        assert torch.equal(method.weights(gram), made.weights(gram))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["CAGrad", "UPGrad", "GradVac"])
def test_weights_in_one_graph(name: str):
    """Attributes that are checked when they are set do not break a graph of `torch.compile`."""
    gram = torch.tensor([[2.0, -1.0], [-1.0, 1.0]])
    compiled = torch.compile(MAKE[name]().weights, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gram), MAKE[name]().weights(gram))


def test_an_argument_that_was_never_set():
    class Scaled(Method):
        factor = Argument(choice("a"))

    with pytest.raises(AttributeError, match="Scaled: factor was not set"):
        _ = Scaled().factor
    assert isinstance(Scaled.factor, Argument)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_methods_can_be_copied(name: str):
    import pickle

    method = MAKE[name]()
    assert repr(copy.deepcopy(method)) == repr(method) == repr(pickle.loads(pickle.dumps(method)))


@pytest.mark.parametrize("kind", ["UPGrad", "DualProj", "ConFIG", "AlignedMTL", "SDMGrad"])
@pytest.mark.parametrize("preferences", [[1.0, 2.0], {"a": 1.0}])
def test_preferences_are_told(kind: str, preferences: Any):
    assert repr(preferences) in repr(getattr(methods, kind)(preferences=preferences))
    assert "preferences" not in repr(getattr(methods, kind)())


@pytest.mark.parametrize("make_one", [methods.UPGrad, methods.DualProj])
def test_preferences_in_the_place_of_a_number(make_one: Callable[..., Method]):
    with pytest.raises(TypeError, match="reg_eps: expected a number, got list; preferences go by name, preferences="):
        make_one([1.0, 2.0])


def test_a_generator_of_random_weights():
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got int"):
        methods.RandomWeights(generator=3)  # type: ignore[arg-type]


# --- numbers of each task


@pytest.mark.parametrize(
    "given", [[1.0, 2.0], (1, 2), torch.tensor([1.0, 2.0]), np.array([1.0, 2.0]), {"b": 2, "a": 1}]
)
def test_numbers_of_each_task(given: Any):
    numbers = TaskNumbers(given, "preferences")
    assert numbers.of(["a", "b"], CPU).tolist() == [1, 2]
    assert numbers.of(["a", "b"], CPU) is numbers.of(["a", "b"], CPU)  # no copy at each call
    if isinstance(given, dict):
        assert numbers.of(["b", "a"], CPU).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("ab", TypeError, "preferences: expected T numbers, got str"),
        (3.0, TypeError, "preferences: expected T numbers, got float"),
        (["a", "b"], TypeError, r"preferences: expected T numbers, got \['a', 'b'\]"),
        (torch.tensor([True, False]), TypeError, r"preferences: expected T numbers, got torch\.bool"),
        ([], ValueError, r"preferences: expected T numbers, got shape \[0\]"),
        ([[1.0]], ValueError, r"preferences: expected T numbers, got shape \[1, 1\]"),
        ([1.0, -1.0], ValueError, r"preferences: expected numbers from 0, not all of them 0, got \[1\.0, -1\.0\]"),
        ([0.0, 0.0], ValueError, "not all of them 0"),
        ([1.0, math.nan], ValueError, "preferences: expected numbers from 0"),
        ([1.0, math.inf], ValueError, "preferences: expected numbers from 0"),
        ({}, ValueError, r"preferences: expected numbers from 0, not all of them 0, got \[\]"),
        ({"a": 0.0}, ValueError, "not all of them 0"),
        ({1: 0.0}, TypeError, "preferences: expected the name of a task, got int"),
        ({"a": -1.0}, ValueError, r"preferences\['a'\]: expected a number from 0, got -1.0"),
        ({"a": "1"}, TypeError, r"preferences\['a'\]: expected a number, got str"),
    ],
)
@pytest.mark.parametrize("kind", ["UPGrad", "DualProj", "ConFIG", "AlignedMTL", "SDMGrad"])
def test_preferences_that_are_none(kind: str, given: Any, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        getattr(methods, kind)(preferences=given)


@pytest.mark.parametrize("kind", ["UPGrad", "DualProj", "ConFIG", "AlignedMTL", "SDMGrad"])
def test_preferences_by_name(kind: str):
    g = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    gram, second = g @ g.mT, g @ (g + 0.1).mT
    seen = Seen(["a", "b", "c"], [True, True, True], second=second)
    want = getattr(methods, kind)(preferences=[3.0, 1.0, 2.0]).weigh(gram, seen)
    by_name = {"c": 2.0, "a": 3.0, "b": 1.0}
    assert torch.equal(getattr(methods, kind)(preferences=by_name).weigh(gram, seen), want)
    turned = torch.tensor([2, 0, 1])
    method = getattr(methods, kind)(preferences=by_name)
    found = method.weigh(gram[turned][:, turned], Seen("cab", [True] * 3, second=second[turned][:, turned]))
    torch.testing.assert_close(found, want[turned], rtol=1e-9, atol=1e-12)
    if kind != "SDMGrad":
        by_place = getattr(methods, kind)(preferences={"0": 3.0, "1": 1.0, "2": 2.0})
        assert torch.equal(by_place.weights(gram), want)
        averaged = methods.CRMOGM(getattr(methods, kind)(preferences=by_name), 0.0)
        torch.testing.assert_close(averaged.weigh(gram, seen), want)
    method = getattr(methods, kind)(preferences={**by_name, "d": 1.0})
    with pytest.raises(ValueError, match=r"preferences: expected one of a, b, c, got 'd' .a task that is absent"):
        method.weigh(gram, seen)
    method = getattr(methods, kind)(preferences={"a": 1.0})
    with pytest.raises(ValueError, match=r"preferences: expected a number for each of .* got none for 'b', 'c'"):
        method.weigh(gram, seen)


def test_tau_and_leak_of_tasks_that_do_not_exist():
    gram, seen = torch.eye(2), Seen(["a", "b"], [True, True])
    with pytest.raises(ValueError, match="tau: expected one of a, b, got 'c'"):
        methods.PCD(tau={"a": 0.1, "c": 0.2}).weigh(gram, seen)
    with pytest.raises(ValueError, match="primary: expected one of a, b, got 'c'"):
        methods.PCD(primary="c").weigh(gram, seen)
    net, x = make()
    losses = dict(zip("abc", net.losses(x), strict=True))
    for method, argument in (
        (methods.GradDrop({"d": 0.5}), "leak"),
        (methods.PCD(tau={"d": 0.5}), "tau"),
        (methods.UPGrad(preferences={"d": 0.5}), "preferences"),
        (methods.Every(methods.PCD(tau={"d": 0.5}), 2), "tau"),
    ):
        with pytest.raises(ValueError, match=f"{argument}: expected one of a, b, c, got 'd'"):
            fastmtl.backward(losses, net, method=method, retain_graph=True)
        assert all(p.grad is None for p in net.parameters())


def test_a_leak_by_name():
    g = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    want = methods.GradDrop([1.0, 0.0], generator=torch.Generator().manual_seed(0))(g)
    found = methods.GradDrop({"0": 1.0}, generator=torch.Generator().manual_seed(0))(g)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    "method",
    [
        methods.UPGrad(preferences={"0": 1.0, "1": 1.0, "2": 2.0}),
        methods.SDMGrad(preferences={"0": 1.0, "1": 1.0, "2": 2.0}),
        methods.GradDrop({"0": 1.0}),
        methods.CRMOGM(methods.PCD(primary="1")),
        methods.CRMOGM(methods.UPGrad(preferences={"0": 1.0, "1": 1.0, "2": 2.0})),
    ],
    ids=repr,
)
def test_groups_of_what_knows_tasks_by_name(method: Method):
    net, x = make()
    second = {"second_losses": net.losses(x)} if "second_batch" in method.needs else {}
    with pytest.raises(ValueError, match=r"groups: not available with .* knows tasks by name"):
        fastmtl.backward(net.losses(x), net, method=method, groups="layer", **second)
    assert all(p.grad is None for p in net.parameters())


# --- what a method sees


@pytest.mark.parametrize("name", sorted(MAKE))
def test_two_tasks_of_one_name(name: str):
    method = MAKE[name]()
    seen = Seen(["a", "b", "a"], [True] * 3, losses=torch.ones(3, dtype=F64), second=torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"seen: expected different names of the tasks, got \['a', 'b', 'a'\]"):
        ask(method, torch.eye(3), seen)
    with pytest.raises(TypeError, match="seen: expected strings as names of the tasks, got int"):
        ask(method, torch.eye(3), seen._replace(names=[0, 1, 2]))
    with pytest.raises(TypeError, match=r"seen: expected a methods\.Seen, got list"):
        ask(method, torch.eye(3), ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"seen: expected 3 tasks as in the .*, got 2 names and 3 in present"):
        ask(method, torch.eye(3), seen._replace(names=["a", "b"]))
    assert not method.state_dict() or not method.state_dict().get("weights")


@pytest.mark.parametrize("name", [name for name in sorted(MAKE) if MAKE[name]().needs & {"losses", "second_batch"}])
def test_a_need_that_is_not_met_by_hand(name: str):
    method = MAKE[name]()
    fields = {"losses": torch.ones(3, dtype=F64), "second_batch": torch.eye(3, dtype=F64)}
    (need,) = method.needs & set(fields)
    field, good = {"losses": "losses", "second_batch": "second"}[need], fields[need]
    seen = Seen(["a", "b", "c"], [True] * 3)
    for bad, error, text in (
        (None, ValueError, f"seen: method {name} needs the task"),
        (good.tolist(), TypeError, f"seen: method {name}: expected the task.* as a tensor, got list"),
        (good[:2], ValueError, rf"seen: method {name}: expected the task.* as \[3.*, got \[2"),
    ):
        with pytest.raises(error, match=text):
            ask(method, torch.eye(3), seen._replace(**{field: bad}))
    assert same(method.state_dict(), MAKE[name]().state_dict())


def ask(method: Method, grads: Tensor, seen: Any) -> None:
    if "gradients" in method.needs:
        out = [torch.empty(grads.shape[1])]
        method.update(fastmtl.core.gradient_rows.bank_rows(grads), out, seen)
    else:
        method.weigh(grads @ grads.mT, seen)


# --- states


def stepped(name: str) -> Method:
    method = MAKE[name]()
    asked(method)
    return method


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_state_goes_through_a_file(name: str):
    method = stepped(name)
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = MAKE[name]()
    other.check_state(state)
    assert same(other.state_dict(), MAKE[name]().state_dict())  # it only looked
    other.load_state_dict(state)
    assert same(other.state_dict(), method.state_dict())
    assert asked(other) == asked(method)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_a_foreign_state_is_refused_and_changes_nothing(name: str):
    method = stepped(name)
    before = method.state_dict()
    foreign = [stepped(other).state_dict() for other in MAKE if type(MAKE[other]()) is not type(method)]
    foreign.append(torch.nn.Linear(2, 2).state_dict())
    foreign.append(torch.optim.Adam([torch.zeros(2)]).state_dict())
    for state in foreign:
        if not state:
            continue  # that of a method which keeps nothing is that of any before its first step
        with pytest.raises((TypeError, ValueError), match=r"^state: .*got"):
            method.load_state_dict(state)
        assert same(method.state_dict(), before)
    for state in (None, [1.0], "state", torch.zeros(2)):
        with pytest.raises((TypeError, ValueError), match=r"^state.*: expected what state_dict\(\) returned, got"):
            method.load_state_dict(state)  # type: ignore[arg-type]
        assert same(method.state_dict(), before)


def broken(state: Any) -> list[Any]:
    """States with one thing wrong: each key left out, added, each tensor of another shape or dtype, or not finite."""
    if isinstance(state, Tensor):
        wrong: list[Any] = [None, "x", state.to(torch.int64)]
        return [*wrong, torch.full_like(state, math.inf)] if state.numel() and state.dtype == F64 else wrong
    if isinstance(state, dict):
        found: list[Any] = [{**state, 3: 1}]
        for key, value in state.items():
            found += [{**state, key: wrong} for wrong in broken(value)]
        return found
    if isinstance(state, list) and state and isinstance(state[0], str):
        return [state[:-1] + state[:1], "abc", [1, *state[1:]], None]
    if isinstance(state, list):
        return ["abc", None, [3.0] * len(state)]
    return [None, "x", -1, 1.5]


@pytest.mark.parametrize("name", [name for name in sorted(MAKE) if stepped(name).state_dict()])
def test_a_broken_state_is_refused_and_changes_nothing(name: str):
    """Of a wrapper both its own part and the method's: nothing of either is taken over."""
    saved, method = stepped(name).state_dict(), MAKE[name]()
    asked(method, steps=2)
    before = method.state_dict()
    wrong = broken(saved)
    assert len(wrong) > 8
    for state in wrong:
        with pytest.raises((TypeError, ValueError), match=r"^state: .*expected"):
            method.load_state_dict(state)
        assert same(method.state_dict(), before)
    method.load_state_dict(saved)
    assert same(method.state_dict(), saved)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("wrap", [lambda m: methods.Every(m, 2), methods.CRMOGM], ids=["Every", "CRMOGM"])
def test_a_wrapper_of_a_callable_takes_no_state_of_a_method(wrap: Callable[[Any], Method]):
    method = wrap(lambda gram: 1 / gram.diagonal())
    method.weights(torch.eye(2))
    state = method.state_dict()
    method.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: .*: expected none of .* a callable, which keeps none, got names"):
        method.load_state_dict({**state, "method": {"names": ["a"]}})
    assert same(method.state_dict(), state)


def test_a_method_of_ones_own_with_a_state_in_a_wrapper():
    """Whoever overrides `load_state_dict` alone is not asked ahead, and not refused."""

    class Counting(Method):
        count = 0

        def _weights(self, gram: Tensor, present: Tensor | None) -> Tensor:
            self.count += 1
            return gram.diagonal()

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: Any) -> None:
            self.count = state["count"]

    method = methods.Every(Counting(), 2)
    method.weights(torch.eye(2))
    other = methods.Every(Counting(), 2)
    other.load_state_dict(method.state_dict())
    assert other.method.count == 1


# --- Gram matrices that are none


def callable_sum(gram: Tensor) -> Tensor:
    return torch.ones(len(gram), dtype=F64)


WEIGHING: dict[str, Callable[[], Any]] = {
    name: kind for name, kind in MAKE.items() if "gradients" not in kind().needs
} | {
    "a callable": lambda: callable_sum,
    "Every of a callable": lambda: methods.Every(callable_sum, 2),
    "CRMOGM of a callable": lambda: methods.CRMOGM(callable_sum),
    "CRMOGM of MGDA": lambda: methods.CRMOGM(methods.MGDA()),
}


@pytest.mark.parametrize("name", sorted(WEIGHING))
@pytest.mark.parametrize("way", ["together", "in groups", "by hand"])
def test_a_gram_matrix_is_checked_for_every_method(name: str, way: str, monkeypatch: pytest.MonkeyPatch):
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    good = g @ g.mT
    tilted, negative = good.clone(), good.clone()
    tilted[0, 1] += 0.01
    negative[0, 1] = negative[1, 0] = 5 * good.diagonal().max()
    below = good.clone()
    below[2, 2] = -1.0
    seen = Seen(["0", "1", "2"], [True] * 3, losses=torch.ones(3, dtype=F64), second=good)

    def weigh(gram: Tensor) -> Tensor:
        method = WEIGHING[name]()
        if way == "in groups":
            groups = [seen._replace(names=[f"{k}/{t}" for t in range(3)]) for k in range(2)]
            groups = [x._replace(second=good) for x in groups]
            return methods.group_weights_of(method, torch.stack([good, gram]), groups)
        if way == "by hand" and isinstance(method, Method) and not method.needs:
            return method.weights(gram)
        return methods.weights_of(method, gram, seen)

    for gram in (good, tilted, negative, below):
        weigh(gram)  # nobody looks
    monkeypatch.setenv("FASTMTL_CHECK", "1")
    assert weigh(good).isfinite().all()
    assert weigh(good * torch.nan).shape == weigh(good).shape
    with pytest.raises(ValueError, match=r"gram: expected a symmetric matrix, got .* and .* for a pair"):
        weigh(tilted)
    with pytest.raises(
        ValueError, match=r"gram: expected a Gram matrix, got one with negative eigenvalues: -.*cosines"
    ):
        weigh(negative)
    with pytest.raises(ValueError, match=r"gram: expected a Gram matrix, got .*: -1 on its diagonal"):
        weigh(below)


@pytest.mark.parametrize(
    "coefficients",
    [
        lambda gram: ops.pcgrad_coefficients(gram, torch.tensor([[1], [0]])),
        lambda gram: ops.gradvac_coefficients(gram, torch.tensor([[1], [0]]), torch.zeros(2, 2)),
    ],
    ids=["pcgrad", "gradvac"],
)
def test_the_ops_of_orders_check_too(coefficients: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch):
    indefinite = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    coefficients(indefinite)  # nobody looks
    monkeypatch.setenv("FASTMTL_CHECK", "1")
    coefficients(torch.eye(2))
    with pytest.raises(ValueError, match="gram: expected a Gram matrix, got one with negative eigenvalues"):
        coefficients(indefinite)


def test_absent_tasks_are_not_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTMTL_CHECK", "1")
    gram = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, -3.0], [0.0, 0.0, -1.0]])
    for method in (methods.PCGrad(), methods.GradVac(), methods.Sum(), methods.MGDA(), callable_sum):
        w = methods.weights_of(method, gram, Seen(["0", "1", "2"], [True, True, False]))
        assert w[2] == 0 and (w[:2] > 0).all()


# --- Every.k


def test_k_can_be_read_and_set():
    asked_with = []
    method = methods.Every(lambda gram: asked_with.append(1) or gram.diagonal(), 3)
    assert method.k == 3

    def step() -> int:
        method.weights(torch.eye(2))
        return len(asked_with)

    assert [step() for _ in range(4)] == [1, 1, 1, 2]
    method.k = 1
    assert [step() for _ in range(3)] == [3, 4, 5]
    method.k = 2
    # at k = 1 nothing was kept, and what was kept before is too old
    assert [step() for _ in range(4)] == [6, 6, 7, 7]
    for bad, error, text in (
        (0, ValueError, "k: expected an integer from 1, got 0"),
        (2.0, TypeError, "k: expected an integer, got float"),
        (True, TypeError, "k: expected an integer, got bool"),
    ):
        with pytest.raises(error, match=text):
            method.k = bad
    assert method.k == 2
