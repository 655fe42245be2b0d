"""`one_pass` on a small model of every family of `transformers`, against T backward passes.

    python -m fastmtl.benchmarks.sweeps.one_pass_transformers                   # all: some ten minutes
    python -m fastmtl.benchmarks.sweeps.one_pass_transformers --family bert --family t5   # these, printed alone

In float64, on the CPU, each family in a process of its own with a limit of time. The loss of a sample is a number of
its part of the model's first result; samples belong to four tasks, and in the largest batch one belongs to none. Each
model runs in three modes (`memory="bank"` and `"stream"` in evaluation, and `"bank"` in training, with the dropout that
the family has; batch norms stay in evaluation, since their statistics mix samples) and with batches of 1, 4, 6 and 16
samples: 4 is also the number of heads and of experts, 6 that of words, and 16 that of patches. Models whose samples
see each other (the contrastive ones) must be refused.

Writes `benchmarks/results/sweeps/one_pass_transformers.json`, and the table of it in `docs/guides/one-pass-models.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastmtl
from fastmtl.benchmarks.runner import machine
from fastmtl.benchmarks.sweeps import small_models

TASKS = 4
SIZES = (4, 6, 1, 16)
MODES = ("bank", "stream", "training")
TOLERANCE = 1e-8  # of the length of each row
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/sweeps/one_pass_transformers.json"
PAGE = ROOT / "docs/guides/one-pass-models.md"
# of a family, the worst of its runs
STATES = ("wrong", "error", "too slow", "refused", "mixes samples", "right", "not built")

_MEANING = {
    "mixes samples": "that mix samples (refused, as they must be)",
    **{state: state for state in STATES if state != "mixes samples"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="a `model_type`, several times for several; default: all")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a family")
    parser.add_argument("--missing", action="store_true", help="only the families that the result does not have yet")
    parser.add_argument("--draw", action="store_true", help="write the page anew from the committed result")
    given = parser.parse_args()
    if given.draw:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    small_models.build("bert")  # loads what all have in common, so that no process of a family has to
    if given.family:
        print(json.dumps([sweep(family, given.limit) for family in given.family], indent=1))
        return
    described = machine.describe(torch.device("cpu"))
    results: dict[str, Any] = {
        "versions": described["versions"] | {"transformers": transformers.__version__},
        "commit": described["commit"],
        "uncommitted_changes": described["uncommitted_changes"],
        "date": described["date"],
        "families": json.loads(RESULTS.read_text())["families"] if given.missing else [],
    }
    there = {row["family"] for row in results["families"]}
    RESULTS.parent.mkdir(exist_ok=True)
    for family in small_models.families():
        if family in there:
            continue
        row = sweep(family, given.limit)
        results["families"].append(row)
        print(f"{family}: {row['state']} {row.get('why', '')}", flush=True)
        # an interrupted run keeps what it has, and goes on with --missing
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


def sweep(family: str, limit: float) -> dict[str, Any]:
    """What came of one family.

    Returns:
        `family`, `state` (one of `STATES`), `class` and `parameters` where a model was built, how many `runs` came out
        how, the `worst` relative error of a row that is not wrong, and `why` it is not right.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(family, there), daemon=True)
    worker.start()
    there.close()
    row: dict[str, Any] = {"family": family}
    runs: list[dict[str, Any]] = []
    end = time.monotonic() + limit
    finished = False
    while here.poll(max(0.0, end - time.monotonic())):
        try:
            told = here.recv()
        except EOFError:
            break
        if told is None:
            finished = True
            break
        if "mode" in told:
            runs.append(told)
        else:
            row |= told
    if worker.is_alive() and not finished:
        worker.kill()
    worker.join()
    if "state" in row:
        return row
    if not finished:
        slow = time.monotonic() >= end
        runs.append({"state": "too slow" if slow else "error", "why": "" if slow else f"exit code {worker.exitcode}"})
    row["state"] = next(state for state in STATES if any(run["state"] == state for run in runs))
    row["runs"] = dict(Counter(run["state"] for run in runs))
    row["worst"] = max((run["error"] for run in runs if run["state"] == "right"), default=None)
    bad = next((run for run in runs if run["state"] == row["state"]), None)
    if bad is not None and row["state"] != "right":
        where = f"{bad['mode']}, {bad['samples']} samples: " if "mode" in bad else ""
        row["why"] = f"{where}{bad['why']}"
    return row


def _work(family: str, out: Connection) -> None:
    # what models compute in float32 on purpose (norms, softmax, rotations) they compute in float64 here
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for told in runs_of(family):
        out.send(told)
    out.send(None)


def runs_of(family: str) -> Iterator[dict[str, Any]]:
    """What is built, and then what came of each run."""
    try:
        built = small_models.build(family)
        model = built.model
        given = small_models.inputs(model, SIZES[0], torch.Generator().manual_seed(0))
        model.eval()
        if not small_models.result(model, given, SIZES[0]).isfinite().all():
            raise small_models.Unbuildable("its results are no finite numbers")
        mixes = _mixes(model, given, SIZES[0])
    except small_models.Unbuildable as error:
        yield {"state": "not built", "why": str(error)}
        return
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        yield {"state": "not built", "why": f"{type(error).__name__}: {first}"}
        return
    yield {"class": built.kind, "parameters": sum(p.numel() for p in model.parameters())}
    if mixes:
        # its rows would be no gradients of tasks: that it is refused is right
        came = run(model, MODES[0], SIZES[0])
        if came["state"] == "refused":
            yield {"state": "mixes samples", "why": came["why"]}
        else:
            yield {
                "mode": MODES[0],
                "samples": SIZES[0],
                "state": "wrong",
                "why": f"it mixes samples, and is {came['state']}",
            }
        return
    for mode in MODES:
        for n in SIZES:
            yield {"mode": mode, "samples": n} | run(model, mode, n)


def _mixes(model: nn.Module, given: dict[str, Tensor], n: int) -> bool:
    """Whether a sample's part of the result depends on other samples: it is another beside others."""
    order = torch.arange(n)
    order[0] = 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = small_models.result(model, given, n)
        torch.manual_seed(1)
        other = small_models.result(model, {name: x[order] for name, x in given.items()}, n)
    return out.shape != other.shape or not torch.allclose(out[1:], other[1:], rtol=1e-9, atol=1e-12)


def run(model: nn.Module, mode: str, n: int) -> dict[str, Any]:
    """One run: its `state`, `why` it is not right, and the largest relative `error` of a row."""
    generator = torch.Generator().manual_seed(n)
    given = small_models.inputs(model, n, generator)
    ids = torch.randperm(n, generator=generator) % TASKS
    if n == max(SIZES):
        ids[3] = -1
    _set_training(model, mode == "training")
    try:
        with torch.random.fork_rng():
            want = _rows(model, given, ids)
    except Exception as error:
        return {"state": "right", "error": 0.0, "why": ""} if n == 1 else _error("torch itself", error)
    params = [p for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    try:
        # of an expert to which one task's words are sent by chance, it must be said that all share it
        memory = "stream" if mode == "stream" else "bank"
        with fastmtl.one_pass(model, ids, TASKS, memory=memory, shared=model) as bank:
            _losses(model, given, n).sum().backward()
        off = _streamed(bank, params, want) if mode == "stream" else _banked(bank, params, want)
    except ValueError as error:
        return {"state": "refused", "why": str(error)} if str(error).startswith("one_pass") else _error("", error)
    except Exception as error:
        return _error("", error)
    state = "right" if off <= TOLERANCE else "wrong"
    return {"state": state, "error": off, "why": "" if state == "right" else f"a row is {off:.1e} of its length off"}


def _error(where: str, error: Exception) -> dict[str, Any]:
    first = (str(error).strip().splitlines() or [""])[0]
    return {"state": "error", "why": f"{where} {type(error).__name__}: {first}".strip()}


def _set_training(model: nn.Module, training: bool) -> None:
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _losses(model: nn.Module, given: dict[str, Tensor], n: int) -> Tensor:
    torch.default_generator.manual_seed(1)
    out = small_models.result(model, given, n).flatten(1)
    return (out.tanh() * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).square().mean(1)


def _rows(model: nn.Module, given: dict[str, Tensor], ids: Tensor) -> list[list[Tensor]]:
    """Of each task, and then of the samples of no task, by a backward pass of its own."""
    params = [p for p in model.parameters() if p.requires_grad]
    losses = _losses(model, given, len(ids))
    rows = []
    for t in (*range(TASKS), -1):
        grads = torch.autograd.grad(losses[ids == t].sum(), params, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])
    return rows


def _banked(bank: fastmtl.OnePassBank, params: list[Tensor], want: list[list[Tensor]]) -> float:
    place = {id(p): k for k, p in enumerate(bank.params)}
    worst = 0.0
    for t in range(TASKS):
        row = bank.row(t)
        found = [row[place[id(p)]] for p in params]
        worst = max(
            worst, _off([torch.zeros_like(w) if g is None else g for g, w in zip(found, want[t], strict=True)], want[t])
        )
    bank.apply("sum")
    return max(worst, _off(_grads(params), [sum(rows) for rows in zip(*want, strict=True)]))  # type: ignore[list-item]


def _streamed(bank: fastmtl.OnePassBank, params: list[Tensor], want: list[list[Tensor]]) -> float:
    """The Gram matrix, and an update by weights that differ."""
    surgery = bank.apply("pcgrad")
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in want])
    lengths = flat[:TASKS].norm(dim=1)
    gram = (surgery.gram.double() - flat[:TASKS] @ flat[:TASKS].T).abs()
    scale = lengths[:, None] * lengths[None]
    worst = float((gram / scale.clamp(min=1e-300)).max())
    weights = torch.cat([surgery.weights.double(), torch.ones(1, dtype=torch.float64)])  # type: ignore[union-attr]
    update = [torch.tensordot(weights, torch.stack(rows), 1) for rows in zip(*want, strict=True)]
    return max(worst, _off(_grads(params), update))


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


def _off(got: list[Tensor], want: list[Tensor]) -> float:
    length = sum(float(w.square().sum()) for w in want) ** 0.5
    error = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True)) ** 0.5
    return error / length if length > 0 else (0.0 if error == 0 else float("inf"))


# --- the page


def page(results: dict[str, Any]) -> str:
    """The table of the results."""
    rows = results["families"]
    counts = Counter(row["state"] for row in rows)
    built, known = len(rows) - counts["not built"], len(small_models.families())
    runs: Counter[str] = Counter()
    for row in rows:
        runs.update(row.get("runs", {}))
    lines = [
        "# `one_pass` on the models of `transformers`",
        "",
        "Drawn by `python -m fastmtl.benchmarks.sweeps.one_pass_transformers`, which says what is run, from",
        "[its result](../../benchmarks/results/sweeps/one_pass_transformers.json) "
        f"(transformers {results['versions']['transformers']}, torch {results['versions']['torch']}, "
        f"{results['date'][:10]}, commit {results['commit'][:7]}).",
        "",
        f"{built} of {len(rows)} families could be built small and run"
        + (f" ({known - len(rows)} more were not reached: `--missing`)" if known > len(rows) else "")
        + ": "
        + ", ".join(f"{counts[state]} {_MEANING[state]}" for state in STATES[:-1] if counts[state])
        + f". Runs: {', '.join(f'{n} {state}' for state, n in sorted(runs.items()))}.",
        "",
        "| family | class | parameters | came out | why |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["state"] not in ("right", "not built"):
            lines.append(f"| {_of_model(row)} | {row['state']} | {_cell(row['why'])} |")
    lines += ["", "## Right", "", "The error is the largest of a row of task gradients, of the length of that row.", ""]
    lines += ["| family | class | parameters | worst error |", "|---|---|---|---|"]
    lines += [f"| {_of_model(row)} | {row['worst']:.1e} |" for row in rows if row["state"] == "right"]
    lines += ["", "## Not built", "", "| family | why |", "|---|---|"]
    lines += [f"| {row['family']} | {_cell(row['why'])} |" for row in rows if row["state"] == "not built"]
    return "\n".join(lines) + "\n"


def _of_model(row: dict[str, Any]) -> str:
    return f"{row['family']} | `{row['class']}` | {row['parameters']:,}"


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")[:300]


if __name__ == "__main__":
    main()
