"""WebDataset streams of samples and queries, and the sample data."""

from lightning_unlearn.datamodules.attribution import AttributionDataModule
from lightning_unlearn.datamodules.training import TrainingDataModule

__all__ = ["AttributionDataModule", "TrainingDataModule"]
