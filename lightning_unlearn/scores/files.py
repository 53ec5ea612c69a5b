"""The Parquet files that the score table is kept in.

A run's folder holds ``run.json`` (settings, fingerprints, targets, shards) and ``scores/``, one Parquet file a shard,
with the columns ``key``, ``shard``, ``base_loss`` and a score for each query under the query's key, prefixed with
``score:``. Where they are known, ``error:`` and the query's key is the half-width of the score's 95 % interval; where
they are kept, ``deviations:`` and the query's key is a list with the rule's value at each flip and draw. After a race
(:mod:`~lightning_unlearn.scores.racing`), ``finished`` says whether a row is of all views or of the first few.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.data.shards import write_atomically
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.scores.rules import Reduced
from lightning_unlearn.scores.table import ScoreTable

RUN_FILE = "run.json"
SCORES = "scores"
FAILED = "failed"
PREFIX = "score:"
ERRORS = "error:"
DEVIATIONS = "deviations:"
FINISHED = "finished"


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
    reduced: Reduced,
    queries: Sequence[str],
    run: str,
    version: str = "",
    finished: NDArray[np.bool_] | None = None,
) -> None:
    """Write one shard's scores, whole or not at all.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.
        keys: ``B`` sample keys.
        reduced: Scores, base losses, and what is kept beside them.
        queries: ``Q`` query keys.
        run: Digest of the run's fingerprints, kept in the file.
        version: Of the shard's content, kept in the file.
        finished: ``(B,)`` which samples a race finished, if there was one.

    Raises:
        InputError: If the disk is full or the folder can't be written.
    """
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        "shard": pa.array([shard] * len(keys), pa.string()),
        "base_loss": pa.array(reduced.base_losses.float().numpy()),
    }
    for prefix, values in ((PREFIX, reduced.scores), (ERRORS, reduced.errors)):
        if values is not None:
            columns |= {prefix + query: _floats(values[:, number]) for number, query in enumerate(queries)}
    if finished is not None:
        columns[FINISHED] = pa.array(finished)
    if reduced.deviations is not None:
        for number, query in enumerate(queries):
            values = reduced.deviations[:, number].flatten(1)  # (B, flips · draws)
            columns[DEVIATIONS + query] = pa.FixedSizeListArray.from_arrays(_floats(values.flatten()), values.shape[1])
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


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.float().contiguous().numpy())


def is_scored(folder: Path, shard: str, version: str) -> bool:
    """Whether a shard's scores are written, and are of the samples that it holds now.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.
        version: Of its content (:attr:`~lightning_unlearn.data.shards.ShardInfo.version`).

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
    # Deviations may be many times as large as all else.
    run, joined, order = _read(Path(folder), partial, lambda name: not name.startswith(DEVIATIONS))
    queries = [name.removeprefix(PREFIX) for name in joined.column_names if name.startswith(PREFIX)]

    def stacked(prefix: str) -> Any:
        return np.stack([joined.column(prefix + query).to_numpy() for query in queries], 1)[order]

    keys, shards = joined.column("key").to_pylist(), joined.column("shard").to_pylist()
    return ScoreTable(
        keys=[keys[row] for row in order],
        shards=[shards[row] for row in order],
        queries=queries,
        scores=stacked(PREFIX),
        base_losses=joined.column("base_loss").to_numpy()[order],
        run=run,
        errors=stacked(ERRORS) if ERRORS + queries[0] in joined.column_names else None,
        finished=joined.column(FINISHED).to_numpy()[order] if FINISHED in joined.column_names else None,
    )


def read_deviations(folder: str | Path, query: str, *, partial: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Read what the rule gave at each flip and draw of a query's scores, where the run kept it.

    Args:
        folder: The run's folder.
        query: The query's key.
        partial: Whether shards may be missing.

    Returns:
        ``(N, flips, draws)``, averaged over captions; samples as in :func:`read_scores`. The draws' timesteps are
        ``timesteps`` in ``run.json``.

    Raises:
        InputError: As :func:`read_scores`, or if there is no such query or its deviations were not kept.
    """
    name = DEVIATIONS + query
    run, joined, order = _read(Path(folder), partial, {"key", "shard", PREFIX + query, name}.__contains__)
    if PREFIX + query not in joined.column_names:
        raise InputError(f"{folder} has no scores of {query!r}; name one of its queries.")
    if name not in joined.column_names:
        raise InputError(f"{folder} keeps no deviations; score into another folder with keep_deviations.")
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in joined.column(name).chunks])
    draws = len(run["timesteps"])
    values: np.ndarray[Any, np.dtype[np.float32]] = flat.reshape(len(order), -1, draws)[order]
    return values


def _read(folder: Path, partial: bool, wanted: Callable[[str], bool]) -> tuple[dict[str, Any], pa.Table, list[int]]:
    """A run, some columns of its shards' files one after the other, and the order of the keys."""
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
            with pq.ParquetFile(shard_path(folder, shard)) as file:
                table = file.read([name for name in file.schema_arrow.names if wanted(name)])
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
    return run, joined, order
