"""Shards as training data: shuffled by seed and epoch, the same number of steps on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle as shuffle_buffer

from lightning_unlearn.data.samples import Sample, SampleBatch, collate_samples, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.datamodules.reading import read_fields, read_keys
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of


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
        self.epoch = 0
        # Address to a shard's samples, each decoded when it is first drawn.
        self._cached: dict[str, list[_Kept]] | None = {} if cache else None

    def __iter__(self) -> Iterator[SampleBatch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        slot, slots = self.rank * workers + number, self.world_size * workers
        samples = self._samples(slot, slots)
        steps = self.steps // workers + (number < self.steps % workers)
        try:
            for size in [self.batch_size] * steps if self.total is None else self._even_sizes(slot, slots):
                yield collate_samples("training", list(islice(samples, size)))
        except InputError as error:
            yield SampleBatch("training", error=str(error))

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
            # All readers must agree on the order of the shards, so their number is not in this seed.
            order = random.Random(seed_of("training-shards", self.seed, self.epoch, turn))
            shards = sorted(self.shards, key=lambda shard: shard.url)
            order.shuffle(shards)
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
                raise InputError(
                    "A reader found no sample to train on; name keys that the shards hold, or use fewer workers or "
                    "ranks."
                )
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
            return (_Kept(fields, keep=False) for fields in read_fields(shard))
        if shard.url not in self._cached:
            self._cached[shard.url] = [_Kept(fields, keep=True) for fields in read_fields(shard)]
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


class _EpochLoader:
    """A DataLoader that tells its stream the number of the epoch before workers start."""

    def __init__(self, loader: DataLoader[SampleBatch], stream: TrainingStream, datamodule: TrainingDataModule) -> None:
        self.loader = loader
        self.stream = stream
        self.datamodule = datamodule

    def __len__(self) -> int:
        return self.stream.steps

    def __iter__(self) -> Iterator[SampleBatch]:
        trainer = self.datamodule.trainer
        self.stream.epoch = trainer.current_epoch if trainer is not None else self.stream.epoch + 1
        if self.loader.num_workers:
            self.stream.fill_cache()
        for batch in self.loader:
            if batch.error is not None:
                raise InputError(batch.error)
            yield batch


class TrainingDataModule(LightningDataModule):
    """Shards as a stream of shuffled training batches (:class:`~lightning_unlearn.data.samples.SampleBatch`).

    Args:
        shards: Folders, paths, brace patterns or addresses (http(s), s3, gs, hf, …).
        batch_size: Samples a batch and rank.
        seed: Of the shuffling; an epoch's order is a function of it and the epoch's number.
        num_workers: Processes that read, a rank.
        keys: Train on these samples only: their keys, or a text file with one key a line.
        samples_per_epoch: Over all ranks; by default the number in the manifest, or the number of keys.
        shuffle: How many samples a reader holds to shuffle.
        allow_pipe: Whether ``pipe:`` addresses are let through.
        cache: Whether all samples are kept in memory, decoded, for data that is small and read many times.
        every_sample: Whether an epoch is every sample once, in batches of at most ``batch_size``, instead of as many
            full batches as there are.

    Raises:
        InputError: If the batch size is below 1.
    """

    def __init__(
        self,
        shards: str | list[str],
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        keys: str | list[str] | None = None,
        samples_per_epoch: int | None = None,
        shuffle: int = 5000,
        allow_pipe: bool = False,
        cache: bool = False,
        every_sample: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, but is {batch_size}.")
        self.shards = shards
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.keys = keys
        self.samples_per_epoch = samples_per_epoch
        self.shuffle = shuffle
        self.allow_pipe = allow_pipe
        self.cache = cache
        self.every_sample = every_sample

    def train_dataloader(self) -> _EpochLoader:
        """The training batches of this rank.

        Returns:
            A loader of a known length, the same on every rank.

        Raises:
            InputError: If the number of samples is unknown, or too few for one batch a rank.
        """
        shards = list_shards(self.shards, allow_pipe=self.allow_pipe)
        keys = None if self.keys is None else read_keys(self.keys)
        total = self.samples_per_epoch or (len(keys) if keys is not None else None)
        if total is None:
            counts = [shard.samples for shard in shards if shard.samples is not None]
            if len(counts) < len(shards):
                raise InputError(
                    "These shards have no manifest, so the length of an epoch is unknown; set samples_per_epoch."
                )
            total = sum(counts)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        if self.every_sample:
            workers = max(1, self.num_workers)
            steps = even_batches(total, world_size * workers, self.batch_size) * workers
        else:
            steps = total // (self.batch_size * world_size)
        if steps < 1:
            raise InputError(
                f"{total} samples are too few for one batch of {self.batch_size} on each of {world_size} ranks; "
                "use a smaller batch_size."
            )
        stream = TrainingStream(
            shards,
            rank,
            world_size,
            self.batch_size,
            steps,
            self.seed,
            keys,
            self.shuffle,
            self.cache,
            total if self.every_sample else None,
        )
        return _EpochLoader(DataLoader(stream, batch_size=None, num_workers=self.num_workers), stream, self)
