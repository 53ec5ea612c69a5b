"""How a delta is found; one file a strategy, one entry here."""

from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.descent import PenalisedDescent
from lightning_unlearn.strategies.mirrored import Mirrored
from lightning_unlearn.strategies.newton import NaturalGradient, Newton
from lightning_unlearn.strategies.penalised import Penalised
from lightning_unlearn.strategies.step_range import StepRange

STRATEGIES: dict[str, type[Strategy]] = {"newton": Newton, "penalised": Penalised, "mirrored": Mirrored}

__all__ = [
    "STRATEGIES",
    "Deltas",
    "Mirrored",
    "NaturalGradient",
    "Newton",
    "Penalised",
    "PenalisedDescent",
    "Problem",
    "StepRange",
    "Strategy",
]
