"""What a user adds to a Trainer."""

from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator
from lightning_unlearn.callbacks.index_writer import IndexWriter
from lightning_unlearn.callbacks.score_writer import ScoreWriter
from lightning_unlearn.callbacks.scoring_progress import ScoringProgress

__all__ = ["FisherAccumulator", "IndexWriter", "ScoreWriter", "ScoringProgress"]
