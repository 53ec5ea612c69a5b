"""Similarity of the text that samples and queries are conditioned on: captions alike, and nothing of the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.conditions import MASK
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.errors import InputError

POOLINGS = ("mean", "max", "max_token")
TEXT_MASK = f"text{MASK}"


@dataclass(frozen=True)
class _Captions:
    """Token states of a sample's captions without padding, ``(t, dim)`` each, and their shares."""

    states: list[Tensor]
    shares: Tensor


class TextSimilarity(Baseline):
    """Cosine of text states, averaged over all pairs of a sample's and a query's captions, by their shares in training.

    The "text" row of Wang et al. (arXiv 2406.09408, Table 1). ``mean`` and ``max`` pool a caption's token states, each
    dimension by its mean or its largest value. ``max_token`` looks for each token of the query at the most similar
    token of the sample and averages these cosines, as in Khattab and Zaharia's late interaction (arXiv 2004.12832,
    Eq. 3). Padding is left out: what the text's mask says, and token states of zero.

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
        queries = [caption for query in subject.queries for caption in _captions(collate_samples("", [query]), subject)]
        rows = []
        for batch in subject.batches():
            for sample in _captions(batch, subject) if len(batch) else ():
                rows.append(torch.stack([self._compare(sample, query) for query in queries]))
        return torch.stack(rows)

    def _compare(self, sample: _Captions, query: _Captions) -> Tensor:
        """All pairs of captions: a scalar."""
        pairs = torch.stack(
            [torch.stack([self._pair(ours, theirs) for theirs in query.states]) for ours in sample.states]
        )
        return sample.shares @ pairs @ query.shares

    def _pair(self, sample: Tensor, query: Tensor) -> Tensor:
        if self.pooling == "max_token":
            return (normalize(query, dim=1) @ normalize(sample, dim=1).mT).amax(1).mean()
        ours, theirs = (
            tokens.mean(0) if self.pooling == "mean" else tokens.amax(0) for tokens in (sample, query)
        )  # (dim,)
        return torch.cosine_similarity(ours, theirs, dim=0)


def _captions(batch: SampleBatch, subject: Subject) -> list[_Captions]:
    """The captions of each sample that are looked at."""
    slots, mask = subject.views.caption_slots(batch), batch.conditions.get(TEXT_MASK)
    found = []
    for row, count in enumerate(batch.caption_counts.tolist()):
        states = batch.text[row, : min(count, slots)].cpu().double()
        used = len(states)
        if mask is not None:
            # A single mask holds for all captions.
            states = states * mask[row, : used if mask.shape[1] > 1 else 1].cpu().double()[..., None]
        given = [1.0] * used if batch.caption_weights is None else batch.caption_weights[row][:used]
        shares = torch.tensor(given, dtype=torch.float64)
        found.append(_Captions([_tokens(caption) for caption in states], shares / shares.sum()))
    return found


def _tokens(caption: Tensor) -> Tensor:
    """A caption's token states without padding: ``(t, dim)``; one of nothing but padding keeps it."""
    tokens = caption[caption.abs().amax(1) > 0]
    return tokens if len(tokens) else caption
