"""Random scores: the floor under every comparison."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.fingerprints import generator_for


class Random(Baseline):
    """Uniform scores in [0, 1), keyed by seed, query and sample: the order of samples or queries changes none.

    Args:
        seed: Of all scores.
    """

    name: ClassVar[str] = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, subject: Subject) -> Tensor:
        """Draw the scores; see :meth:`Baseline.scores`.

        Args:
            subject: Only keys are looked at.

        Returns:
            ``(N, Q)``.
        """
        queries = [query.key for query in subject.queries]
        rows = [[self._draw(query, key) for query in queries] for batch in subject.batches() for key in batch.keys]
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(queries))

    def _draw(self, query: str, key: str) -> float:
        generator = generator_for("random-baseline", self.seed, query, key)
        return float(torch.rand((), generator=generator, dtype=torch.float64))
