"""Products of gradients: TracIn and its relatives."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.gradients import query_gradients, training_gradients
from lightning_unlearn.baselines.per_sample import TINY
from lightning_unlearn.errors import InputError

SIMILARITIES = ("dot", "cosine")


class GradientSimilarity(Baseline):
    r"""How far a training step on a sample would lower the query's loss.

    .. math:: τ(\hat z, z) = ∇L(z, θ_0)^T ∇L(\hat z, θ_0)

    TracIn (Pruthi et al., arXiv 2002.08484) with the last checkpoint alone; ``cosine`` divides by both lengths.
    With ``per_timestep`` each view's gradient is brought to length 1 before the mean over views, on both sides:
    Diffusion-ReTrac (Xie et al., arXiv 2401.09031), against timesteps whose gradients are long for every
    sample.

    Args:
        similarity: ``"dot"`` or ``"cosine"``.
        per_timestep: Whether gradients are normalised at each timestep.

    Raises:
        InputError: If there is no such similarity.
    """

    name: ClassVar[str] = "gradient_similarity"
    needs_query_views: ClassVar[bool] = True

    def __init__(self, similarity: Literal["dot", "cosine"] = "dot", per_timestep: bool = False) -> None:
        if similarity not in SIMILARITIES:
            raise InputError(
                f"There is no gradient similarity {similarity!r}; choose one of {', '.join(SIMILARITIES)}."
            )
        self.similarity = similarity
        self.per_timestep = per_timestep

    def scores(self, subject: Subject) -> Tensor:
        """Products of gradients; see :meth:`Baseline.scores`.

        Args:
            subject: The model, its training samples and the queries.

        Returns:
            ``(N, Q)``.
        """
        queries = query_gradients(subject, "loss", per_timestep=self.per_timestep)
        rows = []
        for batch in training_gradients(subject, "loss", per_timestep=self.per_timestep):
            products = batch.products(queries.parameters)  # (B, Q)
            if self.similarity == "cosine":
                lengths = torch.outer(batch.squared_norms().sqrt(), queries.squared_norms().sqrt())
                products = products / lengths.clamp(min=TINY)
            rows.append(products)
        return torch.cat(rows)
