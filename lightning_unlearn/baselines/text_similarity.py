"""Similarity of the text that samples and queries are conditioned on: captions alike, and nothing of the pictures."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.errors import InputError

POOLINGS = ("mean", "max", "max_token")


class TextSimilarity(Baseline):
    """Cosine of text states, averaged over all pairs of a sample's and a query's captions.

    The "text" row of Wang et al. (arXiv 2406.09408, Table 1). ``mean`` and ``max`` pool a caption's token states, each
    dimension by its mean or its largest value. ``max_token`` looks for each token of the query at the most similar
    token of the sample and averages these cosines, as in Khattab and Zaharia's late interaction (arXiv 2004.12832,
    Eq. 3). Token states of zero are padding and are left out.

    Args:
        pooling: ``"mean"``, ``"max"`` or ``"max_token"``.

    Raises:
        InputError: If there is no such pooling.
    """

    name: ClassVar[str] = "text_similarity"

    def __init__(self, pooling: Literal["mean", "max", "max_token"] = "mean") -> None:
        if pooling not in POOLINGS:
            raise InputError(f"There is no text pooling {pooling!r}; choose one of {', '.join(POOLINGS)}.")
        self.pooling = pooling

    def scores(self, subject: Subject) -> Tensor:
        """Compare text states; see :meth:`Baseline.scores`.

        Args:
            subject: The model is not looked at.

        Returns:
            ``(N, Q)``.
        """
        # One by one, since queries may have different numbers of captions.
        queries = [collate_samples("queries", [query]) for query in subject.queries]
        targets = [query.text[0, : subject.views.caption_slots(query)] for query in queries]
        rows = []
        for batch in subject.batches():
            slots = subject.views.caption_slots(batch) if len(batch) else 0
            for text, count in zip(batch.text, batch.caption_counts.tolist(), strict=True):
                captions = text[: min(count, slots)].cpu()
                rows.append(torch.stack([self._compare(captions, target) for target in targets]))
        return torch.stack(rows)

    def _compare(self, sample: Tensor, query: Tensor) -> Tensor:
        """Captions ``(c, tokens, dim)`` of a sample with those of a query: a scalar."""
        pairs = [self._pair(ours, theirs) for ours in _tokens(sample) for theirs in _tokens(query)]
        return torch.stack(pairs).mean()

    def _pair(self, sample: Tensor, query: Tensor) -> Tensor:
        if self.pooling == "max_token":
            return (normalize(query, dim=1) @ normalize(sample, dim=1).mT).amax(1).mean()
        ours, theirs = (
            tokens.mean(0) if self.pooling == "mean" else tokens.amax(0) for tokens in (sample, query)
        )  # (dim,)
        return torch.cosine_similarity(ours, theirs, dim=0)


def _tokens(captions: Tensor) -> list[Tensor]:
    """Each caption's token states without padding: ``(t, dim)``; a caption of nothing but padding keeps it."""
    captions = captions.double()
    kept = [caption[caption.abs().amax(1) > 0] for caption in captions]
    return [tokens if len(tokens) else caption for tokens, caption in zip(kept, captions, strict=True)]
