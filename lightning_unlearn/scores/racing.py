r"""Racing: few views of all samples, and all views only of those that can still be among the best.

Stage one scores all samples by a part of their views (``Views.every``). Stage two scores some of them by all views, in
two rounds: the *leaders* first, twice the wanted number of each query by their scores of stage one, so that the score
:math:`τ` of the ``top``-th best among them is known; then the *contenders*, every other sample whose score could reach
:math:`τ`,

.. math::
    u_i = s_i + t_{ν_i}\!\left(\tfrac{1 - c}{K}\right) \hat σ_i \;\ge\; τ,

for any query. :math:`s_i` is a sample's score by the few views, :math:`\hat σ_i` its standard error from the scatter of
its own views and :math:`ν_i` its degrees of freedom (:mod:`~lightning_unlearn.scores.firmness`), :math:`K` is ``top``
and :math:`c` the ``confidence``.

**What is assumed.** For each of a query's K best samples by all views, the score by all views lies above :math:`u_i`
with a probability of at most :math:`(1 - c)/K`: so it is if the values of its few views scatter about the score by all
views like independent draws from one normal distribution. Nothing is assumed of how samples depend on each other.

**What is promised.** For each query, with a probability of at least :math:`c`, all of its K best samples by all views
have been scored by all views, so that the first K of the table are those of a run without a race. For any
leaders :math:`τ` is at most the score of the K-th best of all samples: one of the K best is left behind only if its
score lies above its own :math:`u_i`, which for K samples together happens with a probability of at most
:math:`K (1 - c)/K` (Bonferroni). Neither the number of samples nor that of queries enters. Each query has its own
promise; for ``Q`` of them together take :math:`1 - (1 - c)/Q` as the confidence.

A ``share`` caps how many samples are finished: those nearest to :math:`τ`, in units of their own reach, are. The
promise holds if the cap left nobody behind who could reach :math:`τ`, and no chosen sample was left out for a loss that
is not finite; else it is withdrawn. Below four views there is too little scatter to judge by: the share of the samples
that lead for any query is finished, and nothing is promised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.errors import InputError

# With fewer views, all of them are one group of draws, and nobody knows whether it scatters as the others would.
FEWEST_VIEWS = 4
# As many times the wanted number are the leaders of a query.
LEADERS = 2

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Race:
    """How a race is run.

    Args:
        top: How many of the best of each query are to be found.
        views: (timestep, noise) draws that all samples are scored on; it divides the number of all draws.
        confidence: With what probability all of a query's best are found.
        share: Cap on the share of the samples that are finished; none by default. The leaders always are.

    Raises:
        InputError: If a number is out of range, or the views are too few and no share is given.
    """

    top: int = 10
    views: int = 5
    confidence: float = 0.95
    share: float | None = None

    def __post_init__(self) -> None:
        if self.top < 1 or self.views < 1:
            raise InputError(f"A race needs at least one of top and views, but has {self.top} and {self.views}.")
        if not 0.5 <= self.confidence < 1 or self.tail < 1e-8:
            raise InputError(
                f"The confidence of a race is at least 0.5 and below 1, and (1 − confidence) / top at least 1e-8; "
                f"got {self.confidence} for the {self.top} best."
            )
        if self.share is not None and not 0 < self.share < 1:
            raise InputError(f"The share of a race lies between 0 and 1, not at {self.share}.")
        if not self.judges and self.share is None:
            raise InputError(
                f"{self.views} views are too few to tell how a score scatters; give race.views {FEWEST_VIEWS} or more, "
                "or the share of the samples to finish without any promise, e.g. race.share 0.25."
            )

    @property
    def tail(self) -> float:
        """The probability that one of the best lies beyond its upper end."""
        return (1 - self.confidence) / self.top

    @property
    def judges(self) -> bool:
        """Whether there are views enough to tell how a score scatters."""
        return self.views >= FEWEST_VIEWS

    def settings(self) -> dict[str, Any]:
        """The race as JSON, for fingerprints.

        Returns:
            All fields.
        """
        return dict(vars(self))

    def capacity(self, samples: int) -> int:
        """How many samples may be finished.

        Args:
            samples: How many there are.

        Returns:
            The number; the leaders may be more.
        """
        return samples if self.share is None else math.ceil(self.share * samples)


def places(scores: Numbers) -> NDArray[np.intp]:
    """Each sample's place among all, by its best query.

    Args:
        scores: ``(N, Q)``; of equal scores, the first comes first.

    Returns:
        ``(N,)``, 0 for whoever leads a query.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    best: NDArray[np.intp] = np.argsort(order, axis=0, kind="stable").min(1)
    return best


def leaders(race: Race, scores: Numbers) -> Flags:
    """Who is finished first; without a judgement, everybody who is finished.

    Args:
        race: The race.
        scores: ``(N, Q)`` by the few views, samples in the order of their keys.

    Returns:
        ``(N,)``.
    """
    found = places(scores)
    if race.judges:
        return found < LEADERS * race.top
    chosen = np.zeros(len(scores), dtype=np.bool_)
    chosen[np.argsort(found, kind="stable")[: race.capacity(len(scores))]] = True
    return chosen


def thresholds(race: Race, finished: Numbers) -> Numbers:
    """The score to reach for each query: that of the last of the best who are finished.

    Args:
        race: The race.
        finished: ``(n, Q)`` scores by all views.

    Returns:
        ``(Q,)``; −∞ where fewer than ``top`` are finished.
    """
    if len(finished) < race.top:
        return np.full(finished.shape[1], -np.inf)
    least: Numbers = -np.sort(-finished, axis=0)[race.top - 1]
    return least


def in_reach(uppers: Numbers, least: Numbers) -> Flags:
    """Who could be among the best of any query.

    Args:
        uppers: ``(N, Q)`` how high the scores could be; NaN where nobody knows.
        least: ``(Q,)`` the scores to reach.

    Returns:
        ``(N,)``, true where it is not known.
    """
    # Only whoever is known to lie below is out: the promise is of all others.
    return np.asarray(~(uppers < least).all(1), dtype=np.bool_)


def contenders(race: Race, scores: Numbers, uppers: Numbers, leading: Flags, least: Numbers) -> Flags:
    """Who is finished after the leaders.

    Args:
        race: The race.
        scores: ``(N, Q)`` by the few views, samples in the order of their keys.
        uppers: ``(N, Q)`` how high they could be by all views; NaN where nobody knows.
        leading: ``(N,)`` who is finished already.
        least: ``(Q,)`` the scores to reach.

    Returns:
        ``(N,)``, nobody of those who lead.
    """
    chosen = in_reach(uppers, least) & ~leading
    room = max(0, race.capacity(len(scores)) - int(leading.sum()))
    if chosen.sum() > room:
        # How far each is from the score to reach, in units of its own reach; the smallest over its queries counts.
        with np.errstate(over="ignore"):  # some have no reach
            distances = ((least - scores) / np.maximum(uppers - scores, np.finfo(np.float64).tiny)).min(1)
        distances[np.isnan(distances)] = -np.inf  # whose reach is not known comes first
        rows = np.flatnonzero(chosen)
        chosen[rows[np.argsort(distances[rows], kind="stable")[room:]]] = False
    return chosen
