"""The score table: rules that reduce deviations, and the Parquet files they are kept in.

A run's folder holds ``run.json`` (settings, fingerprints, targets, shards) and ``scores/``, one Parquet file a shard,
with the columns ``key``, ``shard``, ``base_loss`` and a score for each query under the query's key, prefixed with
``score:``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.shards import write_atomically

RUN_FILE = "run.json"
SCORES = "scores"
FAILED = "failed"
PREFIX = "score:"

Rule = Callable[[Tensor, Tensor], Tensor]


def difference(base: Tensor, unlearned: Tensor) -> Tensor:
    """Mean rise of the loss over captions and draws, the larger of the two flips.

    Wang et al. (arXiv 2406.09408, Eq. 6 and Appendix B).

    Args:
        base: ``(B, flips, captions, draws)`` losses under θ₀, NaN where a sample has no such view.
        unlearned: ``(Q, B, flips, captions, draws)`` losses under θ₀ + δ.

    Returns:
        ``(B, Q)``.
    """
    return (unlearned - base).nanmean((-2, -1)).amax(-1).mT


def ratio(base: Tensor, unlearned: Tensor) -> Tensor:
    """Mean over views of ``(L_u - L_0) / (L_u + L_0)``, the larger of the two flips.

    As in mirrored unlearning for attribution (MUCS, arXiv 2605.17938).

    Args:
        base: ``(B, flips, captions, draws)``.
        unlearned: ``(Q, B, flips, captions, draws)``.

    Returns:
        ``(B, Q)``.
    """
    return ((unlearned - base) / (unlearned + base)).nanmean((-2, -1)).amax(-1).mT


RULES: dict[str, Rule] = {"difference": difference, "ratio": ratio}


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all samples for all queries.

    Attributes:
        keys: ``N`` sample keys.
        shards: ``N`` identifiers of their shards.
        queries: ``Q`` query keys.
        scores: ``(N, Q)`` float32; high means influential.
        base_losses: ``(N,)`` float32 mean loss under θ₀.
        run: The content of ``run.json``.
    """

    keys: list[str]
    shards: list[str]
    queries: list[str]
    scores: np.ndarray[Any, np.dtype[np.float32]]
    base_losses: np.ndarray[Any, np.dtype[np.float32]]
    run: dict[str, Any]

    def top(self, query: str, k: int) -> list[tuple[str, float]]:
        """The most influential samples of a query; ties in the order of their keys.

        Args:
            query: Its key.
            k: How many.

        Returns:
            Keys and scores, highest first.
        """
        column = self.scores[:, self.queries.index(query)]
        order = np.lexsort((np.asarray(self.keys), -column))[:k]
        return [(self.keys[row], float(column[row])) for row in order]

    def rank(self, query: str, key: str) -> int:
        """How many samples score higher for a query than a given one.

        Args:
            query: The query's key.
            key: The sample's key.

        Returns:
            0 for the most influential.
        """
        column = self.scores[:, self.queries.index(query)]
        return int((column > column[self.keys.index(key)]).sum())


def shard_path(folder: Path, shard: str) -> Path:
    """Where a shard's scores are kept.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.

    Returns:
        The path of its Parquet file.
    """
    return folder / SCORES / f"{shard}.parquet"


def write_shard_scores(
    folder: Path,
    shard: str,
    keys: Sequence[str],
    base_losses: Tensor,
    scores: Tensor,
    queries: Sequence[str],
    run: str,
    version: str = "",
) -> None:
    """Write one shard's scores, whole or not at all.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.
        keys: ``B`` sample keys.
        base_losses: ``(B,)``.
        scores: ``(B, Q)``.
        queries: ``Q`` query keys.
        run: Digest of the run's fingerprints, kept in the file.
        version: Of the shard's content, kept in the file.

    Raises:
        InputError: If the disk is full or the folder can't be written.
    """
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        "shard": pa.array([shard] * len(keys), pa.string()),
        "base_loss": pa.array(base_losses.float().numpy()),
    }
    for number, query in enumerate(queries):
        columns[PREFIX + query] = pa.array(scores[:, number].float().contiguous().numpy())
    table = pa.table(columns).replace_schema_metadata({"run": run, "content": version})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    path = shard_path(folder, shard)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getvalue())
    except OSError as error:
        raise InputError(
            f"The scores of shard {shard} can't be written to {path} ({error.strerror}); free the disk and run "
            "again: finished shards are kept."
        ) from None


def is_scored(folder: Path, shard: str, version: str) -> bool:
    """Whether a shard's scores are written, and are of the samples that it holds now.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.
        version: Of its content (:attr:`~lightning_unlearn.shards.ShardInfo.version`).

    Returns:
        Whether they are; a file that can't be read counts as none.
    """
    try:
        return _content(folder, shard) == version
    except InputError:
        return False


def _content(folder: Path, shard: str) -> str | None:
    """The version of the shard's content that a file of scores is of, ``None`` if there is no file."""
    path = shard_path(folder, shard)
    if not path.is_file():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} can't be read ({str(error).splitlines()[0]}); run the same command again.") from None
    return bytes(metadata.get(b"content", b"")).decode()


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """A run's ``run.json``.

    Args:
        folder: The run's folder.

    Returns:
        Its content, ``None`` if there is none.

    Raises:
        InputError: If it can't be read.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return None
    try:
        run: dict[str, Any] = json.loads(path.read_bytes())
        run["fingerprints"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not the record of a run ({type(error).__name__}); score into another folder."
        ) from None
    return run


def run_digest(fingerprints: Mapping[str, str]) -> str:
    """One digest of all that a run's scores depend on.

    Args:
        fingerprints: By name.

    Returns:
        32 hexadecimal characters.
    """
    return settings_digest(fingerprints)


def read_scores(folder: str | Path, *, partial: bool = False) -> ScoreTable:
    """Read a run's score table, its samples ordered by key.

    Args:
        folder: The run's folder.
        partial: Whether shards may be missing.

    Returns:
        The table.

    Raises:
        InputError: If shards are missing, keys stand twice, or files of different runs are mixed.
    """
    folder = Path(folder)
    run = read_run(folder)
    if run is None:
        raise InputError(f"There are no scores in {folder}; run `lightning-unlearn attribute` or `predict` first.")
    missing = [shard for shard, info in run["shards"].items() if _content(folder, shard) != info.get("version", "")]
    if missing and not partial:
        # One that failed says why.
        example = next((shard for shard in missing if (folder / FAILED / f"{shard}.json").is_file()), missing[0])
        note = folder / FAILED / f"{example}.json"
        why = f" ({json.loads(note.read_bytes())['error']})" if note.is_file() else ""
        raise InputError(
            f"{len(missing)} of {len(run['shards'])} shards are not scored yet, e.g. "
            f"{run['shards'][example]['url']}{why}; run the same command again."
        )
    digest = run_digest(run["fingerprints"]).encode()
    tables = []
    for shard in sorted(set(run["shards"]) - set(missing)):
        try:
            table = pq.read_table(shard_path(folder, shard))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{shard_path(folder, shard)} can't be read ({str(error).splitlines()[0]}); remove it and run the "
                "same command again."
            ) from None
        if (table.schema.metadata or {}).get(b"run") != digest:
            raise InputError(
                f"The scores of {shard} in {folder} are of another run; remove them, or score into another folder."
            )
        tables.append(table)
    if not tables:
        raise InputError(f"No shard in {folder} is scored yet; run the same command again.")
    joined = pa.concat_tables(tables)
    keys = joined.column("key").to_pylist()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shards = joined.column("shard").to_pylist()
    for first, second in pairwise(order):
        if keys[first] == keys[second]:
            raise InputError(
                f"The key {keys[first]!r} stands in {shards[first]} and in {shards[second]}; keys must be unique "
                "over all shards."
            )
    queries = [name.removeprefix(PREFIX) for name in joined.column_names if name.startswith(PREFIX)]
    scores = np.stack([joined.column(PREFIX + query).to_numpy() for query in queries], 1)
    return ScoreTable(
        keys=[keys[row] for row in order],
        shards=[shards[row] for row in order],
        queries=queries,
        scores=scores[order],
        base_losses=joined.column("base_loss").to_numpy()[order],
        run=run,
    )


def reduce_losses(base: Tensor, unlearned: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Mean base losses and scores of a batch.

    Args:
        base: ``(B, flips, captions, draws)``.
        unlearned: ``(Q, B, flips, captions, draws)``.
        rule: Name of the score rule.

    Returns:
        ``(B,)`` and ``(B, Q)``.
    """
    if len(base) == 0:
        return torch.zeros(0), torch.zeros(0, len(unlearned))
    return base.nanmean((-3, -2, -1)), RULES[rule](base, unlearned)
