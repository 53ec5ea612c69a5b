"""What a user adds to a Trainer."""

from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator

__all__ = ["FisherAccumulator"]
