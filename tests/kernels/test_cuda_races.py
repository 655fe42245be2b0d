"""The CUDA kernels' bodies under the checks of tests/host/races.h: no access that only luck puts in order.

That the checks see what they should: every barrier, fence and releasing atomic of csrc/cuda is left out in turn.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping

import host_kernels as host
import pytest
import test_cuda_on_host as on_host
import torch
from cases import BankCase, ListCase, random_order, random_weights
from conftest import skip_or_fail
from host_kernels import FORWARD, REVERSE, Cut, HostError

from fastmtl.ops.gradients.arguments import read_lists
from fastmtl.ops.gradients.method_weights import OPTIONS
from fastmtl.ops.gradients.order import order_state

CUDA = host.ROOT / "csrc" / "cuda"
SOLVERS = host.ROOT / "csrc" / "common" / "solvers"


@pytest.fixture(scope="module", autouse=True)
def built() -> Iterator[None]:
    if host.compiler() is None:
        skip_or_fail("no C++ compiler")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    with host.using(host.RACES):
        host.library()
        yield
    torch.set_num_threads(threads)


def drawn(num_tasks: int, slots_per_group: int, schedule: int) -> None:
    """An order that is drawn, of a bank of five slots."""
    grads = host.bank_gradients(BankCase(num_tasks, 300).make())
    cut = Cut(64, slots_per_group, schedule)
    host.solved_gram(grads, None, cut, project=True, key=3, state=order_state(7))
    assert cut.slots == 5


def solved(num_tasks: int, num_visits: int | None) -> None:
    order = random_order(num_tasks, num_visits)
    host.coefficients(on_host.gram_matrix(num_tasks), order, schedule=FORWARD)


def weighted(method: str, num_tasks: int, kind: str, schedule: int) -> None:
    """The weights of a method."""
    m = on_host.method_gram(num_tasks, kind)
    options = {**on_host.METHOD_OPTIONS, "nashmtl": [0.5]}.get(method, [])
    host.method_weights(m, list(OPTIONS).index(method), options, schedule=schedule)


def turned(num_tasks: int, schedule: int) -> None:
    """GradVac's coefficients, of gradients that conflict."""
    m, targets = on_host.method_gram(num_tasks, "conflicts"), on_host.gradvac_targets(num_tasks)
    host.gradvac(m, random_order(num_tasks), targets, 0.1, schedule=schedule)


def grams_of_groups(num_tasks: int, per_ticket: int, schedule: int) -> None:
    """Groups of one slot and of several."""
    rows = read_lists([list(row.split((40, 200, 64, 70))) for row in BankCase(num_tasks, 374).make()])
    host.gram_groups(host.list_gradients(rows), [1, 0, 1, 1], 2, Cut(64, per_ticket, schedule))


def combined_groups(num_tasks: int, schedule: int) -> None:
    case = ListCase("nones", num_tasks)
    both, groups, _ = on_host.grouped(case, 3)
    (out,) = on_host.list_outputs(case, 1)
    grads = host.list_gradients(both.rows, on_host.tensors([out]))
    host.combine_groups(random_weights((3, num_tasks)), grads, groups, Cut(64, 0, schedule))


def weights_of_groups(num_tasks: int, schedule: int) -> None:
    """PCGrad's, with a state that the last block advances."""
    m = torch.stack([on_host.gram_matrix(num_tasks)] * 3)
    host.pcgrad_weights(m, None, schedule, key=3, state=order_state(7))


# Every kernel, by banks and lists, with one group of slots and with several. In falling order first: a thread without
# its barrier then finds no segment, and in rising order wild pointers.
CASES: dict[str, Callable[[], None]] = {
    "drawn-7-9-falling": functools.partial(drawn, 7, 9, REVERSE),
    "grams-of-groups-3-falling": functools.partial(grams_of_groups, 3, 2, REVERSE),
    "combined-groups-3": functools.partial(combined_groups, 3, FORWARD),
    "weights-of-groups-5-falling": functools.partial(weights_of_groups, 5, REVERSE),
    "solved-8": functools.partial(solved, 8, None),
    "gradvac-7-falling": functools.partial(turned, 7, REVERSE),
    "gradvac-40": functools.partial(turned, 40, FORWARD),
    "gradvac-66": functools.partial(turned, 66, FORWARD),
    **{
        f"gradvac-step-{num_tasks}": functools.partial(on_host.test_gradvac_steps, num_tasks, "sum", [REVERSE, FORWARD])
        for num_tasks in (7, 40, 66)
    },
    "combine-bank": functools.partial(on_host.test_combine_of_a_bank, 17, 9, torch.float32),
    "combine-lists": functools.partial(on_host.test_combine_of_lists, ListCase("nones", 3), 9),
    "combine-split": functools.partial(on_host.test_split_combine_of_lists, ListCase("nones", 17)),
    **{
        f"drawn-{num_tasks}-{per_group}-{'falling' if schedule == REVERSE else 'rising'}": functools.partial(
            drawn, num_tasks, per_group, schedule
        )
        for num_tasks, per_group, schedule in (
            (2, 2, REVERSE),
            (2, 2, FORWARD),
            (12, 2, REVERSE),
            (12, 9, FORWARD),
            (19, 9, REVERSE),
            (40, 2, REVERSE),
            (66, 2, REVERSE),
            (66, 9, FORWARD),
        )
    },
    **{
        f"pcgrad-{case}": functools.partial(on_host.test_pcgrad, case, False)
        for case in (BankCase(17, 259, torch.bfloat16), ListCase("nones", 9), ListCase("mixed_dtypes", 3))
    },
    **{
        f"solved-{num_tasks}-{num_visits}": functools.partial(solved, num_tasks, num_visits)
        for num_tasks, num_visits in ((31, 40), (63, None), (70, None))
    },
    "grams-of-groups-12": functools.partial(grams_of_groups, 12, 2, FORWARD),
    "grams-of-groups-20-falling": functools.partial(grams_of_groups, 20, 1000, REVERSE),
    "grams-of-groups-66": functools.partial(grams_of_groups, 66, 2, FORWARD),
    "combined-groups-9-falling": functools.partial(combined_groups, 9, REVERSE),
    "weights-of-groups-20": functools.partial(weights_of_groups, 20, FORWARD),
    "weights-of-groups-66-falling": functools.partial(weights_of_groups, 66, REVERSE),
    "combine-many": functools.partial(on_host.test_combine_of_lists, ListCase("many", 3), 1),
}
# Every method by one warp and by several, with and without gradients that depend on each other.
METHOD_CASES: dict[str, Callable[[], None]] = {
    f"{method}-{num_tasks}-{kind}-{'falling' if schedule == REVERSE else 'rising'}": functools.partial(
        weighted, method, num_tasks, kind, schedule
    )
    for num_tasks, kind, schedule in (
        (6, "conflicts", REVERSE),
        (7, "few dimensions", FORWARD),
        (5, "lengths", FORWARD),
        (5, "degenerate", FORWARD),
        (18, "conflicts", FORWARD),
    )
    for method in OPTIONS
}
# some vectors leave the corral again
METHOD_CASES["mgda-14-few dimensions-rising"] = functools.partial(weighted, "mgda", 14, "few dimensions", FORWARD)
# what these keep, and the average of their weights
METHOD_CASES |= {
    f"{method}-step-{num_tasks}": functools.partial(
        on_host.test_method_steps, num_tasks, method, torch.float64, [REVERSE, FORWARD]
    )
    for method in on_host.STEP_OPTIONS
    for num_tasks in (6, 18)
}


@functools.cache
def sites_of(case: str) -> set[tuple[str, int]]:
    """The barriers, fences and atomics that a case runs, once it has shown that it runs without a race."""
    host.races_sites()
    (CASES | METHOD_CASES)[case]()
    return host.races_sites()


@pytest.mark.parametrize("case", CASES | METHOD_CASES)
def test_no_race(case: str) -> None:
    assert sites_of(case)


# --- that the checks can fail


@pytest.mark.parametrize("schedule", [FORWARD, REVERSE])
def test_races_of_a_small_kernel(schedule: int) -> None:
    host.faulty(0, schedule)
    with pytest.raises(HostError, match=r"a race in shared memory: .* at tests/host/kernels_on_host.cpp:\d+"):
        host.faulty(5, schedule)


SITES = {
    f"{path.name}:{number}": (path.name, number)
    # those of csrc/cuda/task_weights: test_cuda_task_kernels.py
    for path in (*sorted(CUDA.glob("*.cuh")), *sorted((CUDA / "gradients").glob("*.cuh")), *sorted(SOLVERS.glob("*.h")))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"\b(__syncthreads|__threadfence|__syncwarp|add_acq_rel|team\.sync)\([^`]*$", line)
    and path.name != "device.cuh"  # which defines them
}


def found_without(site: tuple[str, int], cases: Mapping[str, Callable[[], None]]) -> str:
    """What the checks say if that call is left out: in a process of its own, since it may read wild pointers then."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        host.library().races_skip(site[0].encode(), ctypes.c_int64(site[1]))
        for name, case in cases.items():
            try:
                case()
            except HostError as e:
                if "a race" in str(e):
                    os.write(writing, f"{name}: {e}".encode())
                    break
            except BaseException:  # a wrong result, which other tests see
                continue
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    status = os.waitpid(child, 0)[1]
    return text or (f"ended by signal {status}, nothing found" if status else "nothing found")


@pytest.mark.parametrize("site", SITES)
def test_a_barrier_or_fence_left_out_is_found(site: str) -> None:
    name = SITES[site][0]
    solves = name == "method_weights.cuh" or (name.endswith(".h") and name != "gradvac.h")
    cases = METHOD_CASES if solves else CASES
    # the others do the same without it
    reaching = {name: case for name, case in cases.items() if SITES[site] in sites_of(name)}
    assert reaching, "no case runs it"
    assert "a race in" in found_without(SITES[site], reaching)


def test_every_site_is_tried() -> None:
    assert len(SITES) >= 14
    assert found_without(("combine.cuh", 1), CASES) == "nothing found"
