"""What networks of families predict, for whoever must see it although an objective calls the network itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_LISTENERS: ContextVar[tuple[list[Tensor], ...]] = ContextVar("listeners", default=())


@contextmanager
def noted_predictions() -> Iterator[list[Tensor]]:
    """While it lasts, each prediction is noted: that of the latents, whatever else or however a network gives it.

    Yields:
        The predictions, ``(B, C, H, W)`` each, in the order of the calls.
    """
    seen: list[Tensor] = []
    token = _LISTENERS.set((*_LISTENERS.get(), seen))
    try:
        yield seen
    finally:
        _LISTENERS.reset(token)


def note_prediction(prediction: Tensor) -> None:
    """Tell whoever listens.

    Args:
        prediction: ``(B, C, H, W)``.
    """
    for seen in _LISTENERS.get():
        seen.append(prediction)
