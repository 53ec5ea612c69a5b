"""Scores by groups of samples: any field of their json, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.firmness import student_quantile


@dataclass(frozen=True)
class ScoredGroup:
    """The scores of all samples that have one value in a field.

    Attributes:
        name: The value; ``None`` of those without the field.
        samples: How many they are.
        mean: ``(Q,)`` float64 mean score.
        low: ``(Q,)`` lower end of the mean's 95 % interval (Student's t over the group's samples); −∞ where a single
            sample shows no scatter.
        high: ``(Q,)`` its upper end.
    """

    name: str | None
    samples: int
    mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def total(self) -> Tensor:
        """``(Q,)`` the sum of the group's scores."""
        return self.mean * self.samples


def scored_groups(values: Sequence[str | None], scores: Tensor) -> list[ScoredGroup]:
    """Mean scores of groups.

    Args:
        values: ``N`` values of a field, ``None`` where a sample has none.
        scores: ``(N, Q)``.

    Returns:
        Of each group, in the order of their first query's means, highest first; the one without a value last.

    Raises:
        InputError: If there are not as many scores as values, or one is not finite.

    Example:
        >>> first, second = scored_groups(["a", "b", "a"], torch.tensor([[1.0], [9.0], [3.0]]))
        >>> first.name, second.name, float(second.mean), float(second.total)
        ('b', 'a', 2.0, 4.0)
    """
    if scores.ndim != 2 or len(scores) != len(values) or not scores.isfinite().all():
        raise InputError(
            f"Groups of {len(values)} samples need a finite score of each and every query, (N, Q), but got "
            f"{tuple(scores.shape)}."
        )
    names = list(dict.fromkeys(values))
    numbers = {name: number for number, name in enumerate(names)}
    of = torch.tensor([numbers[value] for value in values], dtype=torch.int64)
    wide = scores.double().cpu()
    counts = torch.bincount(of, minlength=len(names)).double()

    def sums(rows: Tensor) -> Tensor:
        return torch.zeros(len(names), rows.shape[1], dtype=torch.float64).index_add_(0, of, rows)

    means = sums(wide) / counts[:, None]
    free = (counts - 1).clamp(min=1)
    variances = sums((wide - means[of]).square()) / (free * counts)[:, None]  # of the means
    reach = student_quantile(free)[:, None] * variances.sqrt()
    reach = torch.where(counts[:, None] > 1, reach, torch.inf)
    found = [
        ScoredGroup(name, int(counts[row]), means[row], means[row] - reach[row], means[row] + reach[row])
        for row, name in enumerate(names)
    ]
    return sorted(found, key=lambda group: (group.name is None, -float(group.mean[0]) if len(group.mean) else 0.0))
