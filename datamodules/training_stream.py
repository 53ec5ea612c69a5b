"""One reader's part of the training data, shuffled by seed and epoch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from itertools import count, islice, repeat
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle as shuffle_buffer

from lightning_unlearn.data.batches import collate_samples, form_of
from lightning_unlearn.data.groups import form_of_fields
from lightning_unlearn.data.masks import LOSS_MASK_FIELD
from lightning_unlearn.data.samples import Sample, SampleBatch, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.data.weights import weight_of
from lightning_unlearn.datamodules.dealing import Deal
from lightning_unlearn.datamodules.reading import FIELDS, read_fields
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of

READ = FIELDS | {LOSS_MASK_FIELD}
_NOTHING = "A reader found no sample to train on; name keys that the shards hold, or use fewer workers or ranks."


class TrainingStream(IterableDataset[SampleBatch]):
    """One rank's endless shuffled samples, cut to a number of batches.

    If every sample is to come once an epoch, samples are dealt one by one, and a reader's share is cut into batches as
    even as can be, of which all readers have the same number. Otherwise shards are dealt over ranks and workers where
    there are enough of them, or every one reads all shards and keeps its own share of their samples. Who runs out of
    samples before the epoch ends starts over. What can't be read gives a batch with the error: an exception would leave
    a worker process with its whole stack trace for a message.

    Args:
        shards: All shards.
        rank: This process.
        world_size: How many there are.
        batch_size: Samples a batch.
        steps: Batches an epoch.
        seed: Of the shuffling.
        keys: If given, only samples with these keys.
        shuffle: How many samples are held to be shuffled.
        cache: Whether shards are read once and their samples kept in memory, decoded.
        total: The number of all samples, if each is to come once an epoch.
        deal: How samples are dealt that have several forms or weights; then an epoch is each of them as often as its
            weight says, in batches of one form.
    """

    def __init__(
        self,
        shards: list[ShardInfo],
        rank: int,
        world_size: int,
        batch_size: int,
        steps: int,
        seed: int,
        keys: frozenset[str] | None,
        shuffle: int,
        cache: bool = False,
        total: int | None = None,
        deal: Deal | None = None,
    ) -> None:
        self.shards = shards
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.keys = keys
        self.shuffle = shuffle
        self.total = total
        self.deal = deal
        self.epoch = 0
        self._first: Sample | None = None
        # Address to a shard's samples, each decoded when it is first drawn.
        self._cached: dict[str, list[_Kept]] | None = {} if cache else None

    def __iter__(self) -> Iterator[SampleBatch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slot, slots = self.rank * workers + number, self.world_size * workers
        steps = self.steps // workers + (number < self.steps % workers)
        try:
            for samples in islice(self._batches(slot, slots), steps):
                yield collate_samples("training", samples)
        except InputError as error:
            yield SampleBatch("training", error=str(error))

    def _batches(self, slot: int, slots: int) -> Iterator[list[Sample]]:
        if self.deal is not None:
            yield from self._dealt(slot, slots, self.deal)
            return
        samples = self._samples(slot, slots)
        for size in repeat(self.batch_size) if self.total is None else self._even_sizes(slot, slots):
            yield self._alike(list(islice(samples, size)))

    def _alike(self, samples: list[Sample]) -> list[Sample]:
        self._first = self._first or samples[0]
        for sample in samples:
            if form_of(sample) != form_of(self._first) or sample.weight != self._first.weight:
                raise InputError(
                    f"The samples {self._first.key!r} and {sample.key!r} differ in shape or weight "
                    f"({form_of(self._first)}, weight {self._first.weight:g}; {form_of(sample)}, weight "
                    f"{sample.weight:g}), which no manifest says; write the shards anew with `lightning-unlearn "
                    "prepare` or write_shards, which make one, and name their folder, which must be a local one."
                )
        return samples

    def _dealt(self, slot: int, slots: int, deal: Deal) -> Iterator[list[Sample]]:
        """Endless batches of one of ``slots`` readers, each of one form."""
        for number in count():
            turn = deal.turn(self.shuffle, "dealt", self.seed, self.epoch, number)
            waiting: dict[int, list[_Kept]] = {}
            any_came = False
            for kept in self._chosen(self._shuffled_shards(number), 0, 1):
                for batch in turn.batches_of(*kept.group()):
                    if batch % slots != slot:
                        continue
                    waiting.setdefault(batch, []).append(kept)
                    if len(waiting[batch]) == turn.size_of(batch):
                        any_came = True
                        yield [one.decode() for one in waiting.pop(batch)]
            for rest in waiting.values():  # a manifest that counts more than there are
                any_came = True
                yield [one.decode() for one in rest]
            if not any_came:
                raise InputError(_NOTHING)

    def _shuffled_shards(self, turn: int) -> list[ShardInfo]:
        # All readers must agree on the order of the shards, so their number is not in this seed.
        order = random.Random(seed_of("training-shards", self.seed, self.epoch, turn))
        shards = sorted(self.shards, key=lambda shard: shard.url)
        order.shuffle(shards)
        return shards

    def _even_sizes(self, slot: int, slots: int) -> list[int]:
        """The sizes of the batches of one reader that has its share of all samples once."""
        assert self.total is not None
        batches = even_batches(self.total, slots, self.batch_size)
        mine = self.total // slots + (slot < self.total % slots)
        return [mine // batches + (batch < mine % batches) for batch in range(batches)]

    def fill_cache(self) -> None:
        """Read all shards into the cache, for workers that end with the epoch and could not keep it."""
        for shard in self.shards if self._cached is not None else ():
            self._read(shard)

    def _samples(self, slot: int, slots: int) -> Iterator[Sample]:
        # Endless samples of one of ``slots`` readers.
        by_shard = len(self.shards) >= slots and self.total is None
        without: set[str] = set()  # shards read since the last sample
        turn = 0
        while True:
            shards = self._shuffled_shards(turn)
            mine = shards[slot::slots] if by_shard else shards
            raw = self._chosen(mine, slot, 1 if by_shard else slots)
            rng = random.Random(seed_of("training-samples", self.seed, self.epoch, turn, slot))
            without.update(shard.url for shard in mine)
            # Undecoded samples wait in the buffer: float16 bytes, half the size of what they become.
            for kept in shuffle_buffer(self.shuffle, initial=self.shuffle, rng=rng)(raw):
                without.clear()
                yield kept.decode()
            # With chosen keys, the shards of one turn may hold none of them, and those of the next do.
            if len(without) == len(shards):
                raise InputError(_NOTHING)
            turn += 1

    def _chosen(self, shards: list[ShardInfo], slot: int, slots: int) -> Iterator[_Kept]:
        position = 0
        for shard in shards:
            for kept in self._read(shard):
                if self.keys is not None and kept.key not in self.keys:
                    continue
                if position % slots == slot % slots:
                    yield kept
                position += 1

    def _read(self, shard: ShardInfo) -> Iterable[_Kept]:
        if self._cached is None:
            return (_Kept(fields, keep=False) for fields in read_fields(shard, fields=READ))
        if shard.url not in self._cached:
            self._cached[shard.url] = [_Kept(fields, keep=True) for fields in read_fields(shard, fields=READ)]
        return self._cached[shard.url]


def even_batches(total: int, readers: int, batch_size: int) -> int:
    """How many batches each reader has, where each sample comes once and all readers have as many.

    Args:
        total: The number of all samples.
        readers: Over all ranks.
        batch_size: Samples a batch; with 1 some batches have two where readers have not as many samples.

    Returns:
        The number.

    Raises:
        InputError: If there is a reader without a sample.
    """
    if total < readers:
        raise InputError(
            f"{total} samples are too few for one on each of {readers} readers; use fewer workers or ranks."
        )
    return min(-(-total // (readers * batch_size)), total // readers)


class _Kept:
    """A sample that is decoded when it is drawn, and where samples are cached, only the first time."""

    def __init__(self, fields: dict[str, Any], *, keep: bool) -> None:
        self.key: str = fields["__key__"]
        self._fields: dict[str, Any] | None = fields
        self._sample: Sample | None = None
        self._group: tuple[str, float] | None = None
        self._keep = keep

    def decode(self) -> Sample:
        """The sample."""
        if self._sample is not None:
            return self._sample
        assert self._fields is not None
        sample = decode_sample(self._fields)
        if self._keep:
            self._sample, self._fields = sample, None
        return sample

    def group(self) -> tuple[str, float]:
        """The sample's form and weight."""
        if self._group is None:
            try:
                told = json.loads((self._fields or {})["json"])
                self._group = form_of_fields(self._fields or {}, told), weight_of(told, f"Sample {self.key!r}")
            except Exception:  # damaged bytes make NumPy and others raise nearly anything
                sample = self.decode()  # which says what is wrong
                self._group = form_of(sample), sample.weight
        return self._group
