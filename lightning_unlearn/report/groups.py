r"""Which groups of training images the ranked evidence comes from.

A score's size has no meaning of its own, so the share of a group is one of *ranks*: with ``K`` images at the top,

.. math:: s_g = \frac{\sum_{r \le K,\; i_r \in g} d_r}{\sum_{r \le K} d_r}, \qquad d_r = \frac{1}{\log_2(1 + r)},

the discount of Järvelin and Kekäläinen (ACM TOIS 20(4), 2002). It says where the images that rank high come from. It is
no share of the picture, and none of what anybody is owed.

Intervals are 95 % percentile intervals (Efron, 1979) over training sets that could have been: images are drawn again
with replacement, and where scores have intervals of their own, each score within its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.fingerprints import seed_of

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

FIRST = 100  # images at the top that count, or the first quarter where that is fewer
RESAMPLES = 500
POOL = 4  # times FIRST: images that can get among the first by drawing others again
POOL_OF_ERRORS = 1000  # the same, where scores move too
NOT_SAID = "not said"


@dataclass(frozen=True)
class Share:
    """A group's share of the ranked evidence.

    Attributes:
        group: Its name.
        share: Of the evidence, 0 to 1.
        low: Lower end of the 95 % interval.
        high: Upper end.
        images: How many of the first images are of the group.
        of_training: The group's share of all training images: what chance would give.
    """

    group: str
    share: float
    low: float
    high: float
    images: int
    of_training: float


class Membership:
    """Which images are of which group, by a field of their json.

    Args:
        field: The field. ``domain`` is taken from ``url`` where there is none. Of a list an image is in each group.
        keys: Of all samples, in the order of the table.
    """

    def __init__(self, field: str, keys: Sequence[str]) -> None:
        self.field = field
        self._rows = {key: row for row, key in enumerate(keys)}
        self._groups: list[tuple[str, ...]] = [(NOT_SAID,)] * len(keys)
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._counts: dict[str, int] | None = None
        self._fields: set[str] = set()

    def add(self, key: str, metadata: Mapping[str, Any]) -> None:
        """Take in a sample.

        Args:
            key: Its key; one that the table lacks is passed over.
            metadata: Its json.
        """
        row = self._rows.get(key)
        if row is None:
            return
        if len(self._fields) < 50:
            self._fields |= metadata.keys() - {"captions"}
        groups = _groups_in(metadata, self.field) or (NOT_SAID,)
        # Thousands of images are of the same few groups: each is kept once.
        self._groups[row] = self._known.setdefault(groups, groups)

    def check(self) -> None:
        """See that some image has the field.

        Raises:
            InputError: If none has.
        """
        if not any(groups != (NOT_SAID,) for groups in self._known):
            others = f"fields that they have: {some_of(sorted(self._fields))}" if self._fields else "they have none"
            raise InputError(f"No training image has {self.field!r} in its json, to group by ({others}); name another.")

    def of(self, row: int) -> tuple[str, ...]:
        """A sample's groups.

        Args:
            row: Its row.

        Returns:
            Their names.
        """
        return self._groups[row]

    def share_of_training(self, group: str) -> float:
        """How large a part of all training images is of a group.

        Args:
            group: Its name.

        Returns:
            0 to 1.
        """
        if self._counts is None:
            self._counts = {}
            for groups in self._groups:
                for name in groups:
                    self._counts[name] = self._counts.get(name, 0) + 1
        return self._counts.get(group, 0) / len(self._groups)


def _groups_in(metadata: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = metadata.get(field)
    if value is None and field == "domain" and isinstance(metadata.get("url"), str):
        try:
            value = urlsplit(metadata["url"]).hostname
        except ValueError:  # no address
            value = None
    values = value if isinstance(value, list) else [value]
    named = (text if isinstance(text, str) else str(text) for text in values if isinstance(text, str | int | float))
    return tuple(dict.fromkeys(name.strip() for name in named if name.strip()))


def counted(samples: int) -> int:
    """How many images at the top count.

    Args:
        samples: How many there are.

    Returns:
        ``K``.
    """
    return max(1, min(FIRST, math.ceil(samples / 4)))


def pool_of(samples: int, errors: bool) -> int:
    """How many images at the top are looked at.

    Args:
        samples: How many there are.
        errors: Whether scores have intervals.

    Returns:
        How many.
    """
    return min(samples, POOL_OF_ERRORS if errors else POOL * FIRST)


@dataclass(frozen=True)
class Draws:
    """Training sets that could have been, the same for all queries and fields.

    Attributes:
        counts: ``(R, P)`` how often each image of the pool is in them.
        moves: ``(R, P)`` standard normal numbers, by which scores move within their intervals; ``None`` without those.
    """

    counts: NDArray[np.int64]
    moves: Floats | None


def draw(samples: int, errors: bool, resamples: int = RESAMPLES) -> Draws:
    """Draw training sets again.

    Args:
        samples: How many images there are.
        errors: Whether scores have intervals.
        resamples: How many sets.

    Returns:
        The draws, for the first :func:`pool_of` images.
    """
    generator = np.random.default_rng(seed_of("shares", samples))
    pool = pool_of(samples, errors)
    counts = redrawn(generator, pool, samples, resamples)
    return Draws(counts, generator.standard_normal(counts.shape) if errors else None)


def shares(
    membership: Membership,
    order: Rows,
    scores: Floats,
    errors: Floats | None,
    draws: Draws,
    finished: NDArray[np.bool_] | None = None,
    best: int = 0,
) -> list[Share]:
    """The groups' shares of a query's ranked evidence.

    Args:
        membership: Whose field it is.
        order: ``(P,)`` rows from the most influential on, :func:`pool_of` of them.
        scores: ``(N,)`` of all samples.
        errors: ``(N,)`` half-widths of their 95 % intervals, or ``None``.
        draws: Training sets that could have been.
        finished: ``(N,)`` of which samples the best come first, after a race.
        best: How many of them.

    Returns:
        From the largest share to the smallest; groups that none of the first images is of are left out.
    """
    first = counted(len(scores))
    names = list(dict.fromkeys(name for row in order[:first] for name in membership.of(int(row))))
    place = {name: number for number, name in enumerate(names)}
    member = np.zeros((len(order), len(names)))  # (P, G)
    for number, row in enumerate(order):
        for name in membership.of(int(row)):
            if name in place:
                member[number, place[name]] = 1
    found = evidence(np.ones((1, len(order)), np.int64), first)[0] @ member
    if errors is None or draws.moves is None:
        drawn = evidence(draws.counts, first) @ member
    else:
        moved = scores[order] + draws.moves * errors[order] / 1.96
        if finished is not None and (leading := min(best, int(finished[order].sum()))):
            known = np.where(finished[order] & (draws.counts > 0), moved, -np.inf)  # of those that were drawn
            bar = np.partition(known, -leading, 1)[:, [-leading]]
            moved[(known >= bar) & np.isfinite(known)] += np.ptp(moved) + 1
        ranked = np.argsort(-moved, axis=1, kind="stable")
        weights = np.empty_like(moved)
        np.put_along_axis(weights, ranked, evidence(np.take_along_axis(draws.counts, ranked, 1), first), 1)
        drawn = weights @ member
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    listed = [
        Share(
            name,
            float(found[number]),
            float(low[number]),
            float(high[number]),
            int(member[:first, number].sum()),
            membership.share_of_training(name),
        )
        for number, name in enumerate(names)
    ]
    return sorted(listed, key=lambda one: (-one.share, one.group))


def redrawn(generator: np.random.Generator, pool: int, samples: int, resamples: int) -> NDArray[np.int64]:
    """How often each image of the pool is in training sets that are drawn again, with replacement.

    Args:
        generator: Of the draws.
        pool: How many images are looked at.
        samples: How many there are, and are drawn.
        resamples: How many sets.

    Returns:
        ``(resamples, pool)``.
    """
    chances = np.full(pool + 1, 1 / samples)
    chances[-1] = max(0.0, 1 - pool / samples)  # all others together
    return generator.multinomial(samples, chances, resamples)[:, :-1]


def evidence(counts: NDArray[np.int64], first: int) -> Floats:
    """The share of the ranked evidence that each image has, where it stands as often as it was drawn.

    Args:
        counts: ``(R, P)`` how often each image stands there, the most influential first.
        first: ``K``.

    Returns:
        ``(R, P)``, each row with a sum of 1 unless nothing was drawn.
    """
    # Of ranks 1 to k together, k from 0 on.
    together = np.concatenate([[0.0], np.cumsum(1 / np.log2(1 + np.arange(1, first + 1)))])
    ends = np.minimum(np.cumsum(counts, 1), first)
    starts = np.concatenate([np.zeros((len(counts), 1), ends.dtype), ends[:, :-1]], 1)
    weights: Floats = together[ends] - together[starts]
    total = weights.sum(1, keepdims=True)
    found: Floats = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return found
