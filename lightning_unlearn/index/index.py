"""An index that is made: its samples, and answers for new queries."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_unlearn.baselines.consensus import Consensus, combined
from lightning_unlearn.baselines.d_trak import DTRAK
from lightning_unlearn.baselines.das import DAS
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.errors import InputError
from lightning_unlearn.index.grouping import ScoredGroup, scored_groups
from lightning_unlearn.index.kernel import IndexKernel, Vectors
from lightning_unlearn.index.kernel_file import kept_kernels
from lightning_unlearn.index.record import FAILED, INDEX_FILE, index_digest, read_index
from lightning_unlearn.index.shard_file import FACTS, ShardFile
from lightning_unlearn.scores.agreement import Agreement, agreements
from lightning_unlearn.scores.files import why_failed

# The methods that an index asks, with the output function that each needs, and the ridges that Consensus gives them.
METHODS: dict[str, Output] = {DAS.name: DAS.output, DTRAK.name: DTRAK.output}
_RIDGES: dict[str, float] = {DAS.output: Consensus().das_ridge, DTRAK.output: Consensus().d_trak_ridge}


@dataclass(frozen=True)
class IndexAnswer:
    """What an index says of queries.

    Attributes:
        scores: ``(N, Q)`` float32, the mean of the standardised parts; high means influential.
        parts: Method to its scores ``(N, Q)``.
        captions: Gives what tells the samples' captions apart, ``N`` of it; read only if somebody asks how sure it is.
    """

    scores: Tensor
    parts: Mapping[str, Tensor]
    captions: Callable[[], Sequence[Hashable]] = field(repr=False)

    @cached_property
    def sure(self) -> list[Agreement]:
        """How sure the answer for each query is."""
        return agreements(self.parts, self.scores, self.captions())


class Index:
    """What is kept of all training samples, so that a new query costs its own gradients and a product.

    Make one with ``lightning-unlearn index``, open it with :meth:`open`; the gradients of queries come from
    :class:`~lightning_unlearn.command_line.index_answers.IndexAnswerer`.

    Args:
        folder: Where it lies.
        record: The content of its ``index.json``.
        files: Of its shards, in their order.

    Attributes:
        shards: Its shards, in the order of the rows.
    """

    def __init__(self, folder: Path, record: dict[str, Any], files: Sequence[ShardFile]) -> None:
        self.folder = folder
        self.record = record
        self.files = list(files)
        self.shards = [
            ShardInfo(shard["url"], shard["samples"], shard["bytes"], shard["sha256"])
            for shard in record["shards"].values()
        ]

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open an index, see that it is whole, and decompose its kernels if they are not there yet.

        Args:
            folder: Where it lies.

        Returns:
            The index.

        Raises:
            InputError: If it is none, some of its shards are missing, a file is damaged, or a key stands twice.
        """
        folder = Path(folder)
        record = read_index(folder)
        if record is None:
            raise InputError(f"There is no index in {folder}; make one with `lightning-unlearn index`.")
        digest, files, missing = index_digest(record["fingerprints"]), [], []
        for name, about in record["shards"].items():
            try:
                file = ShardFile(folder, name, record["sizes"], digest)
            except InputError:
                if (folder / "shards" / f"{name}.safetensors").is_file():
                    raise
                missing.append(name)
                continue
            if file.version != about["version"]:
                missing.append(name)
            files.append(file)
        if missing:
            raise InputError(
                f"{len(missing)} of {len(record['shards'])} shards are not in the index {folder} yet, e.g. "
                f"{record['shards'][missing[0]]['url']}{why_failed(folder / FAILED / f'{missing[0]}.json')}; run "
                "`lightning-unlearn index` again."
            )
        index = cls(folder, record, files)
        index._check_keys()
        _ = index.kernels  # so that what is damaged shows now, and a query is quick
        return index

    def _check_keys(self) -> None:
        seen: set[str] = set()
        for key in self.keys:
            if key in seen:
                raise InputError(
                    f"The key {key!r} stands twice in the shards of {self.folder / INDEX_FILE}; keys must be unique "
                    "over all shards."
                )
            seen.add(key)

    def __len__(self) -> int:
        return sum(file.count for file in self.files)

    def _facts(self, name: str) -> list[Any]:
        assert name in FACTS
        found: list[Any] = pa.concat_tables([file.facts([name]) for file in self.files]).column(name).to_pylist()
        return found

    @cached_property
    def keys(self) -> Sequence[str]:
        """``N`` keys, in the order of the shards."""
        return self._facts("key")

    @cached_property
    def captions(self) -> Sequence[Sequence[str]]:
        """The captions of each sample."""
        return self._facts("captions")

    @cached_property
    def said(self) -> Sequence[str]:
        """What tells the first caption of each sample apart: all that the network is given of it."""
        return self._facts("said")

    @cached_property
    def losses(self) -> Tensor:
        """``(N,)`` float64 mean loss of each sample."""
        return torch.cat([file.numbers("losses") for file in self.files])

    @cached_property
    def errors(self) -> Tensor:
        """``(N,)`` float64 mean root of each sample's loss."""
        return torch.cat([file.numbers("errors") for file in self.files])

    def shard_of(self, row: int) -> ShardInfo:
        """The shard of a sample, from which its picture can be fetched by its key.

        Args:
            row: The sample's, counted as ``keys`` are.

        Returns:
            The shard.

        Raises:
            IndexError: If there is no such row.
        """
        start = 0
        for file, shard in zip(self.files, self.shards, strict=True):
            if 0 <= row - start < file.count:
                return shard
            start += file.count
        raise IndexError(f"row {row} of {start}")

    def field(self, name: str) -> list[str | None]:
        """A field of the samples' json.

        Args:
            name: Its name, e.g. ``artist``.

        Returns:
            ``N`` values, ``None`` where a sample has none; what is no text as JSON.
        """
        values = [json.loads(text).get(name) for text in self._facts("json")]
        return [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]

    @cached_property
    def vectors(self) -> dict[str, Vectors]:
        """Output function to its vectors, on disk."""
        return {output: Vectors(self.files, output, size) for output, size in self.record["sizes"].items()}

    @cached_property
    def kernels(self) -> dict[str, IndexKernel]:
        """Output function to its decomposed regression; made once, and kept beside the shards."""
        return kept_kernels(self.folder, self.vectors, _RIDGES)

    def answer(self, queries_gradients: Mapping[Output, Gradients]) -> IndexAnswer:
        """Scores of all samples for new queries.

        Args:
            queries_gradients: Output function to the queries' projected gradients.

        Returns:
            The answer for ``Q`` queries.

        Raises:
            InputError: If the gradients are not projected as the index's are.
        """
        parts: dict[str, Tensor] = {}
        for method, output in METHODS.items():
            queries, vectors, kernel = queries_gradients[output].wide(), self.vectors[output], self.kernels[output]
            if queries.shape[1] != vectors.size or not queries.isfinite().all():
                raise InputError(
                    f"The queries' gradients ({queries.shape[1]} numbers each) are not as those of the index in "
                    f"{self.folder} ({vectors.size} finite ones); project them as it does."
                )
            found = kernel.influences(vectors, queries)
            parts[method] = found if method == DTRAK.name else (found * (self.errors / kernel.rest)[:, None]).square()
        return IndexAnswer(combined(parts, dict.fromkeys(parts, 1.0)).float(), parts, lambda: self.said)

    def groups(self, field: str, scores: Tensor) -> list[ScoredGroup]:
        """Mean scores of the samples that have the same value in a field, with intervals.

        Args:
            field: Of the samples' json.
            scores: ``(N, Q)``, e.g. those of an answer.

        Returns:
            A row for each value, highest mean of the first query first.
        """
        return scored_groups(self.field(field), scores)
