"""Shards as they are scored: each sample once, in batches that hold one form and do not straddle shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lightning_unlearn.data.batches import Forms, check_shapes, collate_samples, form_of
from lightning_unlearn.data.samples import Sample, SampleBatch, decode_sample
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.datamodules.reading import read_fields
from lightning_unlearn.errors import InputError


class ScoringStream(IterableDataset[SampleBatch]):
    """One rank's shards, each read by one worker from its first sample to its last.

    A shard's last batch carries the count of its samples. A shard that can't be read to its end gives a batch with the
    error instead, so that the other shards go on.

    Args:
        shards: The shards of this rank.
        batch_size: Samples a batch.
        query: The samples must have its channels, and the widths of its conditions.
        skip_bad: Whether a sample that can't be used is left out and counted, instead of failing its shard.
        keys: If given, only samples with these keys, and a shard's count is of these.
    """

    def __init__(
        self,
        shards: list[ShardInfo],
        batch_size: int,
        query: Sample,
        skip_bad: bool = False,
        keys: frozenset[str] | None = None,
    ) -> None:
        self.shards = shards
        self.query = query
        self.batch_size = batch_size
        self.skip_bad = skip_bad
        self.keys = keys

    def __iter__(self) -> Iterator[SampleBatch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[number::workers]:
            yield from self._batches(shard)

    def _batches(self, shard: ShardInfo) -> Iterator[SampleBatch]:
        name = shard_id(shard.url)
        waiting = Forms[tuple[int, Sample]](self.batch_size)
        count, skipped = 0, 0
        try:
            for fields in read_fields(shard):
                if self.keys is not None and fields["__key__"] not in self.keys:
                    continue
                try:
                    sample = decode_sample(fields)
                    check_shapes(sample, self.query, shard.shown)
                except InputError:
                    if not self.skip_bad:
                        raise
                    skipped += 1
                    continue
                if batch := waiting.add(form_of(sample), (count, sample)):
                    yield _collate(name, batch)
                count += 1
            rest = list(waiting.rest())
            for batch in rest[:-1]:
                yield _collate(name, batch)
            if rest:
                yield _collate(name, rest[-1], end_of_shard=count, skipped=skipped)
            else:
                yield SampleBatch(name, end_of_shard=0, skipped=skipped)
        except InputError as error:
            yield SampleBatch(name, error=str(error))


def _collate(shard: str, batch: list[tuple[int, Sample]], **markers: Any) -> SampleBatch:
    places, samples = [place for place, _ in batch], [sample for _, sample in batch]
    return collate_samples(shard, samples, places=places, **markers)


class NoBatches(IterableDataset[SampleBatch]):
    """No batch. Of no known length, since Lightning leaves out the hooks where it knows that there is nothing."""

    def __iter__(self) -> Iterator[SampleBatch]:
        return iter(())
