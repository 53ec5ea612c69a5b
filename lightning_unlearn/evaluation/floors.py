"""What removals change, and what would change by chance: without random samples, and with another seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.evaluation.plan import Plan
from lightning_unlearn.evaluation.results import Removal, value_of
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.evaluation.study import Study
from lightning_unlearn.metrics import counterfactual_change, paired_bootstrap

# The measures of an outcome, and whether they rise as a query is lost.
MEASURES = {"loss": True, "mse": True, "ssim": False, "cosine": False}
ONE_QUERY = "not held against the noise floor: one query shows no scatter; give removal_queries 2 or more"


class Floors:
    """Changes of queries' outcomes by removals, beside those that random removals and other seeds make.

    Args:
        study: Where the models' numbers are.
        plan: Which models.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study = study
        self.plan = plan
        self.queries = list(plan.removal_queries)

    def measured(self) -> list[str]:
        """The measures that all outcomes have.

        Returns:
            Their names.
        """
        reference = {measure: self.study.losses(self.plan.seeds, self.queries, measure) for measure in MEASURES}
        return [measure for measure, values in reference.items() if np.isfinite(values).all()]

    def changes(self, removed: Sequence[Run], measure: str) -> Tensor:
        """Change of each query's outcome without its own samples.

        Args:
            removed: A run for each query.
            measure: Of the outcome.

        Returns:
            ``(Q,)``.
        """
        own = self._outcomes(removed, measure).diagonal()  # query q under the model without q's samples
        return counterfactual_change(own, self._outcomes(self.plan.seeds, measure))

    def random_changes(self, size: int, measure: str) -> Tensor:
        """Changes by random removals.

        Args:
            size: Of the removed sets.
            measure: Of the outcome.

        Returns:
            ``(repeats, Q)``.
        """
        references = self._outcomes(self.plan.seeds, measure)
        rows = self._outcomes(self.plan.random[size], measure)
        return torch.stack([counterfactual_change(row, references) for row in rows])

    def seed_changes(self, measure: str) -> Tensor:
        """Changes by another seed alone: each model on all samples against the others.

        Args:
            measure: Of the outcome.

        Returns:
            ``(seeds, Q)``; their mean over seeds is 0, so that it is their interval that says something.
        """
        outcomes = self._outcomes(self.plan.seeds, measure)
        others = [torch.cat([outcomes[:row], outcomes[row + 1 :]]) for row in range(len(outcomes))]
        return torch.stack([counterfactual_change(row, rest) for row, rest in zip(outcomes, others, strict=True)])

    def removal(self, size: int, removed: Sequence[Run]) -> Removal:
        """What a method's removals did.

        Args:
            size: Of the removed sets.
            removed: A run for each query.

        Returns:
            Changes, and whether they lie beyond the floors: whether the 95 % intervals of the difference to random
            removals, and to other seeds, are on the side of loss. Of a single query nothing is called beyond: its
            intervals over queries are points.
        """
        changes, beyond = {}, {}
        scatter = len(self.queries) > 1
        for measure in self.measured():
            own = self.changes(removed, measure)
            changes[measure] = value_of(own)
            sign = 1.0 if MEASURES[measure] else -1.0
            floors = (self.random_changes(size, measure), self.seed_changes(measure))
            beyond[measure] = scatter and all(paired_bootstrap(sign * (own - floor)).low > 0 for floor in floors)
        return Removal(changes, beyond, "" if scatter else ONE_QUERY)

    def _outcomes(self, runs: Sequence[Run], measure: str) -> Tensor:
        return torch.from_numpy(self.study.losses(runs, self.queries, measure))
