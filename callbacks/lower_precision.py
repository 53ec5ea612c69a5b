"""How far scores that were computed in lower precision, or compiled, rank samples as float32 does."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_unlearn.errors import InputError

# Below it another precision gives another answer; of a few samples the correlation says little.
LEAST, ENOUGH = 0.99, 20


def agreement(scores: Tensor, exact: Tensor, computed_in: str) -> float:
    """Mean over targets of the rank correlation with float32.

    Args:
        scores: ``(B, Q)`` of a first batch.
        exact: The same in float32.
        computed_in: How the scores were computed, in words.

    Returns:
        Spearman's.

    Raises:
        InputError: If it is below 0.99 over 20 samples or more: a training image's loss rises by some 1e-4 of itself,
            which rounding drowns.
    """
    good = (scores.isfinite() & exact.isfinite()).all(1)
    correlations = spearman_corrcoef(scores[good].double(), exact[good].double())  # (Q,) or a scalar
    found = float(correlations.mean())
    if good.sum() >= ENOUGH and not found >= LEAST:
        raise InputError(
            f"Scores computed in {computed_in} rank the first {int(good.sum())} samples as float32 does with a "
            f"correlation of {found:.3f} only, and {LEAST} is wanted; score in 32-true, and to save memory set the "
            "model's dtype to bfloat16."
        )
    return found
