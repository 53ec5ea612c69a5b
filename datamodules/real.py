"""Training samples that hold everything else in place while a query is unlearned."""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from webdataset.filters import shuffle as shuffle_buffer

from lightning_unlearn.data.batches import check_shapes
from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.data.weights import weight_of
from lightning_unlearn.datamodules.dealing import Repeats
from lightning_unlearn.datamodules.group_counts import groups_of
from lightning_unlearn.datamodules.reading import read_fields
from lightning_unlearn.draws.unlearning_draws import RealStream
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of

# How many undecoded samples are held to be shuffled.
HELD = 1000


class RealSamples:
    """The samples of all shards, shuffled, over and over: a function of the shards and the seed alone.

    A sample comes as often as its weight says, beside the smallest one, so that a mean over draws is the mean of the
    data that training saw.

    Every rank reads the same samples and decodes all of a step, so that all agree on which can't be used; they are a
    step's draws in their order, of which a rank then takes its share. What is held in memory does not grow with the
    data.

    Args:
        shards: All shards, in any order.
        stream: Of the draws.
        seed: Of the order.
        query: The samples must have its shapes.
        skip_bad: Whether a sample that can't be used is left out, instead of being an error.
    """

    def __init__(self, shards: list[ShardInfo], stream: RealStream, seed: int, query: Sample, skip_bad: bool) -> None:
        self.shards = shards
        self.stream = stream
        self.seed = seed
        self.query = query
        self.skip_bad = skip_bad
        groups = groups_of(shards)
        self.unit = min(group.smallest for group in groups) if groups else None
        self._weight: float | None = None
        self._samples: Iterator[Sample] | None = None
        self._position = 0

    def take(self, first: int, count: int) -> list[Sample]:
        """Some samples by their places; those after the ones taken last come without reading anything again.

        Args:
            first: Place of the first one.
            count: How many.

        Returns:
            ``count`` samples.

        Raises:
            InputError: If a shard or a sample can't be read, or no sample can be used.
        """
        if self._samples is None or first < self._position:
            self._samples, self._position = self._endless(), 0
        deque(islice(self._samples, first - self._position), maxlen=0)
        self._position = first + count
        return list(islice(self._samples, count))

    def _endless(self) -> Iterator[Sample]:
        turn = 0
        while True:
            shards = sorted(self.shards, key=lambda shard: shard.url)
            random.Random(seed_of(self.stream, "shards", self.seed, turn)).shuffle(shards)
            order = random.Random(seed_of(self.stream, "samples", self.seed, turn))
            repeats = (
                None if self.unit is None else Repeats(self.unit, seed_of(self.stream, "repeats", self.seed, turn))
            )
            read = ((fields, shard.shown) for shard in shards for fields in self._repeated(shard, repeats))
            any_usable = False
            for fields, url in shuffle_buffer(HELD, initial=HELD, rng=order)(read):
                sample = self._usable(fields, url)
                if sample is not None:
                    any_usable = True
                    yield sample
            if not any_usable:
                raise InputError(
                    f"The {len(shards)} training shards hold no sample that can be used, but the strategy trains on "
                    "them; name shards with samples of the queries' shapes."
                )
            turn += 1

    def _repeated(self, shard: ShardInfo, repeats: Repeats | None) -> Iterator[dict[str, Any]]:
        for fields in read_fields(shard):
            try:
                weight = 1.0 if repeats is None else weight_of(json.loads(fields["json"]), "")
            except (InputError, ValueError, KeyError, AttributeError, RecursionError):
                yield fields  # it is told of where it is decoded
                continue
            for _ in range(1 if repeats is None else repeats.of(weight)):
                yield fields

    def _usable(self, fields: Mapping[str, Any], url: str) -> Sample | None:
        try:
            sample = decode_sample(fields)
            check_shapes(sample, self.query, url)
            self._weight = sample.weight if self._weight is None else self._weight
            if self.unit is None and sample.weight != self._weight:
                raise InputError(
                    f"Sample {sample.key!r} in {url} has the weight {sample.weight:g} and others {self._weight:g}, "
                    "which no manifest says; write the shards anew with `lightning-unlearn prepare` or write_shards."
                )
        except InputError:
            if not self.skip_bad:
                raise
            return None
        return sample
