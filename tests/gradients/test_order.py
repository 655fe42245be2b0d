"""PCGrad's random orders: a function of a key and a counter, drawn alike by every backend."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import torch
from cases import BankCase, ListCase, random_gradients
from conftest import Backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor

import fastmtl
import fastmtl.optim
from fastmtl import methods
from fastmtl.ops import gram, order_state, pcgrad, pcgrad_project, random_order
from fastmtl.ops.gradients import reference
from fastmtl.ops.gradients.order import NUMBERS_PER_COUNT, Draw, _ReplayCounters, draw_source, drawn_order
from fastmtl.ops.gradients.pcgrad import pcgrad_rows_into

MASK = (1 << 64) - 1


def splitmix64(key: int, n: int) -> int:
    """Number n of the stream `key`, in Python's integers, as a signed number."""
    z = (key + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def order_by_hand(key: int, counter: int, num_tasks: int) -> list[list[int]]:
    rows = []
    for i in range(num_tasks):
        numbers = [splitmix64(key, counter * NUMBERS_PER_COUNT + i * num_tasks + t) for t in range(num_tasks)]
        rows.append(sorted(range(num_tasks), key=lambda t: (numbers[t], t)))
    return rows


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs of the reference implementation for seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, n) & MASK for n in range(4)] == published


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 1234567])
@pytest.mark.parametrize("counter", [0, 1, 5, 2**40, -3])
def test_order_by_hand(key: int, counter: int) -> None:
    for num_tasks in (1, 2, 5, 17):
        state = torch.tensor([key, counter])
        assert random_order(num_tasks, generator=state).tolist() == order_by_hand(key, counter, num_tasks)
        assert state.tolist() == [key, counter + 1]


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 17, 64, 128])
def test_kernels_draw_the_same(num_tasks: int, backend: Backend) -> None:
    """The order is seen through the coefficients: G is such that every order gives others."""
    grads = cases.bank64(BankCase(num_tasks, 300, torch.float64))
    state = order_state(5)
    for counter in range(3):
        order = random_order(num_tasks, generator=torch.tensor([5, counter]))
        assert torch.equal(pcgrad(grads, generator=state), pcgrad(grads, order))
        assert state.tolist() == [5, counter + 1]
        assert torch.equal(pcgrad_project(grads, generator=torch.tensor([5, counter])), pcgrad_project(grads, order))


@pytest.mark.parametrize("call", [pcgrad, pcgrad_project])
def test_lists_draw_the_same(call: Callable[..., list], backend: Backend) -> None:
    made = ListCase("nones", 8, torch.float64).make()
    order = random_order(8, generator=order_state(9))
    drawn, given = call(made, generator=order_state(9)), call(made, order)
    rows = zip(drawn, given, strict=True) if call is pcgrad_project else [(drawn, given)]
    for a, b in rows:
        assert torch.equal(cases.flat(a), cases.flat(b))


def test_seed_gives_the_same_order_whoever_draws() -> None:
    grads = BankCase(8, 300, torch.float64).make()
    results = []
    for name in ("cpu", "reference"):
        torch.manual_seed(11)
        with fastmtl.use_backend(name):
            results.append(pcgrad(grads))
    torch.manual_seed(11)
    leaf = grads.clone().requires_grad_()
    results.append(pcgrad(leaf).detach())  # recorded: the order is drawn before the op
    torch.manual_seed(11)
    results.append(pcgrad(grads, random_order(8)))
    torch.manual_seed(11)
    results.append(pcgrad(grads, generator=order_state()))
    torch.manual_seed(11)
    weights = methods.PCGrad().weights(gram(grads))
    results.append(reference.combine(weights, grads))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)
    torch.manual_seed(12)
    assert not torch.equal(pcgrad(grads), results[0])


def test_generators_are_advanced_and_followed() -> None:
    def draws(generator: torch.Generator) -> list[Tensor]:
        return [random_order(6, generator=generator) for _ in range(4)]

    first, again = (draws(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({str(x.tolist()) for x in first}) == 4


def test_orders_are_uniform() -> None:
    """The six orders of three tasks over 3000 counters and rows: chi-squared with 5 degrees of freedom."""
    state = order_state(0)
    counts = torch.zeros(27, dtype=torch.float64)
    for _ in range(1000):
        order = random_order(3, generator=state)
        counts += torch.bincount(order @ torch.tensor([9, 3, 1]), minlength=27)
    seen = counts[counts > 0]
    assert seen.numel() == 6
    assert ((seen - 500) ** 2 / 500).sum() < 20.5  # exceeded once in 1000


def test_rows_draw_apart() -> None:
    order = random_order(64, generator=order_state(1))
    assert len({str(row) for row in order.tolist()}) == 64
    assert torch.equal(order.sort(dim=1).values, torch.arange(64).expand(64, 64))


def test_state() -> None:
    assert order_state(7).tolist() == [7, 0]
    assert order_state(2**64 - 1).tolist() == [-1, 0]
    assert order_state(-(2**63)).tolist() == [-(2**63), 0]
    torch.manual_seed(0)
    first = order_state()
    torch.manual_seed(0)
    assert torch.equal(order_state(), first)
    assert not torch.equal(order_state(), first)
    # saved and put back, the orders come again
    saved = first.clone()
    orders = [random_order(9, generator=first) for _ in range(2)]
    first.copy_(saved)
    assert all(torch.equal(random_order(9, generator=first), x) for x in orders)


@pytest.mark.parametrize(
    ("generator", "error", "match"),
    [
        (7, TypeError, "generator: expected a torch.Generator or a state, got int"),
        (torch.zeros(2), TypeError, "generator: expected an int64 state, got torch.float32"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"generator: expected a contiguous state.*got shape \[3\]"),
        (torch.zeros(4, dtype=torch.int64)[::2], ValueError, "generator: expected a contiguous state"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "generator: expected a state on cpu, got one"),
    ],
)
def test_bad_generators(generator: object, error: type[Exception], match: str) -> None:
    grads = BankCase(3, 65).make()
    for call in (
        lambda: pcgrad(grads, generator=generator),
        lambda: pcgrad_project(grads, generator=generator),
        lambda: random_order(3, generator=generator, device="cpu"),
        lambda: methods.PCGrad(generator=generator)(grads),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("num_tasks", [3.0, True, None, "3"])
def test_bad_number_of_tasks(num_tasks: object) -> None:
    with pytest.raises(TypeError, match="num_tasks: expected an integer, got"):
        random_order(num_tasks)


def test_an_order_leaves_nothing_to_draw() -> None:
    grads, order = BankCase(3, 65).make(), cases.random_order(3)
    for call in (
        lambda: pcgrad(grads, order, generator=order_state(1)),
        lambda: pcgrad_project(grads, order, generator=order_state(1)),
        lambda: methods.PCGrad(order=order, generator=order_state(1)),
    ):
        with pytest.raises(ValueError, match="generator: expected None beside a given order"):
            call()
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or a state, got int"):
        methods.PCGrad(generator=42)
    with pytest.raises(TypeError, match="order: expected a tensor or None, got list"):
        methods.PCGrad(order=[[1], [0]])


def test_default_device_does_not_matter() -> None:
    """Keys come from the CPU, whatever torch's default device is; the meta device stands for a GPU here."""
    grads = BankCase(4, 65, torch.float64).make()
    torch.manual_seed(5)
    expected = pcgrad(grads)
    torch.manual_seed(5)
    with torch.device("meta"):
        assert torch.equal(pcgrad(grads), expected)
        pcgrad(grads, generator=torch.Generator().manual_seed(1))
        assert order_state(7).device.type == random_order(3).device.type == "cpu"
        leaf = grads.clone().requires_grad_()
        fastmtl.backward([leaf.sum(), -(leaf * leaf).sum()])
    assert leaf.grad is not None and torch.isfinite(leaf.grad).all()


def test_steps_among_fake_tensors() -> None:
    with FakeTensorMode():
        layer = torch.nn.Linear(3, 2)
        y = layer(torch.ones(5, 3))
        surgery = fastmtl.backward([y[:, 0].sum(), y[:, 1].sum()], shared=layer)
        assert surgery.weights.shape == (2,)
        grads = torch.randn(4, 30)
        assert pcgrad(grads, out=torch.empty(30)).shape == (30,)


def test_one_order_for_all_parts_of_a_tensor() -> None:
    """A tensor of two tensors runs the kernel once for each, with the same order."""
    parts = [random_gradients(6, 30, cases.generator_of(k)) for k in range(2)]
    state = order_state(0)
    param = torch.nn.Parameter(TwoTensor(torch.zeros(30).double(), torch.zeros(30).double()))
    losses = [(param * TwoTensor(parts[0][t].clone(), parts[1][t].clone())).sum() for t in range(6)]
    fastmtl.backward(losses, method=methods.PCGrad(generator=state))
    assert state.tolist() == [0, 1]
    order = random_order(6, generator=order_state(0))
    torch.testing.assert_close(param.grad.a, pcgrad(parts[0], order))
    torch.testing.assert_close(param.grad.b, pcgrad(parts[1], order))


def test_optimizer_with_a_state() -> None:
    results = []
    for _ in range(2):
        layer = torch.nn.Linear(5, 4, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(20).reshape(4, 5) / 10)
        wrapped = fastmtl.optim.PCGrad(torch.optim.SGD(layer.parameters(), lr=0.1), generator=order_state(3))
        torch.manual_seed(len(results))  # which must not matter
        for _ in range(3):
            y = layer(torch.eye(5))
            wrapped.pc_backward([(y * w).sum() for w in cases.bank64(BankCase(6, 20)).float().reshape(6, 5, 4)])
            wrapped.step()
        results.append(layer.weight.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(("seed", "error"), [("1", TypeError), (True, TypeError), (2**64, ValueError)])
def test_bad_seeds(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed: expected"):
        order_state(seed)


# --- the fused call that `backward` makes


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("absent", [(), (1,), (0, 4), (0, 1, 2, 3)])
def test_operate_with_absent_tasks(absent: tuple[int, ...], mean: bool, backend: Backend) -> None:
    """Absent tasks have no gradient and no weight; the others as if they were alone."""
    made = ListCase("dense", 5, torch.float64).make()
    lists = [[None] * len(row) if t in absent else row for t, row in enumerate(made)]
    here = [t for t in range(5) if t not in absent]
    order = cases.random_order(5)
    rows = cases.read_lists(lists)
    out = [torch.empty_like(x) for x in made[0]]
    m, w = pcgrad_rows_into(rows, order, Draw(0, None), out, mean=mean, present=[t in here for t in range(5)])
    alone = torch.tensor([[here.index(j) for j in order[i].tolist() if j in here] for i in here])
    bank = cases.double([made[t] for t in here])
    c = reference.pcgrad_coefficients(reference.gram(bank), alone)
    expected = c.mean(0) if mean else c.sum(0)
    torch.testing.assert_close(w[here], expected, rtol=1e-10, atol=1e-12)
    assert not w[list(absent)].any()
    torch.testing.assert_close(m[here][:, here], reference.gram(bank), rtol=1e-10, atol=1e-10)
    assert not m[list(absent)].any()
    torch.testing.assert_close(cases.flat(out), expected @ bank, rtol=1e-10, atol=1e-12)


def test_drawing_needs_no_device_values() -> None:
    """What a drawn order starts from, on a device: nothing is read back."""
    source = draw_source(None, torch.device("meta"))
    assert source.state is None
    assert drawn_order(source, 4, torch.device("meta")).shape == (4, 4)


def test_tracing_keeps_the_op() -> None:
    grads, order = torch.randn(3, 20), cases.random_order(3)
    for call in (pcgrad, pcgrad_project):
        traced = torch.jit.trace(lambda g, call=call: call(g, order), (grads,), check_trace=False)
        other = torch.randn(3, 20)
        torch.testing.assert_close(traced(other), call(other, order))


def test_counters_of_graphs_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are taken: a graph holds their addresses."""
    monkeypatch.setattr(_ReplayCounters, "SIZE", 8)
    counters, device = _ReplayCounters(), torch.device("cpu")
    storages, addresses = [], set()
    for _ in range(5):
        counters.prepare(device)
        for _ in range(3):
            taken = counters.take(device)
            assert taken.tolist() == [0, 0]
            addresses.add(taken.data_ptr())
            storages.append(StorageWeakRef(taken.untyped_storage()))
            del taken
    assert len(addresses) == 15
    assert not any(storage.expired() for storage in storages)
    with pytest.raises(RuntimeError, match="run the step once before the capture"):
        _ReplayCounters().take(device)
