"""Which models an evaluation needs, in the order in which they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.runs import (
    Run,
    leave_k_out_runs,
    random_removal_runs,
    removal_size,
    seed_runs,
    subset_runs,
)
from lightning_unlearn.scores.table import ScoreTable


@dataclass(frozen=True)
class Design:
    """How many models of each kind an evaluation has.

    Args:
        subsets: Random subsets, for the linear datamodelling score; 0 for none.
        subset_share: Share of the samples that each keeps.
        subsets_twice: How many of them are trained with a second seed, for the noise ceiling.
        seeds: Models on all samples with other seeds: the noise of training itself.
        k: Sizes of the removed sets: numbers, or shares below 1.
        removal_queries: For how many queries, from the first, a method's top K are removed.
        random_repeats: Random removals of each size.
        seed: Of the subsets and the random removals.

    Raises:
        InputError: If there are too few of a kind to say anything.
    """

    subsets: int = 40
    subset_share: float = 0.5
    subsets_twice: int = 10
    seeds: int = 5
    k: list[float] = field(default_factory=lambda: [0.03])
    removal_queries: int = 8
    random_repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("seeds", 2), ("removal_queries", 1), ("random_repeats", 1)):
            if getattr(self, name) < least:
                raise InputError(f"The design's {name} are {getattr(self, name)}; give {least} or more.")
        for name in ("subsets", "subsets_twice"):
            if getattr(self, name) < 2 and getattr(self, name) != 0:
                raise InputError(f"The design's {name} are {getattr(self, name)}; give 2 or more, or 0 for none.")


@dataclass(frozen=True)
class Plan:
    """The models of an evaluation.

    Attributes:
        keys: All samples, sorted.
        removal_queries: The queries whose top K are removed.
        subsets: One model a subset.
        second: The same subsets, from the first, with another seed.
        seeds: On all samples, with the seeds 1, 2, …: what all changes are measured against.
        random: Size of the removed set to models without random samples.
        removals: Method to size to a model for each of ``removal_queries``.
    """

    keys: Sequence[str]
    removal_queries: Sequence[str]
    subsets: Sequence[Run]
    second: Sequence[Run]
    seeds: Sequence[Run]
    random: Mapping[int, Sequence[Run]]
    removals: Mapping[str, Mapping[int, Sequence[Run]]]

    def runs(self) -> list[Run]:
        """All models, each once: first those that every method is compared with.

        Returns:
            The runs.
        """
        ordered = [*self.seeds, *self.subsets, *self.second]
        for size in self.random.values():
            ordered += size
        for sizes in self.removals.values():
            for size in sizes.values():
                ordered += size
        return list(dict.fromkeys(ordered))


def plan(design: Design, keys: Sequence[str], queries: Sequence[str], tables: Mapping[str, ScoreTable]) -> Plan:
    """The models that a design asks for.

    Args:
        design: How many of each kind.
        keys: All training samples.
        queries: All queries, in order.
        tables: Method to score table, whose top K are removed.

    Returns:
        The plan.
    """
    ordered = sorted(keys)
    sizes = list(dict.fromkeys(removal_size(k, len(ordered)) for k in design.k))
    chosen = list(queries[: design.removal_queries])
    subsets = (
        subset_runs(ordered, design.subsets, design.subset_share, design.seed, design.subsets_twice)
        if design.subsets
        else []
    )
    return Plan(
        keys=ordered,
        removal_queries=chosen,
        subsets=subsets[: design.subsets],
        second=subsets[design.subsets :],
        seeds=seed_runs(design.seeds),
        random={size: random_removal_runs(ordered, size, design.random_repeats, design.seed) for size in sizes},
        removals={
            method: {
                size: leave_k_out_runs([[key for key, _ in table.top(query, size)] for query in chosen], size)
                for size in sizes
            }
            for method, table in tables.items()
        },
    )
