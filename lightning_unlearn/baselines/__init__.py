"""Rival methods of data attribution, for comparison; one file a method, one entry here."""

from __future__ import annotations

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.consensus import Consensus
from lightning_unlearn.baselines.d_trak import DTRAK
from lightning_unlearn.baselines.das import DAS
from lightning_unlearn.baselines.encoder_similarity import EncoderSimilarity
from lightning_unlearn.baselines.gradient_similarity import GradientSimilarity
from lightning_unlearn.baselines.influence import Influence
from lightning_unlearn.baselines.journey_trak import JourneyTRAK
from lightning_unlearn.baselines.pixel_similarity import PixelSimilarity
from lightning_unlearn.baselines.random import Random
from lightning_unlearn.baselines.text_similarity import TextSimilarity
from lightning_unlearn.baselines.trak import TRAK
from lightning_unlearn.baselines.undone import Undone

BASELINES: dict[str, type[Baseline]] = {
    kind.name: kind
    for kind in (
        Random,
        PixelSimilarity,
        TextSimilarity,
        EncoderSimilarity,
        GradientSimilarity,
        Influence,
        TRAK,
        JourneyTRAK,
        DTRAK,
        DAS,
        Consensus,
        Undone,
    )
}

__all__ = [
    "BASELINES",
    "DAS",
    "DTRAK",
    "TRAK",
    "Baseline",
    "Consensus",
    "EncoderSimilarity",
    "GradientSimilarity",
    "Influence",
    "JourneyTRAK",
    "PixelSimilarity",
    "Random",
    "Subject",
    "TextSimilarity",
    "Undone",
]
