"""How a delta is found; one file a strategy, one entry here."""

from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.descent import PenalisedDescent
from lightning_unlearn.strategies.newton import NaturalGradient, Newton
from lightning_unlearn.strategies.penalised import Penalised

STRATEGIES: dict[str, type[Strategy]] = {"newton": Newton, "penalised": Penalised}

__all__ = [
    "STRATEGIES",
    "Deltas",
    "NaturalGradient",
    "Newton",
    "Penalised",
    "PenalisedDescent",
    "Problem",
    "Strategy",
]
