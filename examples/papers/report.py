"""Draws `docs/papers/reproductions.md` and its pictures from the records in `examples/papers/results`.

python examples/papers/taps.py --out examples/papers/results     # the records, kept with the code
python examples/papers/report.py                                 # the page
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

from experiment import Experiment, read

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parents[1] / "docs"
PICTURES = Path("pictures") / "papers"  # below DOCS
# in the order of the page
NAMES: tuple[str, ...] = (
    "pcgrad",
    "pcgrad_digits",
    "pcgrad_rl",
    "pareto_mtl",
    "chebyshev",
    "taps",
    "rhps",
    "patches",
    "rcm",
    "lines",
    "taps_shapes",
    "tag",
    "hypergrid",
    "instance_weights",
    "disparse",
    "soft_modules",
    "distillation",
)

HEAD = """# Reproductions

Each section is one command of `examples/papers` that anybody can run: minutes on two cores, no downloads. The data are
scikit-learn's handwritten digits (1,797 pictures of 8 x 8 pixels) or synthetic tasks. **On data this small an accuracy
checks a mechanism, and that implementations agree; it says little about the size of the effect on the papers' data.**
Mean and standard deviation are over the seeds. [The papers](index.md) have every system by
name, and what was left out.

This page is drawn from committed records by `python examples/papers/report.py`; no number in its tables is typed.
"""


def load(name: str) -> Experiment:
    return importlib.import_module(name).EXPERIMENT


def section(name: str) -> str:
    experiment = load(name)
    _, found = read(RESULTS / f"{name}.json")
    # several at once finish in any order; what compares seeds pairs them by the order of the cases
    cases = experiment.cases(experiment.seeds, False)
    records = sorted((r for r in found if r.settings in cases), key=lambda record: cases.index(record.settings))
    claims = "\n".join(f"- {'Holds' if c.holds else '**Does not hold**'}: {c.text}" for c in experiment.claims(records))
    return f"""
## {experiment.title}

{experiment.paper}

{experiment.claim.strip()}

```
python examples/papers/{name}.py
```

{experiment.table(records).markdown()}

{claims}

![{experiment.title}](../{(PICTURES / name).as_posix()}.png)

{experiment.reading.strip()}
"""


def page() -> str:
    return HEAD + "".join(map(section, NAMES))


def main() -> None:
    sys.path.insert(0, str(HERE))
    (DOCS / PICTURES).mkdir(parents=True, exist_ok=True)
    (DOCS / "papers" / "reproductions.md").write_text(page())
    for name in NAMES:
        # drawn by the run itself, so that a page drawn anew on another machine changes no picture
        shutil.copyfile(RESULTS / f"{name}.png", DOCS / PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
