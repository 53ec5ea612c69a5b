"""Shards as training data: shuffled by seed and epoch, the same number of steps on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.datamodules.dealing import Deal
from lightning_unlearn.datamodules.group_counts import groups_of
from lightning_unlearn.datamodules.reading import find_samples, read_keys
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.datamodules.training_stream import TrainingStream, even_batches
from lightning_unlearn.errors import InputError


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
            full batches as there are. Of samples of several forms or weights (:mod:`lightning_unlearn.data.weights`) an
            epoch is always each of them as often as its weight says, beside the smallest one.

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

    def find_samples(self, keys: Iterable[str]) -> dict[str, Sample]:
        """Some samples with their pictures, for people to look at.

        Args:
            keys: Which.

        Returns:
            Key to sample; of those that were found.
        """
        return find_samples(list_shards(self.shards, allow_pipe=self.allow_pipe), keys)

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
        workers = max(1, self.num_workers)
        groups = groups_of(shards, keys)
        deal = Deal(groups, self.batch_size, world_size * workers) if groups else None
        if deal is not None and self.samples_per_epoch is None:
            steps = deal.batches * workers
        elif self.every_sample:
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
            deal,
        )
        return _EpochLoader(DataLoader(stream, batch_size=None, num_workers=self.num_workers), stream, self)
