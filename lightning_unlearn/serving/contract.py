"""What the page needs of a model and of an index, and the forms in which it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.preparation.asked import Made

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What an index says of one query.

    Attributes:
        scores: ``(N,)`` float64, in the order of the index; high means influential.
        parts: Method to its scores ``(N,)``, where several were asked.
        sure: How sure the answer is, as ``run.json`` has it; empty if nobody knows.
        seconds: What it took.
    """

    scores: Scores
    parts: Mapping[str, Scores] = field(default_factory=dict)
    sure: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class GroupRow:
    """The pictures that a field says the same of.

    Attributes:
        name: The field's value.
        images: How many pictures.
        mean: Of their scores.
        low: Lower end of its 95 % interval; −∞ for a single picture.
        high: Upper end of it.
    """

    name: str
    images: int
    mean: float
    low: float
    high: float


class QueryMaker(Protocol):
    """Makes queries of prompts and pictures, as a training's pictures were made samples."""

    def from_prompt(self, key: str, prompt: str, seed: int) -> Made:
        """A picture is generated with a prompt."""
        ...

    def from_picture(self, key: str, prompt: str, picture: bytes) -> Made:
        """A picture that a person has, with the prompt that it was made with."""
        ...


class Answerer(Protocol):
    """Answers queries."""

    def answer(self, query: Sample) -> Answer:
        """The scores of all training pictures for a query."""
        ...

    def groups(self, field: str, answer: Answer) -> Sequence[GroupRow]:
        """The groups that a field of the samples makes, highest first."""
        ...
