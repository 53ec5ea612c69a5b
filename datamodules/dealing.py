"""How samples of several forms and weights are dealt to readers: as often as training saw them, in batches of one form.

A sample comes as often as its weight says, beside the smallest of all weights, in whole numbers: of 2.5 it is now two,
now three times. So whatever is summed over a pass (a Fisher, a gradient) is what a set would give that held the samples
so many times, and each repetition has a timestep and a noise of its own; a factor on losses would give the Fisher's
two sides, and its counts, different weights.

Everything is a function of a turn's seed and the manifests: all readers agree without asking each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_unlearn.data.groups import Group
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of


@dataclass(frozen=True)
class FormDeal:
    """The samples of one form in a turn.

    Attributes:
        first: Number of the form's first batch among all.
        batches: How many batches it has.
        samples: How many samples, repetitions among them.
        step: Weight that is passed from one of them to the next.
    """

    first: int
    batches: int
    samples: int
    step: float


class Deal:
    """Which batches a turn over all samples has, and which reader gets which.

    Args:
        groups: Of all shards.
        batch_size: Samples a batch, at most; with 1 some batches have two where readers have not as many samples.
        readers: Over all ranks; each has as many batches as the others.

    Attributes:
        unit: The weight of a sample that comes once a turn.
        batches: How many batches each reader has.

    Raises:
        InputError: If there are too few samples for all readers.
    """

    def __init__(self, groups: Sequence[Group], batch_size: int, readers: int) -> None:
        self.readers = readers
        self.unit = min(group.smallest for group in groups)
        weights: dict[str, float] = {}
        for group in groups:
            weights[group.form] = weights.get(group.form, 0.0) + group.weight / self.unit
        counts = {form: max(1, round(weights[form])) for form in sorted(weights)}
        batches = _even({form: -(-count // batch_size) for form, count in counts.items()}, counts, readers)
        first = 0
        self.forms: dict[str, FormDeal] = {}
        for form, count in counts.items():
            self.forms[form] = FormDeal(first, batches[form], count, weights[form] / count)
            first += batches[form]
        self.batches = first // readers

    def turn(self, window: int, *seed: str | int) -> Turn:
        """A turn over all samples.

        Args:
            window: Within so many samples of a form the order is random.
            *seed: What the turn's order follows from; the same for all readers.

        Returns:
            The turn.
        """
        return Turn(self, window, seed_of(*seed))


def _even(batches: dict[str, int], counts: dict[str, int], readers: int) -> dict[str, int]:
    """Numbers of batches that add up to as many for each reader: the largest are cut, or, if none can be, joined."""
    total = sum(counts.values())
    wanted = -(-sum(batches.values()) // readers) * readers
    if wanted > total:
        wanted -= readers
    if not len(counts) <= wanted:
        raise InputError(
            f"{total} samples of {len(counts)} forms are too few for as many batches on each of {readers} readers; use "
            "fewer workers or ranks."
        )
    even = dict(batches)
    while sum(even.values()) < wanted:
        form = max((form for form in counts if even[form] < counts[form]), key=lambda form: counts[form] / even[form])
        even[form] += 1
    while sum(even.values()) > wanted:
        form = min((form for form in counts if even[form] > 1), key=lambda form: counts[form] / even[form])
        even[form] -= 1
    return even


class Turn:
    """One turn over all samples, which come in the same order at each reader.

    Args:
        deal: How they are dealt.
        window: Within so many samples of a form the order is random.
        seed: Of the order.
    """

    def __init__(self, deal: Deal, window: int, seed: int) -> None:
        self.deal = deal
        self.window = max(1, window)
        self.seed = seed
        self._repeats = {form: Repeats(of.step, seed_of("repeats", seed, form)) for form, of in deal.forms.items()}
        self._taken = dict.fromkeys(deal.forms, 0)
        self._order: dict[str, tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]]] = {}

    def batches_of(self, form: str, weight: float) -> Iterator[int]:
        """The batches that the next sample is in, once for each time that it comes.

        Args:
            form: Its form.
            weight: Its weight.

        Yields:
            Numbers of batches among all; that of reader ``r`` of ``n`` leaves ``r`` when divided by ``n``.

        Raises:
            InputError: If the manifest knows no such sample.
        """
        of = self.deal.forms.get(form)
        if of is None:
            raise InputError(
                f"A shard holds a sample with {form}, which its manifest does not list; make the manifest again."
            )
        for _ in range(self._repeats[form].of(weight / self.deal.unit)):
            place = self._taken[form]
            if place == of.samples:  # rounding: weights were added up in another order
                return
            self._taken[form] += 1
            shuffled = self._shuffled(form, place, of.samples)
            # The batch whose share of the places, cut as evenly as can be, holds this one.
            yield of.first + ((shuffled + 1) * of.batches - 1) // of.samples

    def size_of(self, number: int) -> int:
        """How many samples a batch has.

        Args:
            number: Its number among all.

        Returns:
            The number.
        """
        of = next(of for of in self.deal.forms.values() if of.first <= number < of.first + of.batches)
        start, end = number - of.first, number - of.first + 1
        return end * of.samples // of.batches - start * of.samples // of.batches

    def _shuffled(self, form: str, place: int, samples: int) -> int:
        number = place // self.window
        if form not in self._order or self._order[form][0] != number:
            length = min(self.window, samples - number * self.window)
            generator = np.random.Generator(np.random.PCG64(seed_of("window", self.seed, form, number)))
            self._order[form] = number, generator.permutation(length)
        return number * self.window + int(self._order[form][1][place % self.window])


class Repeats:
    """How often each of a run of samples comes: as often as its weight is long, on a line with evenly spaced marks.

    Args:
        step: Between two marks; a weight of it comes once.
        seed: Of the place of the first mark.

    Example:
        >>> repeats = Repeats(1.0, 0)
        >>> [repeats.of(weight) for weight in (2, 1, 3)]
        [2, 1, 3]
        >>> repeats = Repeats(1.0, 0)
        >>> sum(repeats.of(0.25) for _ in range(8))
        2
    """

    def __init__(self, step: float, seed: int) -> None:
        self.step = step
        self._passed = 0.0
        self._first = random.Random(seed).random()

    def of(self, weight: float) -> int:
        """How often the next sample comes.

        Args:
            weight: Its weight.

        Returns:
            The number, which may be 0 where the weight is below ``step``.
        """
        before = math.ceil(self._passed / self.step - self._first)
        self._passed += weight
        return math.ceil(self._passed / self.step - self._first) - before
