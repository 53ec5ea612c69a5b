"""How good an attribution is: measures as torchmetrics, under functions that give a value a query; one idea a file.

A function gives ``(Q,)`` values, which the intervals of :mod:`~lightning_unlearn.metrics.uncertainty` take; the class
of the same name gathers over batches and processes and gives their mean.
"""

from lightning_unlearn.metrics.counterfactual import CounterfactualChange, counterfactual_change
from lightning_unlearn.metrics.datamodelling import (
    LinearDatamodellingScore,
    linear_datamodelling_score,
    noise_ceiling,
    subset_predictions,
)
from lightning_unlearn.metrics.ranks import average_ranks, normal_scores, rank_correlation
from lightning_unlearn.metrics.retrieval import ExemplarRetrieval, exemplar_retrieval
from lightning_unlearn.metrics.uncertainty import (
    Comparison,
    Interval,
    bootstrap_interval,
    linear_datamodelling_comparison,
    linear_datamodelling_interval,
    noise_ceiling_interval,
    paired_bootstrap,
)

__all__ = [
    "Comparison",
    "CounterfactualChange",
    "ExemplarRetrieval",
    "Interval",
    "LinearDatamodellingScore",
    "average_ranks",
    "bootstrap_interval",
    "counterfactual_change",
    "exemplar_retrieval",
    "linear_datamodelling_comparison",
    "linear_datamodelling_interval",
    "linear_datamodelling_score",
    "noise_ceiling",
    "noise_ceiling_interval",
    "normal_scores",
    "paired_bootstrap",
    "rank_correlation",
    "subset_predictions",
]
