"""What users get wrong with methods, and what they are told."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmtl
from fastmtl import methods, ops
from fastmtl.analysis import first_order_affinity
from fastmtl.methods.state import StatefulMethod


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    return nn.ModuleDict({"trunk": trunk, "heads": nn.ModuleList(nn.Linear(5, 1) for _ in range(3))})


def losses(model: nn.ModuleDict) -> dict[str, Tensor]:
    x = model["trunk"](torch.ones(2, 4))
    return {f"t{k}": (head(x) - k).square().mean() for k, head in enumerate(model["heads"])}


@pytest.mark.parametrize(
    "method",
    [
        methods.MoCo(),
        methods.DBMTL(),
        methods.ExcessMTL(),
        methods.PCD(primary="t1"),
        methods.PCD(tau={"t1": 0.5}),
    ],
    ids=repr,
)
def test_groups_of_what_knows_tensors_or_names(method: methods.Method) -> None:
    model = net()
    with pytest.raises(ValueError, match="groups: not available with"):
        fastmtl.backward(losses(model), model, method=method, groups="layer")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", [methods.PCD(), methods.GradVac(), methods.CRMOGM(methods.MGDA())], ids=repr)
def test_groups_of_other_methods_with_state(method: methods.Method) -> None:
    model = net()
    surgery = fastmtl.backward(losses(model), model, method=method, groups="layer")
    assert surgery.weights.shape == (2, 3)


@pytest.mark.parametrize("name", ["moco", "gradvac", "PCD", "dbmtl"])
def test_a_name_forgets_the_state(name: str) -> None:
    model = net()
    with pytest.warns(UserWarning, match=f"method='{name}': .* keeps state .* pass an instance"):
        fastmtl.backward(losses(model), model, method=name)


@pytest.mark.parametrize("method", ["pcgrad", "upgrad", methods.GradVac()])
def test_no_warning_where_nothing_is_forgotten(method: Any) -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastmtl.backward(losses(model), model, method=method)


def test_an_average_of_reused_weights() -> None:
    with pytest.raises(TypeError, match=r"write Every\(CRMOGM\(...\), k\)"):
        methods.CRMOGM(methods.Every(methods.MGDA(), 4))


def test_reused_weights_of_reused_weights() -> None:
    with pytest.raises(TypeError, match=r"got Every\(MGDA\(\), 4\): write one Every, with the product of both k"):
        methods.Every(methods.Every(methods.MGDA(), 4), 2)


def test_a_method_of_ones_own_that_lacks_its_half() -> None:
    class Plain(methods.Method):
        pass

    class WithState(StatefulMethod):
        pass

    class Whole(methods.Method):
        needs = frozenset({"gradients"})

    model = net()
    for kind, text in (
        (Plain, r"method Plain: has no _weights\(gram, present\), which a subclass implements"),
        (WithState, r"method WithState: has no _weigh\(gram, seen, present\), which a subclass implements"),
        (Whole, r"method Whole: has no update\(rows, out, seen\), which a subclass implements"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            fastmtl.backward(losses(model), model, method=kind())
    assert all(p.grad is None for p in model.parameters())


GRAMIAN = [kind for kind in methods.names.CLASSES if not kind().needs]


@pytest.mark.parametrize("kind", GRAMIAN, ids=lambda kind: kind.__name__)
def test_a_derived_method_is_asked_for_its_own_weights(kind: type[methods.Method]) -> None:
    """By hand, in a step, in groups and in other methods; `super()` is what its base has."""
    own = "_weigh" if issubclass(kind, StatefulMethod) else "_weights"

    class Doubled(kind):  # type: ignore[misc, valid-type]
        pass

    setattr(Doubled, own, lambda self, *given: 2 * getattr(super(Doubled, self), own)(*given))
    gram, here = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.0, 0.0], [0.5, 0.0, 3.0]]), torch.tensor([True, False, True])
    for present in (None, here):
        torch.manual_seed(0)
        want = 2 * kind().weights(gram, present=present)
        torch.manual_seed(0)
        assert torch.equal(Doubled().weights(gram, present=present), want)
    model = net()
    for options in ({}, {"groups": "layer"}):
        torch.manual_seed(0)
        want = 2 * fastmtl.backward(losses(model), model, method=kind(), **options).weights
        torch.manual_seed(0)
        found = fastmtl.backward(losses(model), model, method=Doubled(), **options).weights
        torch.testing.assert_close(found, want)
    seen = methods.Seen(["0", "1", "2"], [True] * 3)
    torch.manual_seed(0)
    want = 2 * kind().weigh(gram, seen)
    torch.manual_seed(0)
    torch.testing.assert_close(methods.CRMOGM(Doubled(), 0.0).weigh(gram, seen), want)


def test_a_function_is_called_by_its_name() -> None:
    def halves(gram: Tensor) -> list[float]:
        return [0.5] * len(gram)

    model = net()
    with pytest.raises(TypeError, match=r"^method test_a_function.*halves: expected a tensor of 3 weights, got list$"):
        fastmtl.backward(losses(model), model, method=halves)  # type: ignore[arg-type]


def test_options_that_are_no_numbers() -> None:
    with pytest.raises(TypeError, match="reg_eps: expected a number, got list; preferences go by name, preferences="):
        methods.UPGrad([1.0, 1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="c: expected a number, got str"):
        methods.CAGrad("a")  # type: ignore[arg-type]


def test_preferences_of_another_length() -> None:
    seen = methods.Seen(["a", "b", "c"], [True] * 3, second=torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"preferences: expected 3 numbers, one for each task, got 2"):
        methods.SDMGrad(preferences=[1.0, 2.0]).weigh(torch.eye(3), seen)


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*upgrad.* or an instance of CRMOGM, Every.*, got 'foo'"):
        methods.get("foo")


def test_an_aggregator_of_torchjd() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    size = 4
    made = {"Constant": [torch.ones(size)], "NashMTL": [2], "Krum": [1], "TrimmedMean": [1], "GradVac": []}
    for name in dir(aggregation):
        kind = getattr(aggregation, name)
        if not (isinstance(kind, type) and issubclass(kind, aggregation.Aggregator)) or inspect.isabstract(kind):
            continue
        if name in ("GramianWeightedAggregator", "WeightedAggregator"):
            continue
        try:
            aggregator = kind(*made.get(name, []))
        except (TypeError, ImportError):  # takes arguments of its own, or a package that is not here
            continue
        with pytest.raises(TypeError, match=f"TorchJD's {name} takes a Jacobian, not a Gram matrix") as error:
            methods.get(aggregator)
        told = str(error.value)
        for found in re.findall(r"fastmtl\.methods\.(\w+)", told):
            assert hasattr(methods, found)
        for found in re.findall(r"its weighting, (\w+)\(", told):
            weighting = getattr(aggregation, found)(*made.get(name, []))
            assert methods.get(weighting)(torch.eye(size)).shape == (size,)
        assert "write fastmtl.methods." in told or "its weighting" in told


def test_affinity_of_a_step_that_reused_weights() -> None:
    model = net()
    method = methods.Every(methods.MGDA(), 3)
    for _ in range(2):
        seen = losses(model)
        surgery = fastmtl.backward(seen, model, method=method)
    assert surgery.reused
    with pytest.raises(ValueError, match="has no Gram matrix"):
        first_order_affinity(surgery, [float(x.detach()) for x in seen.values()], lr=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_gram_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    m = g @ g.mT  # of rank 3, with eigenvalues that rounding leaves below zero
    tilted, indefinite = m.clone(), torch.tensor([[1.0, 5.0], [5.0, 1.0]], dtype=dtype)
    tilted[0, 1] += 0.01
    assert ops.method_weights(indefinite, "mgda").isfinite().all()  # nobody looked
    monkeypatch.setenv("FASTMTL_CHECK", "1")
    for scale in (1e-12, 1.0, 1e12):
        assert ops.method_weights(m * scale, "mgda").isfinite().all()
    with pytest.raises(ValueError, match="gram: expected a symmetric matrix"):
        ops.method_weights(tilted, "mgda")
    with pytest.raises(ValueError, match="gram: expected a Gram matrix, got one with negative eigenvalues"):
        ops.method_weights(indefinite, "mgda")
    here = torch.tensor([True, False])
    assert ops.method_weights(indefinite, "mgda", present=here).tolist() == [1.0, 0.0]
    assert ops.method_weights(m * torch.nan, "mgda").isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_a_single_task_that_is_not_finite(name: str, bad: float) -> None:
    """Nothing is compared with it, and still its weight is NaN."""
    method = methods.get(name)
    for dtype in (torch.float32, torch.float64):
        assert method.weights(torch.tensor([[bad]], dtype=dtype)).isnan().all()
        gram = torch.eye(3, dtype=dtype)
        gram[1, 1] = bad
        assert method.weights(gram, present=torch.tensor([False, True, False]))[1].isnan()
        assert method.weights(gram, present=torch.tensor([True, False, True])).tolist() == [1.0, 0.0, 1.0]
    assert method.weights(torch.tensor([[2.0]])).tolist() == [1.0]


def test_state_made_in_inference_mode_serves_later() -> None:
    for method in (methods.MoCo(), methods.ExcessMTL(), methods.DBMTL(), methods.GradVac(), methods.CRMOGM("mgda")):
        grads = torch.tensor([[1.0, 2.0], [2.0, -1.0]])
        call = method if method.needs <= {"gradients"} else None
        if call is None:
            continue
        with torch.inference_mode():
            call(grads)
        assert call(grads).isfinite().all()


def test_bools_are_no_preferences() -> None:
    with pytest.raises(TypeError, match=r"^preferences: expected T numbers, got \[True, False\]$"):
        methods.UPGrad(preferences=[True, False])
