"""The scores of all samples for all queries, and how they rank the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.firmness import rank_ranges


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all samples for all queries.

    Attributes:
        keys: ``N`` sample keys.
        shards: ``N`` identifiers of their shards.
        queries: ``Q`` query keys.
        scores: ``(N, Q)`` float32; high means influential.
        base_losses: ``(N,)`` float32 mean loss under θ₀.
        run: The content of ``run.json``.
        errors: ``(N, Q)`` float32 half-widths of the scores' 95 % intervals
            (:func:`~lightning_unlearn.scores.firmness.half_widths`); ``None`` where the table has none.
        finished: ``(N,)`` which samples were scored by all views, after a race; the others' scores are those by its
            first few views. Or which were scored exactly, where an index says the others'. ``None`` where all samples
            were scored alike.
        parts: Method to its scores ``(N, Q)``, where several methods were asked together.
    """

    keys: list[str]
    shards: list[str]
    queries: list[str]
    scores: np.ndarray[Any, np.dtype[np.float32]]
    base_losses: np.ndarray[Any, np.dtype[np.float32]]
    run: dict[str, Any]
    errors: np.ndarray[Any, np.dtype[np.float32]] | None = None
    finished: NDArray[np.bool_] | None = None
    parts: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)

    def order(self, query: str) -> NDArray[np.intp]:
        """The samples from the most to the least influential for a query; ties in the order of their keys.

        After a race, as many as it was to find come first out of those that it finished.

        Args:
            query: Its key.

        Returns:
            ``(N,)`` rows.
        """
        column = self.scores[:, self.queries.index(query)]
        order = np.lexsort((np.asarray(self.keys), -column))
        if self.finished is None:
            return order
        best = order[self.finished[order]][: self.run["race"]["top"]]
        return np.concatenate([best, order[~np.isin(order, best)]])

    def top(self, query: str, k: int) -> list[tuple[str, float]]:
        """The most influential samples of a query; ties in the order of their keys.

        Args:
            query: Its key.
            k: How many.

        Returns:
            Keys and scores, highest first.
        """
        column = self.scores[:, self.queries.index(query)]
        return [(self.keys[row], float(column[row])) for row in self.order(query)[:k]]

    def rank(self, query: str, key: str) -> int:
        """How many samples score higher for a query than a given one; after a race, how many come before it.

        Args:
            query: The query's key.
            key: The sample's key.

        Returns:
            0 for the most influential.
        """
        column, row = self.scores[:, self.queries.index(query)], self.keys.index(key)
        if self.finished is not None:
            return int(np.flatnonzero(self.order(query) == row)[0])
        return int((column > column[row]).sum())

    def rank_ranges(self, query: str) -> NDArray[np.intp]:
        """The ranks that each sample may have for a query, as far as the scores' 95 % intervals say.

        Args:
            query: Its key.

        Returns:
            ``(N, 2)`` lowest and highest rank; 0 for the most influential.

        Raises:
            InputError: If the table has no errors.
        """
        if self.errors is None:
            raise InputError(
                "The score table has no errors, so that nobody knows how firm its ranks are; score again with two "
                "views or more (views.noises: 2)."
            )
        column = self.queries.index(query)
        scores, errors = self.scores[:, column], self.errors[:, column]
        ranges = rank_ranges(scores, errors)
        if self.finished is None:
            return ranges
        # As in `order`, the best of those that were finished come before all others, whatever these score.
        best = min(self.run["race"]["top"], int(self.finished.sum()))
        least = np.maximum(ranges[:, 0], best)
        most = np.minimum(ranges[:, 1] + best, len(scores) - 1)
        among = rank_ranges(scores[self.finished], errors[self.finished])
        least[self.finished] = np.where(among[:, 0] < best, among[:, 0], least[self.finished])
        most[self.finished] = np.where(among[:, 1] < best, among[:, 1], most[self.finished])
        return np.stack([least, most], 1)
