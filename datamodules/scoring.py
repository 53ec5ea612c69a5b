"""Shards as they are scored: each sample once, in batches that do not straddle shards."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from lightning_unlearn.data.conditions import shapes_of
from lightning_unlearn.data.samples import Sample, SampleBatch, collate_samples, decode_sample, shown_shapes
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
        query: The samples must have its shapes.
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
        pending: list[Sample] = []
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
                count += 1
                if len(pending) == self.batch_size:
                    yield collate_samples(name, pending)
                    pending = []
                pending.append(sample)
            if pending:
                yield collate_samples(name, pending, end_of_shard=count, skipped=skipped)
            else:
                yield SampleBatch(name, end_of_shard=0, skipped=skipped)
        except InputError as error:
            yield SampleBatch(name, error=str(error))


def check_shapes(sample: Sample, query: Sample, url: str) -> None:
    """Refuse a sample that is not of the queries' shapes.

    Args:
        sample: Of a training shard.
        query: Any query.
        url: The sample's shard.

    Raises:
        InputError: If latents or conditions differ in shape.
    """
    if sample.latent.shape != query.latent.shape or shapes_of(sample.conditions) != shapes_of(query.conditions):
        raise InputError(
            f"Sample {sample.key!r} in {url} has {shown_shapes(sample)}, but the query {query.key!r} has "
            f"{shown_shapes(query)}; prepare both in the same way."
        )
