"""Queries to unlearn and shards to score, for an UnlearningModule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.addresses import is_address
from lightning_unlearn.data.batches import check_shapes
from lightning_unlearn.data.samples import Sample, SampleBatch, decode_sample
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.data.targets import targets_of
from lightning_unlearn.datamodules.reading import find_samples, list_keys, read_fields, read_keys, read_samples
from lightning_unlearn.datamodules.real import RealSamples
from lightning_unlearn.datamodules.scoring import NoBatches, ScoringStream
from lightning_unlearn.datamodules.sources import list_shards, with_facts
from lightning_unlearn.draws.unlearning_draws import DrawBatch, RealStream, draw_batches, real_batches
from lightning_unlearn.errors import InputError


class AttributionDataModule(LightningDataModule):
    """``fit`` gets the queries' draws, ``predict`` every sample of the training shards once.

    Shards are dealt to ranks here, in each rank's own process: the full list, largest first,
    ``shards[rank::world_size]``; only then does a rank drop those that are done. A rank without a shard has nothing to
    do and is no error.

    Args:
        shards: The training shards: folders, paths, brace patterns or addresses (http(s), s3, gs, hf, …).
        queries: The queries, in shards of the same form; without them only methods that need none can score.
        query_keys: Only these queries, in this order.
        targets_by: A field of the queries' json, e.g. ``artist``: those with the same value are unlearned together, and
            the value is the name of their scores. The order is then that of names and keys. By default each query is
            unlearned by itself.
        draws: (timestep, noise) pairs a query and step.
        draw_batch_size: Draws a forward pass.
        batch_size: Samples a batch when scoring.
        num_workers: Processes that read shards, a rank; each reads one shard at a time.
        on_bad_sample: Whether a sample that can't be used fails its shard (``error``) or is left out and counted
            (``skip``).
        allow_pipe: Whether ``pipe:`` addresses, which run commands, are let through.
        multiprocessing_context: How workers start; the system's default if not given.
        keys: Score these samples only: their keys, or a text file with one key a line.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        shards: str | list[str],
        queries: str | list[str] | None = None,
        query_keys: list[str] | None = None,
        targets_by: str | None = None,
        draws: int = 128,
        draw_batch_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        on_bad_sample: Literal["error", "skip"] = "error",
        allow_pipe: bool = False,
        multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None,
        keys: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        if min(draws, draw_batch_size, batch_size) < 1 or num_workers < 0:
            raise InputError("draws, draw_batch_size and batch_size must be at least 1, num_workers at least 0.")
        self.shard_patterns = shards
        self.query_patterns = queries
        self.query_keys = query_keys
        self.targets_by = targets_by
        self.draws = draws
        self.draw_batch_size = draw_batch_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_sample = on_bad_sample
        self.allow_pipe = allow_pipe
        self.multiprocessing_context = multiprocessing_context
        self.keys = None if keys is None else read_keys(keys)
        self.queries: list[Sample] = []
        # What samples must have the shapes of: a query, or the first sample where there is none.
        self._form: Sample | None = None
        self.shards: list[ShardInfo] = []
        self._done: frozenset[str] = frozenset()

    def setup(self, stage: str) -> None:
        """Read the queries, and each own shard's first sample, so that what is wrong with them shows before long work.

        Args:
            stage: Lightning's.

        Raises:
            InputError: If there is no query, a key stands twice, shapes differ, or a query does not say its target.
        """
        # The order in which shards are dealt is that of the list, whatever their servers add to it.
        self.shards = with_facts(list_shards(self.shard_patterns, allow_pipe=self.allow_pipe))
        if self.query_patterns is None and stage == "fit":
            raise InputError("There is nothing to unlearn; name the generated images as `queries`.")
        self.queries = [] if self.query_patterns is None else self._read_queries(self.query_patterns)
        self._form = self.queries[0] if self.queries else None
        if self.keys is not None:
            self._check_keys(self.keys)
        for shard in self._dealt():
            if shard_id(shard.url) in self._done:
                continue
            for fields in read_fields(shard):
                try:
                    sample = decode_sample(fields)
                    self._form = self._form or sample
                    check_shapes(sample, self._form, shard.shown)
                except InputError:
                    if self.on_bad_sample == "error":
                        raise
                    continue
                break

    def _check_keys(self, keys: frozenset[str]) -> None:
        """Refuse keys of which no shard holds any; to know it, names alone are read, and of local shards alone."""
        if any(is_address(shard.url) for shard in self.shards):
            return
        left = set(keys)
        for shard in self.shards:
            with suppress(InputError):  # a damaged shard is told of where it is read
                for key in list_keys(shard):
                    left.discard(key)
            if len(left) < len(keys):
                return
        raise InputError(
            f"No shard holds any of the {len(keys)} chosen keys, e.g. {min(keys)!r}; give keys that the shards hold."
        )

    def _read_queries(self, patterns: str | list[str]) -> list[Sample]:
        infos = list_shards(patterns, allow_pipe=self.allow_pipe)
        found: dict[str, Sample] = {}
        # By address, not by size: the order of the queries is for people.
        for shard in sorted(infos, key=lambda info: info.url):
            for sample in read_samples(shard, pictures=True, masks=True):
                if sample.key in found:
                    raise InputError(f"The query {sample.key!r} stands twice in {patterns}; keys must be unique.")
                found[sample.key] = sample
        if self.query_keys is not None:
            missing = [key for key in self.query_keys if key not in found]
            if missing:
                raise InputError(
                    f"There is no query {missing[0]!r} in {patterns}; it holds {', '.join(list(found)[:5])} …"
                )
            found = {key: found[key] for key in self.query_keys}
        if not found:
            raise InputError(f"There is no query in {patterns}; make some with `lightning-unlearn prepare`.")
        queries = list(found.values())
        for query in queries:
            check_shapes(query, queries[0], "the queries")
        return [query for target in targets_of(queries, self.targets_by) for query in target.members]

    def _like(self) -> Sample:
        """What samples must have the shapes of."""
        if self._form is None:
            raise InputError("There are no samples and no queries to know their shapes by; name shards that hold some.")
        return self._form

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _wish(self, name: str, default: Any) -> Any:
        """What the strategy says of the draws that it takes."""
        strategy = getattr(getattr(self.trainer, "lightning_module", None), "strategy", None)
        return getattr(strategy, name, default)

    def _step(self) -> int:
        """Whose draws are taken: those of the first step in all, if the strategy minimises one function."""
        fresh = self._wish("fresh_draws", True)
        return self.trainer.current_epoch if self.trainer is not None and fresh else 0

    def _dealt(self) -> list[ShardInfo]:
        rank, world_size = self._rank()
        return self.shards[rank::world_size]

    def skip_shards(self, done: frozenset[str]) -> None:
        """Leave out shards that are scored already.

        Args:
            done: Their identifiers (:func:`~lightning_unlearn.data.shards.shard_id`).
        """
        self._done = done

    def shards_to_score(self) -> list[ShardInfo]:
        """The shards that this rank still has to score.

        Returns:
            Largest first.
        """
        return [shard for shard in self._dealt() if shard_id(shard.url) not in self._done]

    def find_samples(self, keys: Iterable[str]) -> dict[str, Sample]:
        """Some training samples with their pictures, for people to look at.

        Args:
            keys: Which.

        Returns:
            Key to sample; of those that were found.
        """
        return find_samples(self.shards or list_shards(self.shard_patterns, allow_pipe=self.allow_pipe), keys)

    def real_samples(self, stream: RealStream, seed: int) -> RealSamples:
        """The training samples in a shuffled order that is the same on every rank.

        Args:
            stream: ``"real"`` or ``"others"``, of the samples' draws.
            seed: Of the order.

        Returns:
            The samples, without end.
        """
        return RealSamples(self.shards, stream, seed, self._like(), self.on_bad_sample == "skip")

    def train_dataloader(self) -> DrawLoader:
        """This rank's draws of all queries, and of real samples if the strategy wants them; an epoch is one step of it.

        Returns:
            A loader of :class:`~lightning_unlearn.draws.unlearning_draws.DrawBatch`, of the same length on every rank.
        """
        return DrawLoader(self)

    def predict_dataloader(self) -> DataLoader[SampleBatch]:
        """This rank's samples.

        Returns:
            A loader of :class:`~lightning_unlearn.data.samples.SampleBatch`.
        """
        shards = self.shards_to_score()
        if not shards:  # nor need there be a sample to know shapes by
            return DataLoader(NoBatches(), batch_size=None)
        workers = min(self.num_workers, len(shards))
        return DataLoader(
            ScoringStream(shards, self.batch_size, self._like(), self.on_bad_sample == "skip", self.keys),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=self.multiprocessing_context if workers else None,
        )


class DrawLoader:
    """The draws of one step, a target after the other: of each query in it, then of real samples, the same for all.

    Each epoch has its own numbers, unless the strategy wants the same in all.

    Args:
        datamodule: Whose queries they are.
    """

    def __init__(self, datamodule: AttributionDataModule) -> None:
        self.datamodule = datamodule
        self._samples: RealSamples | None = None

    def __len__(self) -> int:
        data = self.datamodule
        targets = targets_of(data.queries, data.targets_by)
        return len(data.queries) * self._batches(data.draws) + len(targets) * self._batches(data._wish("real_draws", 0))

    def _batches(self, draws: int) -> int:
        _, world_size = self.datamodule._rank()
        share = -(-draws // world_size)
        return -(-share // self.datamodule.draw_batch_size)

    def __iter__(self) -> Iterator[DrawBatch]:
        data = self.datamodule
        rank, world_size = data._rank()
        step = data._step()
        real = self._real(step)
        for number, target in enumerate(targets_of(data.queries, data.targets_by)):
            for query in target.members:
                yield from draw_batches(
                    query, number, step * data.draws, data.draws, rank, world_size, data.draw_batch_size
                )
            for batch in real:
                others = tuple(replace(other, target=number) for other in batch.others)
                yield replace(batch, target=number, others=others)

    def _real(self, step: int) -> list[DrawBatch]:
        data = self.datamodule
        draws: int = data._wish("real_draws", 0)
        if not draws:
            return []
        assert data.trainer is not None  # it is the module's strategy that wants them
        seed: int = data.trainer.lightning_module.seed  # type: ignore[assignment]
        if self._samples is None:
            self._samples = data.real_samples("real", seed)
        samples = self._samples.take(step * draws, draws)
        return real_batches("real", seed, samples, step * draws, *data._rank(), data.draw_batch_size)
