"""Losses as people write them inside a `one_pass` block: masked, weighted, by task, and where sizes coincide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases_one_pass import IDS, LABELS, N, T
from torch import Tensor, nn

import fastmtl

D, LENGTH, CLASSES = 6, 5, 5
EVERY = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])  # as many tasks as samples


def _data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


X, SEQUENCES, TIME_FIRST = _data(N, D), _data(N, LENGTH, D), _data(N, N, D)
TOKENS = torch.arange(N * LENGTH).reshape(N, LENGTH) % CLASSES
MASK = _data(N, LENGTH) > -0.3
OF_MASKED = IDS[MASK.nonzero()[:, 0]]
WEIGHTS = _data(N).abs() + 0.1  # of tasks, classes or features, of which there are as many as samples
PADDING = torch.arange(N)[None] >= torch.tensor([8, 5, 6, 3, 8, 7, 8, 4])[:, None]
LENGTHS = torch.tensor([1, 3, 2, 2, 3, 1, 1, 2])


def _linear(classes: int = CLASSES, width: int = D) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(width, classes).double()


class Case(NamedTuple):
    """
    Attributes:
        model: makes the network.
        total: the loss inside the block.
        parts: each task's part of it, outside.
        ids, num_tasks, batch_dim: of `one_pass`.
    """

    model: Callable[[], nn.Module]
    total: Callable[[nn.Module], Tensor]
    parts: Callable[[nn.Module], list[Tensor | None]]
    ids: Tensor = IDS
    num_tasks: int = T
    batch_dim: int = 0


def _losses(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(X), LABELS, reduction="none")


def _masked(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(SEQUENCES)[MASK], TOKENS[MASK], reduction="none")


def _of_sequences(net: nn.Module) -> Tensor:
    return F.cross_entropy(net(SEQUENCES).flatten(0, 1), TOKENS.flatten(), reduction="none").view(N, LENGTH)


def _by_task(losses: Tensor, ids: Tensor = IDS, num_tasks: int = T) -> list[Any]:
    return [losses[ids == t].sum() for t in range(num_tasks)]


def _means(net: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
    losses = _losses(net)
    return [change(losses[t == IDS].mean()) for t in range(T)]


def _mean_of_masked(net: nn.Module) -> list[Tensor]:
    return [x / MASK.sum() for x in _by_task(_masked(net), OF_MASKED)]


def _sorted_inside(net: nn.Module) -> Tensor:
    IDS.sort()
    out = net(X)
    out.detach().topk(2, 0)
    return F.cross_entropy(out, LABELS)


def _written(net: nn.Module) -> Tensor:
    losses = _of_sequences(net) * 1
    losses[~MASK] = 0
    return losses.sum() / MASK.sum()


def _written_by_task(net: nn.Module) -> Tensor:
    found, losses = torch.zeros(T, dtype=torch.float64), _losses(net)
    for t in range(T):
        found[t] = losses[t == IDS].mean()
    return found.sum()


def _normalised(losses: Tensor) -> Tensor:
    return (losses / losses.mean()).std() + losses.max()


def _ctc(net: nn.Module, reduction: str) -> Tensor:
    out = net(SEQUENCES.transpose(0, 1)).log_softmax(-1)
    targets = TOKENS[:, :3].clamp(min=1)
    return F.ctc_loss(out, targets, torch.full((N,), LENGTH), LENGTHS, reduction=reduction)


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0).double()


def _encoded(net: nn.Module) -> Tensor:
    return net(TIME_FIRST, src_key_padding_mask=PADDING).square().sum((0, 2))


def _weighted_by_class(net: nn.Module) -> Tensor:
    return F.binary_cross_entropy_with_logits(net(X), _data(N, N).sigmoid(), pos_weight=WEIGHTS, reduction="none")


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


CASES = {
    "several results": Case(
        _linear, _sorted_inside, lambda m: [x / N for x in _by_task(_losses(m))]
    ),
    "weights of as many tasks as samples": Case(
        _linear, lambda m: (_losses(m) * WEIGHTS[EVERY]).sum(),
        lambda m: _by_task(_losses(m) * WEIGHTS[EVERY], EVERY, N), EVERY, N,
    ),
    "weights of as many classes as samples": Case(
        lambda: _linear(N), lambda m: (_losses(m) * WEIGHTS[LABELS]).sum(),
        lambda m: _by_task(_losses(m) * WEIGHTS[LABELS]),
    ),
    "weight= of as many classes as samples": Case(
        lambda: _linear(N), lambda m: F.cross_entropy(m(X), LABELS, weight=WEIGHTS),
        lambda m: [x / WEIGHTS[LABELS].sum() for x in _by_task(_losses(m) * WEIGHTS[LABELS])],
    ),
    "pos_weight of as many classes as samples": Case(
        lambda: _linear(N), lambda m: nn.BCEWithLogitsLoss(pos_weight=WEIGHTS)(m(X), _data(N, N).sigmoid()),
        lambda m: [x / N**2 for x in _by_task(_weighted_by_class(m))],
    ),
    "padding of as many steps as samples": Case(
        _encoder, lambda m: _encoded(m).sum(), lambda m: _by_task(_encoded(m)), batch_dim=1
    ),
    "masked positions": Case(
        _linear, lambda m: F.cross_entropy(m(SEQUENCES)[MASK], TOKENS[MASK]), _mean_of_masked
    ),
    "masked before the layer": Case(
        _linear, lambda m: F.cross_entropy(m(SEQUENCES[MASK]), TOKENS[MASK]), _mean_of_masked
    ),
    "masked when flat": Case(
        _linear,
        lambda m: F.cross_entropy(m(SEQUENCES).flatten(0, 1)[MASK.flatten()], TOKENS.flatten()[MASK.flatten()]),
        _mean_of_masked,
    ),
    "masked_select": Case(_linear, lambda m: _of_sequences(m).masked_select(MASK).mean(), _mean_of_masked),
    "masked in place": Case(_linear, _written, _mean_of_masked),
    "divided by counts": Case(_linear, lambda m: (_losses(m) / torch.bincount(IDS)[IDS]).sum(), _means),
    "a loop over the tasks": Case(_linear, lambda m: sum(_losses(m)[t == IDS].mean() for t in IDS.unique()), _means),
    "roots of means": Case(
        _linear, lambda m: sum(_losses(m)[t == IDS].mean().sqrt() for t in IDS.unique()),
        lambda m: _means(m, torch.sqrt),
    ),
    "logarithms of means": Case(
        _linear, lambda m: torch.stack(_means(m)).log().sum(), lambda m: _means(m, torch.log)
    ),
    "nan_to_num": Case(_linear, lambda m: sum(x.nan_to_num() for x in _means(m)), _means),
    "an absent task in a stack": Case(
        _linear, lambda m: torch.stack([*_means(m), _zero()]).square().sum(),
        lambda m: [*_means(m, torch.square), None], num_tasks=T + 1,
    ),
    "scatter_add": Case(
        _linear, lambda m: torch.zeros(T).double().scatter_add(0, IDS, _losses(m)).sqrt().sum(),
        lambda m: [x.sqrt() for x in _by_task(_losses(m))],
    ),
    "scatter_add_": Case(
        _linear, lambda m: torch.zeros(T + 1).double().scatter_add_(0, IDS, _losses(m)).square().sum(),
        lambda m: [x.square() for x in _by_task(_losses(m))],
    ),
    "index_add": Case(
        _linear, lambda m: torch.zeros(T).double().index_add(0, IDS, _losses(m)).square().sum(),
        lambda m: [x.square() for x in _by_task(_losses(m))],
    ),
    "index_add_": Case(
        _linear, lambda m: torch.zeros(T).double().index_add_(0, IDS, _losses(m)).sum(),
        lambda m: _by_task(_losses(m)),
    ),
    "sample after sample": Case(
        _linear,
        lambda m: torch.stack([F.cross_entropy(x, y) for x, y in zip(m(X), LABELS, strict=True)]).square().mean(),
        lambda m: [x / N for x in _by_task(_losses(m).square())],
    ),
    "written by task": Case(_linear, _written_by_task, _means),
    "normalised within a task": Case(
        _linear, lambda m: sum(_normalised(_losses(m)[t == IDS]) for t in range(T)),
        lambda m: [_normalised(_losses(m)[t == IDS]) for t in range(T)],
    ),
    "ctc with lengths in tensors": Case(
        _linear, lambda m: _ctc(m, "sum"), lambda m: _by_task(_ctc(m, "none"))
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, {"check": True}, {"fallback": "loop"}, {"memory": "stream"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_equal_a_backward_pass_per_task(name: str, arguments: dict[str, Any]) -> None:
    case = CASES[name]
    net = case.model()
    params = list(net.parameters())
    want = []
    for part in case.parts(net):
        found = [None] * len(params)
        if part is not None:
            found = torch.autograd.grad(part, params, retain_graph=True, allow_unused=True)
        want.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])
    with fastmtl.one_pass(net, case.ids, case.num_tasks, batch_dim=case.batch_dim, **arguments) as bank:
        case.total(net).backward()
    close = {"rtol": 1e-9, "atol": 1e-12}
    if arguments.get("memory") == "stream":
        bank.apply("sum")
        for k, p in enumerate(params):
            torch.testing.assert_close(p.grad, sum(row[k] for row in want), **close)
        return
    for t, row in enumerate(want):
        for p, got, expected in zip(params, bank.row(t), row, strict=True):
            torch.testing.assert_close(torch.zeros_like(p) if got is None else got, expected, **close)


MEAN, STD, ORDER, TABLE = _data(N), _data(N).abs() + 0.5, torch.randperm(N), _data(N, D)
NORMALIZED = _data(N, N)


@pytest.mark.parametrize(
    ("data", "prepared"),
    [
        (NORMALIZED, lambda x: (x - MEAN) / STD),
        (NORMALIZED, lambda x: (x - MEAN[None]) / STD.expand_as(x)),
        (NORMALIZED, lambda x: torch.where(MEAN > 0, x, 0.0) + x.masked_fill(MEAN > 0, 0.0)),
        (NORMALIZED, lambda x: x[:, ORDER]),
        (_data(N, N, 2), lambda x: ((x - MEAN.view(1, -1, 1)) / STD[:, None])[..., 0]),
        (_data(N, N, D), lambda x: (x + TABLE).flatten(1)[:, :N]),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_as_many_samples_as_features(data: Tensor, prepared: Callable[[Tensor], Tensor], named: bool) -> None:
    """A mean for each feature, an order of them, a table of positions: what needs no gradient and does not agree with
    the batch carries no samples."""
    net = _linear(width=N)
    losses = F.cross_entropy(net(prepared(data)), LABELS, reduction="none")
    with fastmtl.one_pass(net, IDS, T) as bank:
        x = bank.samples(data) if named else data
        F.cross_entropy(net(prepared(x)), LABELS, reduction="sum").backward()
    for t in range(T):
        want = torch.autograd.grad(losses[t == IDS].sum(), list(net.parameters()), retain_graph=True)
        for got, expected in zip(bank.row(t), want, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "prepared",
    [
        lambda x: x + x.T,
        lambda x: (x[:, None] - x).norm(dim=-1),
        lambda x: x @ x.T,
        lambda x: x @ TABLE @ TABLE.T,
        lambda x: MEAN.outer(STD) @ x,
        lambda x: MEAN.diag() @ x,
    ],
)
def test_data_that_may_mix_samples(prepared: Callable[[Tensor], Tensor]) -> None:
    net = _linear(width=N)
    match = "meets the samples in linear|meets what depends on several samples"
    with pytest.raises(ValueError, match=match), fastmtl.one_pass(net, IDS, T):
        net(prepared(NORMALIZED)).square().sum().backward()


def test_a_last_batch_of_as_many_samples_as_features() -> None:
    """What carried no samples of the batch before carries none of a shorter one."""
    net, anchors = _linear(), _data(4, D)
    with fastmtl.one_pass(net, IDS, T):
        (_losses(net) * anchors.mean()).sum().backward()
    with pytest.raises(ValueError, match="no tensor with 4"), fastmtl.one_pass(net, IDS[:4], T):
        net(anchors).sum().backward()
    anchors.mul_(2)  # no longer what it was
    with fastmtl.one_pass(net, IDS[:4], T) as bank:
        net(anchors).sum().backward()
    assert bank.row(0)[0] is not None


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: torch.zeros(2).double().scatter_add(0, torch.arange(N) % 2, x).square().sum(),
        lambda x: torch.zeros(2).double().index_add(0, torch.arange(N) % 2, x).sqrt().sum(),
        lambda x: torch.stack([x[:3].mean(), x[3:].mean()]).sqrt().sum(),
        lambda x: sum(x[i : i + 2].mean().log() for i in range(N - 1)),
        lambda x: x[IDS == 0].mean() * x[IDS == 1].mean(),
        lambda x: x[IDS == 0].mean() / x.mean(),
    ],
)
def test_groups_of_several_tasks_are_refused(loss: Callable[[Tensor], Tensor]) -> None:
    net = _linear()
    with pytest.raises(ValueError, match=r"mixes samples|can't be told"), fastmtl.one_pass(net, IDS, T):
        loss(_losses(net)).backward()


def test_sums_of_absent_tasks_meet_no_parameter() -> None:
    """A place where no sample arrives belongs to no task."""
    net, head = _linear(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    with (
        pytest.raises(ValueError, match="some positions carry no sample"),
        fastmtl.one_pass([net.weight, head], IDS, T),
    ):
        sums = torch.zeros(T + 1, 1).double().index_add(0, IDS, _losses(net)[:, None])
        (sums * head).sum().backward()


def test_a_table_of_samples() -> None:
    """`F.embedding` picks whole samples, which are not those that the numbers belong to."""
    net = _linear()
    with pytest.raises(ValueError, match=r"table carries samples|mixes samples"), fastmtl.one_pass(net, IDS, T):
        F.embedding(EVERY, net(X)).square().sum(1).mean().sqrt().backward()
