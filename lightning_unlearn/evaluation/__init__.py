"""Retraining without the influential images, and what it shows."""

from __future__ import annotations

from lightning_unlearn.evaluation.measuring import Measuring, Outcome
from lightning_unlearn.evaluation.retraining import Retrainer, Training, fit_run
from lightning_unlearn.evaluation.runs import (
    Run,
    leave_k_out_runs,
    random_removal_runs,
    seed_runs,
    subset_runs,
)
from lightning_unlearn.evaluation.study import FinishedRun, Study

__all__ = [
    "FinishedRun",
    "Measuring",
    "Outcome",
    "Retrainer",
    "Run",
    "Study",
    "Training",
    "fit_run",
    "leave_k_out_runs",
    "random_removal_runs",
    "seed_runs",
    "subset_runs",
]
