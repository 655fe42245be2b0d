"""Several processes against one: `distributed_cases.py` is what each rank runs, in one start for all cases."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absent_tasks
import distributed_cases as dc
import pytest
import torch
import torch.multiprocessing as mp
from paths import ROOT
from torch import Tensor, nn

import fastmtl
from fastmtl.distributed.wrappers import find_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
LIMIT = 150  # seconds for all cases of one start; they take 15 to 30


def _run(size: int, folder: Path) -> dict[str, list[Any]]:
    context = mp.start_processes(dc.main, (size, str(folder)), nprocs=size, join=False, start_method="spawn")
    try:
        for _ in range(LIMIT):
            if context.join(timeout=1):
                break
        else:
            running = [path.read_text() for path in sorted(folder.glob("running*"))]
            pytest.fail(f"{size} ranks did not finish within {LIMIT} s; they were in {running}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    found = [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(size)]
    return {name: [ranks[name] for ranks in found] for name in found[0]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return _run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return _run(4, tmp_path_factory.mktemp("four"))


SIZES = [2, 4]


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Callable[[int, str], list[Any]]:
    """What each rank returned for a case; a case that raised on any rank fails here."""

    def get(size: int, name: str) -> list[Any]:
        found = request.getfixturevalue({2: "two", 4: "four"}[size])[name]
        failures = [x for x in found if isinstance(x, str)]
        assert not failures, "\n".join(failures)
        return found

    return get


def same(found: Sequence[Any], want: dict[str, Any], rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Every rank has what one process has, and all have the same bits."""
    for rank, got in enumerate(found):
        assert got.keys() >= want.keys()
        for key, value in want.items():
            if isinstance(value, dict):
                assert got[key].keys() == value.keys()
                for name, x in value.items():
                    y = got[key][name]
                    assert (x is None) == (y is None), f"rank {rank}: {key} of {name} is {y}, expected {x}"
                    if x is not None:
                        torch.testing.assert_close(y, x, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
                        assert torch.equal(y, found[0][key][name]), f"rank {rank} has another {key} of {name}"
            elif isinstance(value, Tensor):
                torch.testing.assert_close(got[key], value, rtol=rtol, atol=atol)
                assert torch.equal(got[key], found[0][key]), f"rank {rank} has another {key}"
            else:
                assert got[key] == value, f"rank {rank}: {key}"


def losses_over_ranks(model: nn.Module, size: int, absent: Callable[[int], Sequence[int]]) -> list[Tensor | None]:
    """What the ranks optimise together: the mean over them of each task's loss, nothing where a task is absent."""
    totals: list[Tensor | None] = [None] * 3
    for rank in range(size):
        for t, loss in enumerate(dc.losses_of(model(dc.batch(rank, size)))):
            if t not in absent(rank):
                totals[t] = loss / size + (0 if totals[t] is None else totals[t])
    return totals


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", dc.METHODS)
@pytest.mark.parametrize("kind", ["", "fully_shard "])
def test_backward_equals_one_process(results, size, method, kind):
    want = dc.by_backward(dc.net(), 0, 1, method)
    assert bool((want["gram"] < 0).any()) and want["weights"].std() > 0
    same(results(size, f"{kind}backward {method}"), want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["needs", "needs of bank", "median"])
@pytest.mark.parametrize("kind", ["", "fully_shard "])
def test_methods_with_needs_equal_one_process(results, size, name, kind):
    by = {"needs": dc.by_needs, "needs of bank": dc.by_needs_of_bank, "median": dc.by_median}[name]
    same(results(size, kind + name), by(dc.net(), 0, 1))


def test_every_rank_would_draw_another_order():
    # else no test here would see ranks that draw for themselves
    seen = []
    for rank in range(4):
        losses = dc.losses_of(dc.net()(dc.batch(0, 1)))
        dc.seed_for(rank)
        seen.append(fastmtl.backward(losses).weights)
    assert all(not torch.allclose(seen[0], w, rtol=1e-2) for w in seen[1:])


@pytest.mark.parametrize("name", ["find_unused", "static_graph", "chunks", "in_many_buckets"])
def test_backward_with_ddp_options(results, name):
    want = dc.by_backward(dc.net(), 0, 1, "fixed")
    same(results(2, f"backward_{name}"), {**want, "first": want["grads"]} if name == "static_graph" else want)


@pytest.mark.parametrize("name", ["backward_process_group", "backward_process_group_and_no_params"])
def test_backward_with_a_process_group_and_a_plain_model(results, name):
    same(results(2, name), dc.by_backward(dc.net(), 0, 1, "random"))


def test_outputs_of_ddp_are_told_apart(results):
    want = dc.by_towers(dc.net(cls=dc.Towers), 0, 1)
    # the first two losses share nothing with any other, the last two a tower
    assert (want["gram"] != 0).tolist() == [[False] * 4] * 2 + [[False, False, True, True]] * 2
    same(results(2, "backward_towers"), want)


def test_inputs_of_fully_shard_are_told_apart(results):
    want = dc.by_joined(dc.net(cls=dc.Joined), 0, 1)
    model = dc.net(cls=dc.Joined)
    fastmtl.backward([dc.loss_of(t, y) for t, y in enumerate(model(dc.batch(0, 1)))], shared=model.trunk)
    same([want], dc.seen(model))  # the towers are each task's own
    same(results(2, "fully_shard_with_two_inputs"), want)


def test_backward_with_a_loss_scale(results):
    want = dc.by_backward(dc.net(), 0, 1, "min_norm", loss_scale=4.0)
    same(results(2, "backward_loss_scale"), want)


def test_channels_last_and_parameters_of_two_dtypes(results):
    want = dc.by_convolution(dc.convolution(), 0, 1)
    assert want["channels_last"]
    same(results(2, "backward_channels_last_and_mixed_dtypes"), want)


@pytest.mark.parametrize(
    ("size", "name", "method", "absent"),
    [
        (2, "backward_absent_on_rank_1", "fixed", lambda r: [2] if r == 1 else []),
        (4, "backward_absent_on_rank_1", "fixed", lambda r: [2] if r == 1 else []),
        (2, "backward_nothing_on_rank_1", "min_norm", lambda r: [0, 1, 2] if r == 1 else []),
        (2, "backward_in_its_own_memory", "fixed", lambda r: [2] if r == 1 else []),
        (2, "backward_each_rank_a_task", "fixed", lambda r: [t for t in range(3) if t != r]),
    ],
)
def test_a_task_is_present_where_any_rank_has_it(results, size, name, method, absent):
    model = dc.net()
    losses = losses_over_ranks(model, size, absent)
    surgery = fastmtl.backward(losses, model, method=dc.METHODS[method])
    assert surgery.present == (True, True, name != "backward_each_rank_a_task")
    same(results(size, name), dc.seen(model, surgery))


@pytest.mark.parametrize("method", dc.METHODS)
def test_features_equal_one_process(results, method):
    same(results(2, f"features {method}"), dc.by_features(dc.net(), 0, 1, method))


def test_features_with_no_loss_on_one_rank(results):
    model = dc.net()
    *outs, h = model(dc.batch(0, 2), features=True)
    losses: list[Tensor | None] = [loss / 2 for loss in dc.losses_of(outs)]
    losses[1] = None
    shared = [p for n, p in model.trunk.named_parameters() if n != "0.bias"]
    surgery = fastmtl.backward(losses, model, features=h, shared=shared, method=dc.min_norm)
    same(results(2, "features_nothing_on_rank_1"), dc.seen(model, surgery))


def test_what_is_not_finite_on_one_rank_shows_on_all(results):
    first, second = results(2, "not_finite_on_rank_1")
    assert first == second
    for finite in first:
        assert not any(here for name, here in finite.items() if name.startswith("trunk"))
        assert {name[:7] for name, here in finite.items() if not here} == {"trunk.0", "trunk.2", "heads.0"}


def test_compiled(results):
    same(results(2, "backward_compiled"), dc.by_backward(dc.net(), 0, 1, "fixed"))


def test_gradients_that_somebody_holds_are_not_overwritten(results):
    assert results(2, "gradients_that_somebody_holds") == [[True] * 9] * 2


def test_sparse_tables_stay_sparse(results):
    found = results(2, "sparse_tables")
    model = dc.net(cls=dc.Embedded)
    want = dc.by_sparse(model, 0, 1, [])
    assert want["sparse"]
    same([ranks[0] for ranks in found], want)
    # the second time rank 1 has only the task that does not use the table
    model.zero_grad()
    parts = [model.losses(0, 2, []), model.losses(1, 2, [0, 1])]
    losses = [parts[0][0] / 2, parts[0][1] / 2, (parts[0][2] + parts[1][2]) / 2]
    surgery = fastmtl.backward(losses, model, shared=model.trunk, method=dc.METHODS["fixed"])
    want = {**dc.seen(model, surgery), "sparse": True}
    want["grads"]["table.weight"] = model.table.weight.grad.to_dense()
    same([ranks[1] for ranks in found], want)


@pytest.mark.parametrize("method", ["random", "min_norm"])
@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_groups_equal_one_process(results, method, kind):
    want = dc.by_backward(dc.net(), 0, 1, method, groups="tensor")
    assert want["weights"].shape == (4, 3) and not torch.equal(want["weights"][0], want["weights"][2])
    same(results(2, f"groups {kind} {method}"), want)


def test_groups_of_modules_under_fully_shard(results):
    model = dc.net()
    same(
        results(2, "groups_of_modules"),
        dc.by_backward(model, 0, 1, "fixed", groups=[model.trunk[2], model.trunk[0]]),
    )


def test_ranks_agree_on_the_groups_and_on_the_method_whose_weights_are_reused(results):
    for groups, method in results(2, "groups_and_reused_methods_that_disagree"):
        assert groups.startswith("ValueError: fastmtl.backward with groups"), groups
        assert "the ranks disagree on what they call: rank 0 has" in groups, groups
        assert method.endswith("the ranks disagree on the method: rank 0 has Every(Mean), rank 1 has Every(Sum)"), (
            method
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["fixed", "random", "min_norm"])
@pytest.mark.parametrize("kind", ["ddp", "fully_shard"])
def test_reused_weights_equal_one_process(results, size, method, kind):
    want = dc.by_every(dc.net(), 0, 1, method)
    assert want["reused"] == [False, True, True, False, True]
    same(results(size, f"every {kind} {method}"), want)


@pytest.mark.parametrize("name", ["features", "process_group", "loss_scale"])
def test_reused_weights_with_other_options(results, name):
    options = {"features": {"features": True}, "loss_scale": {"method": "min_norm", "loss_scale": 4.0}}
    same(results(2, f"every {name}"), dc.by_every(dc.net(), 0, 1, **options.get(name, {})))


def test_a_rank_that_forgets_its_weights_makes_all_ask(results):
    found = results(2, "every_with_a_rank_that_forgets")
    assert all(rank["reused"] == [False, True, False, True, True] for rank in found)
    first = dc.by_every(dc.net(), 0, 1, "fixed", steps=2)
    again = dc.by_every(dc.net(), 0, 1, "fixed", steps=1)
    for rank in found:
        torch.testing.assert_close(rank["weights"][:2], first["weights"], rtol=1e-4, atol=1e-6)
        assert torch.equal(rank["weights"], found[0]["weights"])
        assert not torch.equal(rank["weights"][2], again["weights"][0])  # another batch


@pytest.mark.parametrize(
    ("name", "reused", "absent"),
    [
        # on one rank alone: all that is asked is whether the task is there on any
        (
            "every_with_tasks_absent",
            [False, True, True, False, False],
            lambda step, r: [2] if step == 3 or (step == 1 and r) else [],
        ),
        (
            "every_with_nothing_on_rank_1",
            [False, True, True, False, True],
            lambda step, r: [0, 1, 2] if step == 1 and r else [],
        ),
    ],
)
def test_reused_weights_with_tasks_on_some_ranks(results, name, reused, absent):
    model, every = dc.net(), dc.methods.Every(dc.METHODS["fixed"], 3)
    want: dict[str, Any] = {}
    for step in range(5):
        model.zero_grad()
        totals: list[Tensor | None] = [None] * 3
        for rank in range(2):
            for t, loss in enumerate(dc.losses_of(model(dc.batch(rank, 2, seed=step)))):
                if t not in absent(step, rank):
                    totals[t] = loss / 2 + (0 if totals[t] is None else totals[t])
        fastmtl.backward(totals, model, method=every)
        want |= {f"{step} {n}": g for n, g in dc.seen(model)["grads"].items()}
    found = results(2, name)
    same(found, {"grads": want, "reused": reused})


def test_what_is_not_finite_in_a_reused_step_shows_on_all_ranks(results):
    first, second = results(2, "every_not_finite_on_rank_1")
    assert first == second
    assert first["reused"] == [False, True, False, True, True]
    assert first["norms"] == [True, False, True, True, True]
    broken = {n for n, here in first["finite"].items() if not here}
    assert broken == {
        f"1 {n}"
        for n in ("trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias", "heads.0.weight", "heads.0.bias")
    }


@pytest.mark.parametrize("method", ["fixed", "random", "min_norm"])
def test_bank_equals_one_process(results, method):
    same(results(2, f"bank {method}"), dc.by_bank(dc.net(), 0, 1, method))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["fixed", "random", "min_norm"])
def test_bank_on_fully_shard(results, size, method):
    want = dc.by_bank(dc.net(), 0, 1, method)
    same(results(size, f"fully_shard bank {method}"), want)


@pytest.mark.parametrize("views", ["views", "copies"])
@pytest.mark.parametrize("sync", ["synced", "no_sync"])
def test_bank_whether_or_not_ddp_has_reduced(results, sync, views):
    # synced, there is a `.grad` from before, which DDP's views must not overwrite
    want = dc.by_bank(dc.net(), 0, 1, "fixed", before=sync == "synced")
    same(results(2, f"bank {sync} {views}"), want)


def test_bank_with_a_process_group_and_a_list(results):
    same(results(2, "bank_process_group"), dc.by_bank(dc.net(), 0, 1, "random"))


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("bank_each_rank_a_task", lambda r: [t for t in range(3) if t != r]),
        ("bank_nothing_on_rank_1", lambda r: [0, 1, 2] if r == 1 else []),
    ],
)
def test_bank_with_tasks_on_some_ranks(results, name, absent):
    model = dc.net()
    losses = losses_over_ranks(model, 2, absent)
    surgery = fastmtl.backward(losses, model, method=dc.METHODS["fixed"])
    same(results(2, name), dc.seen(model, surgery))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["fixed", "random"])
def test_optimizer_equals_one_process(results, size, method):
    same(results(size, f"optimizer {method}"), dc.by_optimizer(dc.net(), 0, 1, method))


@pytest.mark.parametrize("method", ["fixed", "random"])
def test_optimizer_on_fully_shard(results, method):
    same(results(2, f"fully_shard optimizer {method}"), dc.by_optimizer(dc.net(), 0, 1, method))


def test_optimizer_with_a_process_group(results):
    same(results(2, "optimizer_by_process_group"), dc.by_optimizer(dc.net(), 0, 1, "random"))


def test_sharded_within_replicas(results):
    found = results(4, "hybrid_shard")
    for i, method in enumerate(("random", "min_norm")):
        same([ranks[i] for ranks in found], dc.by_backward(dc.net(), 0, 1, method))


def test_fully_shard_accumulates_and_stays_sharded(results):
    model = dc.net()
    dc.by_backward(model, 0, 1, "fixed")
    want = dc.by_backward(model, 0, 1, "fixed")
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = results(2, "fully_shard_accumulates_and_stays_sharded")
    # once per call of backward, with the final gradient
    same(found, {**want, "moved": dc.seen_weights(model), "calls": ["DTensor"] * 2, "kinds": {True}})


def test_fully_shard_bank_made_in_mid_step(results):
    same(results(2, "fully_shard_bank_made_in_mid_step"), dc.by_backward(dc.net(), 0, 1, "fixed"))


# --- what is refused, on every rank


@pytest.mark.parametrize("size", SIZES)
def test_refuses_where_it_cannot_know(results, size):
    unknown = rf"RuntimeError: .*{size} ranks, and no way to know .* params= .*process_group="
    for found in results(size, "refuses_where_it_cannot_know"):
        assert found.pop("grads"), "something was written"
        outside = found.pop("outside")
        assert outside.startswith("RuntimeError: fastmtl.backward: parameter '1.weight' of shape [2, 2] is in no Distr")
        assert "find_unused_parameters=True, which returns a copy of each output" in found.pop("copies")
        assert found.pop("a number").endswith("process_group: expected a process group or None, got int")
        for error in found.values():
            assert _matches(unknown, error)


@pytest.mark.parametrize("size", SIZES)
def test_refuses_disagreement_on_every_rank(results, size):
    last = size - 1
    for rank, found in enumerate(results(size, "refuses_disagreement")):
        assert found.pop("grads"), "something was written"
        assert found.pop("still works") == (True, True, True)
        alone = found.pop("one rank raises")
        assert ("needs no gradient" in alone) and (rank == last or f"rank {last} raised, so that no rank" in alone)
        assert "at least one loss, got 2 times None on every rank" in found.pop("absent everywhere")
        wanted = {
            "number of tasks": f"the number of tasks: rank 0 has 3, rank {last} has 2",
            "names": f"the names of the tasks: rank 0 has ['a', 'b', 'c'], rank {last} has ['a', 'b', 'x']",
            "order": "parameter 0 (are they in the same order?): rank 0 has params[0] of shape [6, 4]",
            "count": f"the number of parameters: rank 0 has 10, rank {last} has 9",
            "method": f"the method: rank 0 has PCGrad, rank {last} has Sum",
            "shared": "whether parameter 'module.trunk.2.weight' is in shared=: rank 0 has True",
            "bank": f"the number of tasks: rank 0 has 3, rank {last} has 4",
            "features": f"what they call: rank 0 has fastmtl.backward, rank {last} has fastmtl.backward with features=",
            "waiting": f"whether a SyncBatchNorm is in training: rank 0 has True, rank {last} has False",
            "shape": "parameter 0 (are they in the same order?): rank 0 has 'weight' of shape [2, 4], torch.float32, "
            f"rank {last} has 'weight' of shape [3, 4]",
        }
        assert found.keys() == wanted.keys()
        for key, error in found.items():
            assert error.startswith("ValueError: ") and f"the ranks disagree on {wanted[key]}" in error


def test_refuses_absent_tasks_where_ranks_wait_in_backward(results):
    want = dc.by_backward(dc.net(), 0, 1, "fixed")["weights"]
    for message, weights in results(2, "refuses_absent_tasks_where_ranks_wait_in_backward"):
        assert _matches("ValueError: .*present tasks .*rank 0: 0, 1, 2; on rank 1: 0.: .*SyncBatchNorm", message)
        torch.testing.assert_close(weights, want, rtol=1e-4, atol=1e-6)


def test_bank_keeps_its_rows_when_the_method_raises(results):
    found = results(2, "bank_keeps_its_rows_when_the_method_raises")
    for rank, ranks in enumerate(found):
        first, second = ranks.pop("errors")
        assert "KeyError: 'mine'" in first and "got 'nash'" in second
        assert ("rank 1 raised" in second) == (rank == 0)
    same(found, dc.by_bank(dc.net(), 0, 1, "fixed"))


def test_a_method_that_raises_on_one_rank_stops_all(results):
    first, second = results(2, "method_that_raises_on_one_rank")
    for key in ("plain", "features", "groups"):
        error, grad = second[key]
        assert error == "KeyError: 'mine'" and grad is None
        error, grad = first[key]
        assert "rank 1 raised, so that no rank goes on: KeyError: 'mine'" in error and grad is None


def test_refuses_other_parallelism(results):
    wanted = {
        "tensor parallel": "TypeError: .*trunk.0.weight.* is a DTensor .*Tensor-parallel parameters are not supported",
        "tensor parallel alone": "TypeError: .*trunk.0.weight.* is a DTensor .*Tensor-parallel parameters are not",
        "not a member": "ValueError: .*process_group: expected a group that this rank is in",
        "list of shards": "TypeError: .*For a fully_shard module pass params= the module itself",
        "group of shards": "ValueError: .*process_group: expected None for a fully_shard module",
        "features of shards": "ValueError: .*features: not available for fully_shard",
        "chunks of shards": "ValueError: .*chunk_size: not available for fully_shard",
        "absent": "ValueError: .*the ranks disagree on the present tasks .*0, 1, 2; on rank 1: 0, 2.*0 . output.sum",
        "not reduced": r"RuntimeError: fastmtl.backward: .*set_requires_gradient_sync\(False\)",
        "not reduced in the bank": r"RuntimeError: GradientBank.task: .*set_requires_gradient_sync\(False\)",
    }
    for found in results(2, "refuses_other_parallelism"):
        alone = found.pop("alone")
        assert found.keys() == wanted.keys()
        for key, error in found.items():
            assert _matches(wanted[key], error)
        same([alone], dc.by_backward(dc.net(), 0, 1, "fixed"))


def _matches(pattern: str, text: str) -> bool:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)
    return True


# --- rows of a batch whose samples have a task each


def whole_batch(reduction: str, dtype: torch.dtype, size: int) -> dict[str, Any]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
    model, rows, loose, counts = dc.rows_of_mixed_batch(x, dc.IDS, reduction, dtype=dtype)
    assert counts.tolist() == [3, 3, 1, 1]
    names = {p: name for name, p in model.trunk.named_parameters()}
    # sums divided by a constant: the mean over the ranks is all of them, divided by their number
    over = size if reduction == "sum" else 1
    return {
        "rows": {names[p]: g / over for p, g in rows.items()},
        "loose": {names[p]: g / over for p, g in loose.items()},
        "totals": counts,
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_of_uneven_parts(results, size, reduction, dtype):
    found = [ranks[f"{reduction} {dtype}"] for ranks in results(size, "rows_of_uneven_parts")]
    want = whole_batch(reduction, dtype, size)
    rtol, atol = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (5e-2, 5e-2), torch.float64: (1e-12, 1e-13)}[dtype]
    same(found, want, rtol, atol)


def test_rows_in_large_and_small_buckets(results):
    same(results(2, "rows_in_large_and_small_buckets"), whole_batch("mean", torch.float32, 2), 1e-5, 1e-6)


def test_rows_that_disagree_are_refused_on_every_rank(results):
    wanted = {
        "tasks": "ValueError: .*disagree on the number of tasks: rank 0 has 3, rank 1 has 4",
        "names": "ValueError: .*disagree on the names of the tasks",
        "order": "ValueError: .*disagree on parameter 0.*rank 0 has 0.weight of shape .6, 4., .*rank 1 has 2.bias",
        "reduction": "ValueError: .*rank 0 has loss_reduction='sum', rank 1 has loss_reduction='mean'",
        "unknown": "loss_reduction: expected 'sum' or 'mean', got 'median'",
        "counts": "counts: expected torch.int64 of shape .4., got torch.float32",
        "rows": "rows of parameter 0.weight .*: expected shape .3, 6, 4., got .4, 6, 4.",
    }
    for found in results(2, "rows_that_disagree"):
        assert found.pop("untouched")
        for key, error in found.items():
            assert _matches(wanted[key], error)


# --- one process


def test_a_process_alone_has_no_ranks(tmp_path):
    model = nn.Linear(2, 2)
    assert find_ranks(model, None, None, "test") is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model)
        for params, group in ((model, None), (ddp, None), (None, torch.distributed.group.WORLD)):
            assert find_ranks(params, None, group, "test") is None
        want = dc.by_backward(dc.net(), 0, 1, "fixed")
        same([dc.by_backward(nn.parallel.DistributedDataParallel(dc.net()), 0, 1, "fixed")], want)
        sharded = dc.by_backward(dc.shard(dc.net()), 0, 1, "fixed")
        same([sharded], want)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("torchrun") / "one"
    _example([], path, "step 5/5 on 1 ranks: losses")
    return torch.load(path)


def _example(start: list[str], path: Path, shown: str, *options: str) -> None:
    script, leave = ROOT / "examples" / "distributed.py", ROOT / "tests" / "helpers" / "run_and_leave.py"
    done = subprocess.run(
        [sys.executable, *start, str(leave), str(script), "--steps=5", f"--save={path}", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard"])
def test_started_by_torchrun(tmp_path, one_process, wrapper):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    _example(torchrun, tmp_path / "two", "step 5/5 on 2 ranks: losses", f"--wrapper={wrapper}")
    two = torch.load(tmp_path / "two")
    assert two.keys() == one_process.keys()
    for key, value in one_process.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wrap", ["ddp", "group"])
@pytest.mark.parametrize("method", dc.ONE_PASS_METHODS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_pass_of_uneven_parts(results, size, reduction, method, wrap):
    x = torch.cat([part for part, _ in dc.one_pass_parts(size)])
    want = dc.one_pass_step(x, dc.IDS, 1, reduction, dc.ONE_PASS_METHODS[method], "none")
    for found in results(size, "one_pass_of_uneven_parts"):
        got = found[f"{reduction} {method} {wrap}"]
        assert tuple(got["present"]) == (True,) * 3
        torch.testing.assert_close(got["gram"], want["gram"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got["weights"], want["weights"], rtol=1e-3, atol=1e-5)
        for name, g in want["grads"].items():
            if g is None:
                assert got["grads"][name] is None
            else:
                torch.testing.assert_close(got["grads"][name], g, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "way", "mode"),
    [(2, *case) for case in absent_tasks.CASES] + [(4, *case) for case in absent_tasks.ON_FOUR],
)
def test_layers_with_parts_of_tasks_that_some_ranks_do_not_have(results, size, way, mode):
    want = absent_tasks.of_one_process(way, size)
    # DDP has a gradient for every parameter, unless it looks for those that no rank has used
    with_zeros = mode == "static_graph" or (mode == "plain" and way != "fastmtl.backward")
    absent = 0
    for found in results(size, f"{way}, {mode}"):
        for number, (grads, expected) in enumerate(zip(found, want, strict=True)):
            for name, g in expected.items():
                if g is None and with_zeros:
                    assert grads[name] is not None and grads[name].count_nonzero() == 0, (number, name)
                elif g is None:
                    assert grads[name] is None, (number, name)
                else:
                    torch.testing.assert_close(
                        grads[name], g, rtol=1e-9, atol=1e-11, msg=lambda m, n=name, k=number: f"step {k}: {n}: {m}"
                    )
                absent += g is None
    assert absent


def test_ids_out_of_range_on_one_rank_are_nan_on_all(results):
    for found in results(2, "one_pass_of_wrong_ids"):
        assert found.keys() == dc.METHODS.keys()
        for tensors in found.values():
            assert all(x.isnan().all() for x in tensors)


def test_one_pass_errors(results):
    for found in results(2, "one_pass_errors"):
        assert re.search("process_group", found["no group"])
        assert re.search("memory: 'stream'", found["stream"])
        assert re.search("fully_shard modules work with fastmtl.backward", found["sharded"])
        assert re.search("loss_reduction: expected 'sum' where parameters outside the bank", found["heads"])
        assert re.search("disagree", found["tasks"])
        assert re.search("no backward pass has filled", found["empty"])
