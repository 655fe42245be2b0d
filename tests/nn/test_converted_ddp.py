"""Converted networks under `DistributedDataParallel`, each rank with samples of other tasks, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import converted_ddp as cd
import pytest
import torch
import torch.multiprocessing as mp

from fastmtl.parameters import is_per_task

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
RANKS = 2
LIMIT = 240  # seconds for all cases; they take about 10


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(cd.main, (RANKS, str(folder)), nprocs=RANKS, join=False, start_method="spawn")
    try:
        for _ in range(LIMIT):
            if context.join(timeout=1):
                break
        else:
            pytest.fail(f"{RANKS} ranks did not finish within {LIMIT} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"found{rank}", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("case", list(cd.cases()), ids=" ".join)
def test_ranks_train_as_one_process_on_all_samples(found: Any, case: tuple[str, str]) -> None:
    ranks = [by_case[case] for by_case in found]
    failures = [x for x in ranks if isinstance(x, str)]
    assert not failures, "\n".join(failures)
    want = cd.trained(*case, None, RANKS)
    before = dict(cd.net(case[0]).named_parameters())
    absent = {t for t in range(len(cd.NAMES)) if not any(t in ids for ids in cd.IDS[case[0]])}
    for name, x in want.items():
        first, second = (rank[name] for rank in ranks)
        if x is None:
            assert first is None and second is None, name
            continue
        assert torch.equal(first, second), f"{name} differs between the ranks"
        torch.testing.assert_close(first, x, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    for name, p in before.items():
        task = name.rsplit(".", 1)[1]
        if is_per_task(p) and cd.NAMES.index(task) in absent:
            assert want[f"{name}.grad"] is None and torch.equal(want[name], p), name
        elif want[f"{name}.grad"] is not None:
            assert not torch.equal(want[name], p), f"{name} was not trained"
