"""What an evaluation found, as JSON and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_unlearn.metrics import bootstrap_interval

INSIDE = "inside the noise floor"


@dataclass(frozen=True)
class Value:
    """A mean with its 95 % bootstrap interval.

    Attributes:
        mean: Over queries.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def value_of(values: Tensor) -> Value:
    """The mean of values with its interval.

    Args:
        values: ``(Q,)``, or ``(repeats, Q)``.

    Returns:
        It.
    """
    return Value(float(values.mean()), *bootstrap_interval(values))


@dataclass(frozen=True)
class Removal:
    """What the removal of K samples did.

    Attributes:
        changes: Measure to its mean change against models on all samples.
        beyond_floor: Measure to whether the change lies beyond those of random removals and of another seed alone, both
            with a 95 % interval.
        undecided: Why nothing can be called beyond the floor, in words; empty where it can.
    """

    changes: Mapping[str, Value]
    beyond_floor: Mapping[str, bool]
    undecided: str = ""


@dataclass(frozen=True)
class Judged:
    """What can be said of one method.

    Attributes:
        datamodelling: Linear datamodelling score of its scores as they are; ``None`` without subset models.
        datamodelling_by_rank: The same after the one transform that all methods are put through, so that only the order
            of scores enters.
        removals: Size of the removed set to what its removal did.
    """

    datamodelling: Value | None
    datamodelling_by_rank: Value | None
    removals: Mapping[int, Removal]


@dataclass(frozen=True)
class Results:
    """An evaluation's results.

    Attributes:
        methods: Name to what can be said of it.
        ceiling: Linear datamodelling score that a perfect method reaches on average, given the noise of training.
        random: Size of the removed set to the change by random removals.
        seeds: Measure to the change by another seed alone.
        counts: Models of each kind, queries and samples.
    """

    methods: Mapping[str, Judged]
    ceiling: Value | None
    random: Mapping[int, Mapping[str, Value]]
    seeds: Mapping[str, Value]
    counts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The results as JSON.

        Returns:
            All fields.
        """
        return asdict(self)

    def to_text(self) -> str:
        """The results for a terminal.

        Returns:
            A table a part; a figure that chance alone could make is said to be inside the noise floor.
        """
        lines = [", ".join(f"{count} {name}" for name, count in self.counts.items())]
        if self.ceiling is not None:
            lines.append(f"LDS that a perfect method would reach: {self.ceiling}")
        width = max(map(len, [*self.methods, "another seed"]))
        if any(judged.datamodelling is not None for judged in self.methods.values()):
            lines.append(f"{'method':{width}}  {_cells(['LDS', 'LDS by rank only'])}".rstrip())
        for name, judged in self.methods.items():
            scores = {"LDS": judged.datamodelling, "LDS by rank": judged.datamodelling_by_rank}
            found = {what: score for what, score in scores.items() if score is not None}
            if found:
                inside = [what for what, score in found.items() if score.low <= 0]
                lines.append(f"{name:{width}}  {_cells(found.values())}{_note(inside, found)}".rstrip())
        for size, floor in self.random.items():
            lines.append(f"change without the top {size}:")
            lines.append(f"{'method':{width}}  {_cells(floor)}".rstrip())
            for name, judged in self.methods.items():
                if size in judged.removals:
                    removal = judged.removals[size]
                    inside = [measure for measure, beyond in removal.beyond_floor.items() if not beyond]
                    changes = _cells(removal.changes[measure] for measure in floor)
                    note = f"  {removal.undecided}" if removal.undecided else _note(inside, floor)
                    lines.append(f"{name:{width}}  {changes}{note}".rstrip())
            lines.append(f"{'random':{width}}  {_cells(floor.values())}".rstrip())
            lines.append(f"{'another seed':{width}}  {_cells(self.seeds[measure] for measure in floor)}".rstrip())
        return "\n".join(lines)


def _cells(values: Iterable[Value | str]) -> str:
    return "  ".join(f"{value!s:32}" for value in values)


def _note(inside: list[str], among: Mapping[str, Value]) -> str:
    """Which of a line's figures are inside the floor."""
    if not inside:
        return ""
    return f"  {INSIDE}" if len(inside) == len(among) else f"  {INSIDE}: {', '.join(inside)}"
