"""How much worse does a model do on a query if the samples named for it had not been there?"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unlearn.errors import InputError
from lightning_unlearn.metrics.inputs import table


def counterfactual_change(without: Tensor, references: Tensor) -> Tensor:
    """Change of each query's outcome by leaving out the samples named for it and training again.

    The outcome without them minus the mean outcome of reference models trained on all samples: leave-K-out retraining,
    Wang et al. (arXiv 2406.09408). Several references, of different seeds, keep the luck of a single one out of the
    changes of all queries.

    Args:
        without: ``(Q,)`` outcome of each query under the model trained without its samples, e.g. its loss.
        references: ``(R, Q)`` outcomes under the reference models, in the same unit.

    Returns:
        ``(Q,)`` float64, in the unit of the outcome; for a loss, high where the samples mattered.

    Raises:
        InputError: If the shapes don't fit or a value is not finite.

    Example:
        >>> counterfactual_change(torch.tensor([3.0, 5.0]), torch.tensor([[1.0, 4.0], [2.0, 6.0]])).tolist()
        [1.5, 0.0]
    """
    without = table("outcomes without the samples", without, "queries")
    references = table("references' outcomes", references, "models", "queries")
    if references.shape[1] != len(without):
        raise InputError(
            f"There are outcomes of {len(without)} queries without their samples and of {references.shape[1]} under "
            "the references; give both for the same queries."
        )
    return without - references.mean(0)


class CounterfactualChange(Metric):
    """Mean over queries of :func:`counterfactual_change`, with its standard error.

    The standard error is that of queries drawn at random: the references that all queries share can move the whole
    mean, and are not in it.

    Example:
        >>> metric = CounterfactualChange()
        >>> metric.update(torch.tensor([3.0, 5.0]), torch.tensor([[2.0, 2.0]]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'mean': 2.0, 'standard_error': 1.0}
    """

    is_differentiable = False
    higher_is_better = None  # a loss should rise, a similarity fall
    full_state_update = False

    total: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self) -> None:
        # With a cache, a process that has had no update since it last computed would not take part in the next sync.
        super().__init__(compute_with_cache=False)
        for name in ("total", "squares", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, without: Tensor, references: Tensor) -> None:
        """Add queries; each must be given once, on one process.

        Args:
            without: ``(q,)`` outcomes under the models trained without the samples.
            references: ``(R, q)`` outcomes under the reference models.

        Raises:
            InputError: If the shapes don't fit or a value is not finite.
        """
        changes = counterfactual_change(without, references)
        self.total += changes.sum()
        self.squares += changes.square().sum()
        self.count += len(changes)

    def compute(self) -> dict[str, Tensor]:
        """Mean and standard error over all queries.

        Returns:
            ``mean`` and ``standard_error``, in the unit of the outcome; the latter is NaN for a single query.

        Raises:
            InputError: If there is no query.
        """
        if self.count == 0:
            raise InputError("The counterfactual change has no query; update it before it is computed.")
        mean = self.total / self.count
        variance = (self.squares - self.count * mean.square()).clamp(min=0) / (self.count - 1)
        return {"mean": mean, "standard_error": (variance / self.count).sqrt()}
