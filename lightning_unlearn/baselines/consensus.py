"""Several methods asked together: DAS, D-TRAK and unlearning or influence, each standardised, and their mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.d_trak import DTRAK
from lightning_unlearn.baselines.das import DAS
from lightning_unlearn.baselines.gradients import shared_gradients
from lightning_unlearn.baselines.influence import Influence
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.agreement import standardised

UNLEARNED = "unlearning"


class Consensus(Baseline):
    r"""The mean of what independent methods say, each in units of its own scatter.

    .. math::
        τ(\hat z, z_i) = \sum_m w_m \frac{τ_m(\hat z, z_i) - \operatorname{mean}_j τ_m(\hat z, z_j)}
        {\operatorname{std}_j τ_m(\hat z, z_j)}

    Methods err differently: which one is best is another one for each model, and nobody knows it without training
    again. Their mean is close to the best of them on every bench (benchmarks/RESULTS.md). DAS and D-TRAK share one pass
    over the data; unlearning comes from the subject: the rise of the loss as it is (rule ``difference``) after a
    modest step. All parts look at the weights that are chosen, and are at their best with all of them.

    The influence function is what unlearning gives for an infinitely small step. In the place of unlearning it costs no
    call of its own for each query, and a few views are enough (benchmarks/RESULTS.md, "The cheap end").

    Args:
        rise: Relative rise of a query's own loss by its unlearning.
        das_ridge: λ of DAS, as a share of the mean squared length of a training gradient.
        d_trak_ridge: The same of D-TRAK.
        das: Weight of DAS.
        d_trak: Weight of D-TRAK.
        unlearning: Weight of unlearning; with 0 nothing is unlearned.
        every: Of the draws of timestep and noise on which DAS and D-TRAK look at a sample, unlearning looks at each so
            manyth (:attr:`Views.every`), or at more where that divides them. By default at each other one: a second
            look costs one call a query, and the gradients one pass for all queries.
        influence: Weight of the influence function, which needs a Fisher.
        influence_damping: Share of each layer's mean Fisher that is added to it for the influence function.

    Raises:
        InputError: If a number is out of range, or fewer than two methods are asked.
    """

    name: ClassVar[str] = "consensus"
    needs_query_views: ClassVar[bool] = True
    gradient_kinds = 2

    def __init__(
        self,
        rise: float = 0.3,
        das_ridge: float = 0.001,
        d_trak_ridge: float = 0.01,
        das: float = 1.0,
        d_trak: float = 1.0,
        unlearning: float = 1.0,
        every: int = 2,
        influence: float = 0.0,
        influence_damping: float = 0.001,
    ) -> None:
        weights = {DAS.name: das, DTRAK.name: d_trak, UNLEARNED: unlearning, Influence.name: influence}
        if not all(0 <= weight < math.inf for weight in weights.values()) or sum(map(bool, weights.values())) < 2:
            raise InputError(
                "A consensus needs finite weights that are not negative, and at least two methods with a weight above "
                f"0, but they are {', '.join(f'{name}: {weight}' for name, weight in weights.items())}."
            )
        if not 0 < rise < math.inf:
            raise InputError(f"The rise must be finite and above 0, but is {rise}.")
        if every < 1:
            raise InputError(f"Unlearning can't look at each {every}th draw; every must be at least 1.")
        self.every = every
        self.rise = rise if unlearning else None
        self.das_ridge, self.d_trak_ridge = das_ridge, d_trak_ridge
        self.das, self.d_trak, self.unlearning, self.influence = das, d_trak, unlearning, influence
        self.influence_damping = influence_damping
        self.needs_fisher = bool(influence)
        if influence:  # the Fisher is of whole gradients, which can't be sketched
            self.gradient_kinds = 0
        self._weights = {name: weight for name, weight in weights.items() if weight}
        self._methods: list[DAS | DTRAK | Influence] = [DAS(das_ridge), DTRAK(d_trak_ridge)]
        self._methods += [Influence(influence_damping)]

    def parts(self, subject: Subject) -> Mapping[str, Tensor]:
        """The scores of each method that is asked; see :meth:`Baseline.parts`.

        Args:
            subject: With ``unlearned``, if unlearning is asked.

        Returns:
            Name to ``(N, Q)``.

        Raises:
            InputError: If unlearning is asked and the subject has nothing unlearned.
        """
        if UNLEARNED in self._weights and subject.unlearned is None:
            raise InputError(
                "A consensus asks unlearning, too, but nothing was unlearned; give the subject what unlearning "
                "measured, or set the weight `unlearning` to 0."
            )
        key = ("parts", *self.settings().values())
        if key not in subject.cache:
            asked = [method for method in self._methods if method.name in self._weights]
            with shared_gradients(subject, [method.output for method in asked]):
                found = {method.name: method.scores(subject) for method in asked}
            if subject.unlearned is not None and UNLEARNED in self._weights:
                found[UNLEARNED] = subject.unlearned.double()
            subject.cache[key] = found
        parts: Mapping[str, Tensor] = subject.cache[key]
        return parts

    def scores(self, subject: Subject) -> Tensor:
        """The weighted mean of the standardised parts; see :meth:`Baseline.scores`.

        Args:
            subject: The model, its samples and the queries, with ``unlearned`` if unlearning is asked.

        Returns:
            ``(N, Q)``.
        """
        return combined(self.parts(subject), self._weights)


def combined(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of scores, each brought to mean 0 and standard deviation 1 over the samples of a query.

    A part that gives all samples the same score says nothing of that query, and counts as 0 for all.

    Args:
        parts: Name to ``(N, Q)``.
        weights: Name to weight, not negative; of all parts.

    Returns:
        ``(N, Q)`` float64.

    Example:
        >>> parts = {"first": torch.tensor([[1.0], [3.0]]), "second": torch.tensor([[0.0], [500.0]])}
        >>> combined(parts, {"first": 1.0, "second": 1.0}).flatten().tolist()
        [-1.0, 1.0]
    """
    total = sum(weights[name] for name in parts)
    return torch.stack([weights[name] / total * standardised(scores) for name, scores in parts.items()]).sum(0)
