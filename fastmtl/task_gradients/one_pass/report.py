"""What one pass knows its rows from."""

from __future__ import annotations

from typing import NamedTuple


class Report(NamedTuple):
    """Which calls of a block were followed, and by what. `print` shows it as a table.

    Attributes:
        by_rule: for each function that a rule or a layer has followed, how many calls.
        by_experiment: for each function without a rule, what trying it has shown of its results.
        by_word: how often the user has told what a tensor carries, by the name of the call: `samples`, `constant`,
            `summed`.
        runs: how many times calls were run again in this block to find that out.
        seconds: how long that took.
    """

    by_rule: dict[str, int]
    by_experiment: dict[str, list[str]]
    by_word: dict[str, int]
    runs: int
    seconds: float

    def __str__(self) -> str:
        lines = ["by rule: " + _counted(self.by_rule)]
        lines += [f"by experiment: {name}: {'; '.join(said)}" for name, said in self.by_experiment.items()]
        if self.runs:
            lines.append(f"experiments: {self.runs} runs in {1e3 * self.seconds:.1f} ms")
        lines.append("by the user's word: " + _counted(self.by_word))
        return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"
