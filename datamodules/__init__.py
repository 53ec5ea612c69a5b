"""WebDataset streams of samples and queries, and the sample data."""

from lightning_unlearn.datamodules.training import TrainingDataModule

__all__ = ["TrainingDataModule"]
