"""What a user adds to a Trainer."""

from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator
from lightning_unlearn.callbacks.score_writer import ScoreWriter

__all__ = ["FisherAccumulator", "ScoreWriter"]
