"""The training images that a report lists for a query, near-copies as one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.report.kept import Kept
from lightning_unlearn.report.permissions import Permission
from lightning_unlearn.report.pictures import Picture
from lightning_unlearn.scores.table import ScoreTable

Rows = NDArray[np.intp]

# Among so many near-copies are looked for; as many pictures are decoded, in some milliseconds each.
MOST_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Copy:
    """A near-copy of an image that stands in a row.

    Attributes:
        key: Of the sample.
        rank: 1 for the most influential.
        score: Its score.
    """

    key: str
    rank: int
    score: float


@dataclass(frozen=True)
class Ranked:
    """A training image and its place among all for one query.

    Attributes:
        rank: 1 for the most influential.
        key: Of the sample.
        score: Its score.
        base_loss: Its mean loss before unlearning.
        captions: Empty if the sample was not found.
        picture: ``None`` if there is nothing to see.
        error: Half the width of the score's 95 % interval; ``None`` if the table has none.
        ranks: The lowest and the highest rank that the intervals leave open; ``None`` without them.
        finished: Whether it was scored by all views; after a race, others were not.
        said: Its rank by each method, where several were asked together.
        permission: What its fields say of its licence.
        copies: Its near-copies, by rank.
    """

    rank: int
    key: str
    score: float
    base_loss: float
    captions: list[str]
    picture: Picture | None
    error: float | None = None
    ranks: tuple[int, int] | None = None
    finished: bool = True
    said: Mapping[str, int] = field(default_factory=dict)
    permission: Permission | None = None
    copies: Sequence[Copy] = ()


@dataclass(frozen=True)
class Ends:
    """Both ends of a query's ranking.

    Attributes:
        first: Rows from the most influential on.
        last: The last rows, the least influential at the end.
    """

    first: Rows
    last: Rows


def fetched(top: int) -> int:
    """How many of a query's first images are fetched, so that enough are left where near-copies make one row.

    Args:
        top: How many rows are shown.

    Returns:
        How many.
    """
    return top + -(-top // 2)


def ends_of(table: ScoreTable, query: str, first: int, last: int) -> Ends:
    """Both ends of a query's ranking.

    Args:
        table: The scores.
        query: Its key.
        first: How many of the most influential.
        last: How many of the least influential.

    Returns:
        Copies, so that the whole order need not stay.
    """
    order = table.order(query)
    return Ends(order[:first].copy(), order[max(0, len(order) - last) :].copy())


def looked_at(ends: Sequence[Ends], samples: int) -> Rows:
    """The rows among which near-copies are looked for: all, or those that rank highest for any query.

    Args:
        ends: Of all queries, as many first rows of each.
        samples: How many there are.

    Returns:
        At most ``MOST_LOOKED_AT`` rows.
    """
    if samples <= MOST_LOOKED_AT:
        return np.arange(samples)
    by_rank = np.stack([one.first for one in ends]).T.ravel()  # all first ones, then all second ones
    found, places = np.unique(by_rank, return_index=True)
    rows: Rows = found[np.argsort(places, kind="stable")][:MOST_LOOKED_AT]
    return rows


def depth(top: int, queries: int) -> int:
    """How many first rows of each query are looked at for near-copies, where not all are.

    Args:
        top: How many rows are shown.
        queries: How many queries there are.

    Returns:
        How many.
    """
    return max(fetched(top), -(-MOST_LOOKED_AT // queries))


class Ranking:
    """What a report lists of a score table.

    Args:
        table: The scores.
        samples: What is known of the images, by key.
        copies: Of each image that has near-copies, the keys of its group.
    """

    def __init__(self, table: ScoreTable, samples: Mapping[str, Kept], copies: Mapping[str, tuple[str, ...]]) -> None:
        self.table, self.samples, self.copies = table, samples, copies
        self._rows = {key: row for row, key in enumerate(table.keys)}

    @cached_property
    def _places(self) -> Rows:
        """The place of each key among all, by which ties are broken."""
        places = np.empty(len(self.table.keys), np.intp)
        places[np.argsort(np.asarray(self.table.keys), kind="stable")] = np.arange(len(places))
        return places

    def top(self, query: str, ends: Ends, most: int) -> list[Ranked]:
        """The most influential images; near-copies of one that stands above are told in its row.

        Args:
            query: The query's key.
            ends: Of its ranking.
            most: How many rows.

        Returns:
            Rows, the most influential first.
        """
        told: set[str] = set()
        chosen: list[tuple[int, int]] = []
        for place, row in enumerate(ends.first[: fetched(most)]):
            key = self.table.keys[row]
            if key in told:
                continue
            told.update(self.copies.get(key, ()))
            chosen.append((place + 1, int(row)))
            if len(chosen) == most:
                break
        return self._listed(query, chosen)

    def bottom(self, query: str, ends: Ends, above: int) -> list[Ranked]:
        """The least influential images.

        Args:
            query: The query's key.
            ends: Of its ranking.
            above: The last rank that is listed at the top; none above it is listed again.

        Returns:
            Rows, the least influential last.
        """
        first = len(self.table.keys) - len(ends.last) + 1
        ranked = [(first + place, int(row)) for place, row in enumerate(ends.last)]
        return self._listed(query, [one for one in ranked if one[0] > above])

    def _listed(self, query: str, chosen: Sequence[tuple[int, int]]) -> list[Ranked]:
        table, column = self.table, self.table.queries.index(query)
        ranges = None if table.errors is None else 1 + table.rank_ranges(query)
        listed = []
        for rank, row in chosen:
            sample = self.samples.get(table.keys[row])
            listed.append(
                Ranked(
                    rank,
                    table.keys[row],
                    float(table.scores[row, column]),
                    float(table.base_losses[row]),
                    sample.captions if sample else [],
                    sample.picture if sample else None,
                    None if table.errors is None else float(table.errors[row, column]),
                    None if ranges is None else (int(ranges[row, 0]), int(ranges[row, 1])),
                    table.finished is None or bool(table.finished[row]),
                    {name: 1 + int((part[:, column] > part[row, column]).sum()) for name, part in table.parts.items()},
                    sample.permission if sample else None,
                    self._copies(query, column, table.keys[row]),
                )
            )
        return listed

    def _copies(self, query: str, column: int, key: str) -> list[Copy]:
        others = [self._rows[other] for other in self.copies.get(key, ()) if other != key]
        found = [
            Copy(self.table.keys[row], self._rank(query, column, row), float(self.table.scores[row, column]))
            for row in others
        ]
        return sorted(found, key=lambda copy: copy.rank)

    def _rank(self, query: str, column: int, row: int) -> int:
        """As the table orders samples, ties by their keys; 1 for the most influential."""
        if self.table.finished is not None:
            return 1 + int(np.flatnonzero(self.table.order(query) == row)[0])
        scores = self.table.scores[:, column]
        before = (scores > scores[row]) | ((scores == scores[row]) & (self._places < self._places[row]))
        return 1 + int(before.sum())
