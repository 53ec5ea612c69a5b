"""How far scores that were computed in lower precision, or compiled, rank samples as float32 does."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.scoring import COMPARED

# Below it another precision gives another answer.
LEAST = 0.99


class Agreement:
    """Mean over targets of the rank correlation with float32, over the first samples of a run."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._exact: list[Tensor] = []

    def add(self, scores: Tensor, exact: Tensor, computed_in: str) -> None:
        """Look at some samples more.

        Args:
            scores: ``(B, Q)``.
            exact: The same in float32.
            computed_in: How the scores were computed, in words.

        Raises:
            InputError: If the correlation is below 0.99 over 20 samples or more: a training image's loss rises by some
                1e-4 of itself, which rounding drowns.
        """
        good = (scores.isfinite() & exact.isfinite()).all(1)
        self._scores.append(scores[good].double())
        self._exact.append(exact[good].double())
        found = self.value
        if found is not None and self.samples >= COMPARED and not found >= LEAST:
            raise InputError(
                f"Scores computed in {computed_in} rank the first {self.samples} samples as float32 does with a "
                f"correlation of {found:.3f} only, and {LEAST} is wanted; score in 32-true, and to save memory set "
                "the model's dtype to bfloat16."
            )

    @property
    def samples(self) -> int:
        """Over how many it was taken."""
        return sum(map(len, self._scores))

    @property
    def value(self) -> float | None:
        """Spearman's; ``None`` of fewer than three samples."""
        if self.samples < 3:
            return None
        return float(spearman_corrcoef(torch.cat(self._scores), torch.cat(self._exact)).mean())  # of (Q,), or a scalar
