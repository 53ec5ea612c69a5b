"""How numbers with intervals are written on the results page."""

from __future__ import annotations

from lightning_unlearn.evaluation.results import Value


def shown(value: Value, factor: float = 1.0, digits: int = 3) -> str:
    """A value with its interval."""
    return f"{value.mean * factor:.{digits}f} [{value.low * factor:.{digits}f}, {value.high * factor:.{digits}f}]"


def difference(value: Value, factor: float = 1.0, digits: int = 3) -> str:
    """A difference with its interval, and whether it is within noise."""
    within = " (within noise)" if value.low <= 0 <= value.high else ""
    mean, low, high = (f"{number * factor:+.{digits}f}" for number in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]{within}"
