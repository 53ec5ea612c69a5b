"""What samples look and read like, apart from any model: an answer that says no more than that must say so."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.pixel_similarity import PixelSimilarity
from lightning_unlearn.baselines.text_similarity import TextSimilarity
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.agreement import CAPTIONS, PIXELS, caption_digests


class Appearances:
    """Captions of samples, and how similar captions and pictures are to those of the queries, a batch at a time.

    Args:
        subject: With the queries and the views.

    Attributes:
        captions: What tells captions apart, of all samples that were added.
    """

    def __init__(self, subject: Subject) -> None:
        self.captions: list[str] = []
        self._subject = subject
        # Where there is no text, or pictures are of several shapes, there is no such similarity.
        self._methods: dict[str, Baseline] = {CAPTIONS: TextSimilarity(), PIXELS: PixelSimilarity("l2")}
        self._found: dict[str, list[Tensor]] = {name: [] for name in self._methods}

    def add(self, batch: SampleBatch) -> None:
        """Look at some samples.

        Args:
            batch: They.
        """
        self.captions.extend(caption_digests(batch))
        subject = replace(self._subject, batches=lambda: [batch])
        for name, method in list(self._methods.items()):
            try:
                self._found[name].append(method.scores(subject))
            except InputError:
                del self._methods[name]

    def similarities(self) -> dict[str, Tensor]:
        """Of all samples that were added.

        Returns:
            Name to ``(N, Q)``; without what can't be compared.
        """
        return {name: torch.cat(self._found[name]).double() for name in self._methods}
