"""Similarity of the latents themselves: near-duplicates, and nothing of the model."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.errors import InputError

SIMILARITIES = ("cosine", "l2", "centred_cosine")


class PixelSimilarity(Baseline):
    r"""Similarity of a sample's and a query's latents, which are pixels for a pixel-space model.

    The "pixel" row of Wang et al. (arXiv 2406.09408, Table 1) and the raw-pixel baseline of Zheng et al.
    (arXiv 2311.00500). With :math:`x` and :math:`\hat x` as vectors and the mean :math:`\mu` of all
    training latents: ``cosine`` is :math:`x^T \hat x / (‖x‖ ‖\hat x‖)`, ``l2`` is :math:`-‖x - \hat x‖`, and
    ``centred_cosine`` is the cosine of :math:`x - \mu` and :math:`\hat x - \mu`, which does not reward what all images
    have in common. Mirrored latents are not looked at.

    Args:
        similarity: ``"cosine"``, ``"l2"`` or ``"centred_cosine"``.

    Raises:
        InputError: If there is no such similarity.
    """

    name: ClassVar[str] = "pixel_similarity"

    def __init__(self, similarity: Literal["cosine", "l2", "centred_cosine"] = "cosine") -> None:
        if similarity not in SIMILARITIES:
            raise InputError(f"There is no pixel similarity {similarity!r}; choose one of {', '.join(SIMILARITIES)}.")
        self.similarity = similarity

    def scores(self, subject: Subject) -> Tensor:
        """Compare latents; see :meth:`Baseline.scores`.

        Args:
            subject: The model is not looked at.

        Returns:
            ``(N, Q)``.

        Raises:
            InputError: If latents differ in their shapes.
        """
        shape = subject.queries[0].latent.shape
        queries = torch.cat([_rows(query.latent[None], shape, query.key) for query in subject.queries])  # (Q, C H W)
        mean = _mean(subject, shape) if self.similarity == "centred_cosine" else torch.zeros(queries.shape[1])
        return torch.cat(
            [
                self._compare(_rows(batch.latents, shape, batch.keys[0]) - mean, queries - mean)
                for batch in subject.batches()
                if len(batch)
            ]
        )

    def _compare(self, samples: Tensor, queries: Tensor) -> Tensor:
        if self.similarity == "l2":
            # Not by a matrix product, which loses the distance of near-duplicates.
            return -torch.cdist(samples, queries, compute_mode="donot_use_mm_for_euclid_dist")
        return normalize(samples, dim=1) @ normalize(queries, dim=1).mT


def _rows(latents: Tensor, shape: torch.Size, key: str) -> Tensor:
    # Of latents of another shape with as many numbers, other places would be compared.
    if latents.shape[1:] != shape:
        raise InputError(
            f"PixelSimilarity compares latents place by place, but that of {key!r} is {tuple(latents.shape[1:])} and "
            f"that of the first query {tuple(shape)}; take another method for pictures of several shapes."
        )
    return latents.cpu().double().flatten(1)


def _mean(subject: Subject, shape: torch.Size) -> Tensor:
    sums, count = [], 0
    for batch in subject.batches():
        if len(batch):
            sums.append(_rows(batch.latents, shape, batch.keys[0]).sum(0))
            count += len(batch)
    return torch.stack(sums).sum(0) / count
