"""How a delta is found; one file a strategy, one entry here."""

from lightning_unlearn.strategies.base import Deltas, Problem, Strategy
from lightning_unlearn.strategies.newton import NaturalGradient, Newton

STRATEGIES: dict[str, type[Strategy]] = {"newton": Newton}

__all__ = ["STRATEGIES", "Deltas", "NaturalGradient", "Newton", "Problem", "Strategy"]
