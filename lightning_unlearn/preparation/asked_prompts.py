"""What a network is conditioned on for a prompt that a person writes: encoded, or that of a known caption."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import Item, TextSource
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.tally import Tally

NEAR = 6
# Of a prompt that is a caption but for how it begins.
_BEGINNING = re.compile(r"^((an? )?(emoji|photo|picture|image|drawing|painting) of|an?|the) (?=.)")


class Prompts(Protocol):
    """Gives what a network is conditioned on for a prompt."""

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """Name to ``(1, …)``, and sentences that the person should know."""
        ...


class EncodedPrompts:
    """Prompts through a text encoder.

    Args:
        text: The encoder.
    """

    def __init__(self, text: TextSource) -> None:
        self.text = text

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """See :class:`Prompts`."""
        self.text.cut = Tally()
        (states,) = self.text.states([Item(0, Record("prompt", [prompt], {}, "the prompt"))])
        arrays = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in states.items()}
        return arrays, cut_notes(self.text)


class KnownPrompts:
    """Prompts that say what a training caption says, of which the shards have the states: no encoder is needed.

    Args:
        captions: ``N`` lists of captions.
        fetch: A row's sample.
    """

    def __init__(self, captions: Sequence[Sequence[str]], fetch: Callable[[int], Sample]) -> None:
        self.fetch = fetch
        self._places: dict[str, tuple[int, int, str]] = {}
        for row, own in enumerate(captions):
            for place, caption in enumerate(own):
                self._places.setdefault(_plain(caption), (row, place, caption))

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """See :class:`Prompts`.

        Args:
            prompt: The prompt.

        Returns:
            The conditions of the caption.

        Raises:
            InputError: If no caption says the same.
        """
        plain = _plain(prompt)
        known = next((words for words in (plain, _without_beginning(plain)) if words in self._places), None)
        if known is None:
            near = ", ".join(repr(caption) for caption in self._near(plain))
            raise InputError(
                f"This model's text encoder is not at hand, so that only captions of its training are understood, and "
                f"{prompt[:60]!r} is none of them; try {near}, or look for one by Search."
            )
        row, place, caption = self._places[known]
        sample = self.fetch(row)
        notes = [] if caption == prompt else [f"It is read as the training caption {caption!r}."]
        return {
            name: array[place : place + 1] if len(array) > 1 else array for name, array in sample.conditions.items()
        }, notes

    def _near(self, plain: str) -> list[str]:
        """Captions that share most words with a prompt, or else some."""
        words = set(plain.split()[:64])
        shared = [(len(words & set(known.split())), known) for known in self._places]
        best = sorted((one for one in shared if one[0]), key=lambda one: (-one[0], len(one[1]), one[1]))[:NEAR]
        return [self._places[known][2] for _, known in best or shared[:NEAR]]


def cut_notes(text: TextSource) -> list[str]:
    """What a person should know of the prompts that an encoder has read.

    Args:
        text: The encoder, whose ``cut`` counted since it was made anew.

    Returns:
        A sentence if only the beginning of one was read.
    """
    cut = "The prompt is longer than what the model's text encoder reads; only its beginning was read."
    return [cut] if text.cut.lines() else []


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split()).rstrip(".!")


def _without_beginning(words: str) -> str:
    while (rest := _BEGINNING.sub("", words)) != words:
        words = rest
    return words
