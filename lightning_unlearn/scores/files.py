"""The Parquet files that the score table is kept in.

A run's folder holds ``run.json`` (settings, fingerprints, targets, shards) and ``scores/``, one Parquet file a shard,
with the columns ``key``, ``shard``, ``base_loss`` and a score for each query under the query's key, prefixed with
``score:``. Where they are known, ``error:`` and the query's key is the half-width of the score's 95 % interval; where
they are kept, ``deviations:`` and the query's key is a list with the rule's value at each flip and draw. Where several
methods were asked together, ``part:``, a method's name, ``:`` and the query's key is what that method says. After a
race (:mod:`~lightning_unlearn.scores.racing`), ``finished`` says whether a row is of all views or of the first few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_unlearn.data.files import read_json, reason_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.scores.shard_file import (
    DEVIATIONS,
    ERRORS,
    FINISHED,
    PREFIX,
    SCORES,
    part_prefix,
    read_shard_scores,
    shard_content,
    shard_path,
    write_shard_scores,
)
from lightning_unlearn.scores.table import ScoreTable

__all__ = [
    "FAILED",
    "RUN_FILE",
    "SCORES",
    "is_scored",
    "read_deviations",
    "read_run",
    "read_scores",
    "run_digest",
    "shard_path",
    "write_shard_scores",
]

RUN_FILE = "run.json"
FAILED = "failed"


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
        return shard_content(folder, shard) == version
    except InputError:
        return False


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
    run = read_json(path, "is not the record of a run", "score into another folder")
    if not _is_record(run):
        raise InputError(f"{path} is not the record of a run (what it says is not whole); score into another folder.")
    return run


def _is_record(run: Mapping[str, Any]) -> bool:
    """Whether fingerprints and shards, by which files are found and known, are as they are written."""
    fingerprints, shards = run.get("fingerprints"), run.get("shards")
    return (
        isinstance(fingerprints, dict)
        and all(isinstance(value, str) for value in fingerprints.values())
        and isinstance(shards, dict)
        and all(isinstance(info, dict) and isinstance(info.get("url"), str) for info in shards.values())
    )


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

    parts = {}
    for name in run.get("parts", []):
        if part_prefix(name) + queries[0] not in joined.column_names:
            raise InputError(f"The scores in {folder} lack what {name!r} said; score into another folder.")
        parts[name] = stacked(part_prefix(name))
    keys, shards = joined.column("key").to_pylist(), joined.column("shard").to_pylist()
    return ScoreTable(
        keys=[keys[row] for row in order],
        shards=[shards[row] for row in order],
        queries=queries,
        scores=stacked(PREFIX),
        base_losses=joined.column("base_loss").to_numpy()[order],
        run=run,
        errors=stacked(ERRORS) if ERRORS + queries[0] in joined.column_names else None,
        parts=parts,
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
    missing = [
        shard for shard, info in run["shards"].items() if shard_content(folder, shard) != info.get("version", "")
    ]
    if missing and not partial:
        # One that failed says why.
        example = next((shard for shard in missing if (folder / FAILED / f"{shard}.json").is_file()), missing[0])
        raise InputError(
            f"{len(missing)} of {len(run['shards'])} shards are not scored yet, e.g. "
            f"{run['shards'][example]['url']}{why_failed(folder / FAILED / f'{example}.json')}; run the same "
            "command again."
        )
    digest, sealed = run_digest(run["fingerprints"]), "format" in run
    tables = [
        read_shard_scores(folder, shard, digest, wanted, sealed=sealed)
        for shard in sorted(set(run["shards"]) - set(missing))
    ]
    if not tables:
        raise InputError(f"No shard in {folder} is scored yet; run the same command again.")
    try:
        joined = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise InputError(
            f"The files in {folder / SCORES} have different columns ({reason_of(error)}), so they are not of one run; "
            "score into another folder."
        ) from None
    targets = run.get("targets")
    queries = {name.removeprefix(PREFIX) for name in joined.column_names if name.startswith(PREFIX)}
    if isinstance(targets, dict) and targets and not queries <= targets.keys():
        raise InputError(
            f"The scores in {folder / SCORES} are of other queries than {RUN_FILE} says; score into another folder."
        )
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


def why_failed(note: Path) -> str:
    """What a failed shard's note says.

    Args:
        note: Its file.

    Returns:
        The reason in brackets; nothing where there is no note.
    """
    if not note.is_file():
        return ""
    try:
        return f" ({read_json(note, 'is no note', 'run the same command again')['error']})"
    except (InputError, KeyError):
        return " (its note can't be read)"
