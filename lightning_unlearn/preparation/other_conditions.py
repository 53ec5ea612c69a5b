"""What networks are conditioned on in the place of text: a class, the state of a picture, nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import Array, Item, open_array
from lightning_unlearn.preparation.records import SKIP, Record
from lightning_unlearn.preparation.tally import Tally

CLASS_LABEL = "class_label"


class NoText:
    """Captions that are kept for people alone, for a network that is given none."""

    def __init__(self) -> None:
        self.rows: int | None = None
        self.captions: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.cut = Tally()
        self.about: dict[str, Any] = {"encoder": None}

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """See :class:`~lightning_unlearn.preparation.inputs.TextSource`; none."""
        return [{} for _ in items]


class ReadyImageStates(NoText):
    """States of pictures that someone made before, read from the disk as they are needed.

    Args:
        path: An ``.npy`` file ``(N, dim)``.

    Raises:
        InputError: If it can't be read.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.array = open_array(path, (2,), "(N, dim)")
        self.rows = len(self.array)
        self.shapes = {"image": self.array.shape[1:]}
        self.about = {"encoder": "ready array"}

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """See :class:`~lightning_unlearn.preparation.inputs.TextSource`; ``image`` holds for all captions."""
        return [{"image": np.asarray(self.array[item.index])[None]} for item in items]


def class_of(record: Record, column: str) -> int:
    """The number of a sample's class.

    Args:
        record: The sample.
        column: Where it stands.

    Returns:
        The number.

    Raises:
        InputError: If there is none, or it is no whole number from 0 on.
    """
    value = record.metadata.get(column)
    if value is None:
        there = ", ".join(sorted(record.metadata)) or "none"
        raise InputError(f"{record.place} has no {column!r} for its class (its columns: {there}); add it, or {SKIP}.")
    # Tables of text have numbers as texts.
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    whole = isinstance(number, int) and not isinstance(number, bool)
    if isinstance(number, float) and number.is_integer():
        number, whole = int(number), True
    if not whole or number < 0:
        raise InputError(
            f"{record.place}: its class in {column!r} is {str(value)[:40]!r}, which is no whole number from 0 on; "
            f"write the number with which the model was trained, or {SKIP}."
        )
    return int(number)
