"""One shard's scores: a Parquet file that is written whole, and shows whether anything in it was altered.

Its metadata say which run (``run``) and which content of the shard (``content``) it is of, and hold a digest of each
column (``digests``), so that a column can be checked without those that are not wanted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.data.files import reason_of, write_atomically
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest
from lightning_unlearn.scores.rules import Reduced

SCORES = "scores"
PREFIX = "score:"
ERRORS = "error:"
DEVIATIONS = "deviations:"
PARTS = "part:"
FINISHED = "finished"
_NUMBERS = (PREFIX, ERRORS, PARTS, "base_loss")
# What reading a damaged file may raise: Arrow's own errors, and names or numbers that are none.
_DAMAGED = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError, MemoryError)


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
        folder: The run's folder, which is there.
        shard: The shard's identifier.
        keys: ``B`` sample keys.
        reduced: Scores, base losses, and what is kept beside them.
        queries: ``Q`` query keys.
        run: Digest of the run's fingerprints, kept in the file.
        version: Of the shard's content, kept in the file.
        finished: ``(B,)`` which samples a race finished, if there was one.

    Raises:
        InputError: If the disk is full, or the folder can't be written to or is gone.
    """
    columns: dict[str, Any] = {
        "key": pa.array(keys, pa.string()),
        "shard": pa.array([shard] * len(keys), pa.string()),
        "base_loss": pa.array(reduced.base_losses.float().numpy()),
    }
    parts = [(part_prefix(name), values) for name, values in reduced.parts.items()]
    for prefix, values in [(PREFIX, reduced.scores), (ERRORS, reduced.errors), *parts]:
        if values is not None:
            columns |= {prefix + query: _floats(values[:, number]) for number, query in enumerate(queries)}
    if finished is not None:
        columns[FINISHED] = pa.array(finished)
    if reduced.deviations is not None:
        for number, query in enumerate(queries):
            values = reduced.deviations[:, number].flatten(1)  # (B, flips · draws)
            columns[DEVIATIONS + query] = pa.FixedSizeListArray.from_arrays(_floats(values.flatten()), values.shape[1])
    table = pa.table(columns)
    digests = json.dumps({name: _column_digest(table, name) for name in table.column_names})
    stream = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"run": run, "content": version, "digests": digests}), stream)
    path = shard_path(folder, shard)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, stream.getvalue())
    except FileNotFoundError:
        raise InputError(
            f"The scores of shard {shard} can't be written to {path}: the folder {folder} was removed while the run "
            "went on; run the same command again."
        ) from None
    except OSError as error:
        raise InputError(
            f"The scores of shard {shard} can't be written to {path} ({error.strerror}); free the disk and run "
            "again: finished shards are kept."
        ) from None


def part_prefix(name: str) -> str:
    """What stands before a query's key in the column of a method that was asked together with others.

    Args:
        name: The method's.

    Returns:
        E.g. ``part:das:``.
    """
    return f"{PARTS}{name}:"


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.float().contiguous().numpy())


def shard_content(folder: Path, shard: str) -> str | None:
    """The version of the shard's content that a file of scores is of.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.

    Returns:
        It; ``None`` if there is no file.

    Raises:
        InputError: If the file can't be read.
    """
    path = shard_path(folder, shard)
    if not path.is_file():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
        return bytes(metadata.get(b"content", b"")).decode()
    except _DAMAGED as error:
        raise InputError(_unreadable(path, error)) from None


def read_shard_scores(folder: Path, shard: str, run: str, wanted: Callable[[str], bool], *, sealed: bool) -> pa.Table:
    """Some columns of a shard's scores, of which it is certain that they are as they were written.

    Args:
        folder: The run's folder.
        shard: The shard's identifier.
        run: Digest of the run's fingerprints.
        wanted: Which columns, by name; ``key``, ``shard`` and some scores among them.
        sealed: Whether the file must hold digests; those of older versions had none.

    Returns:
        The columns.

    Raises:
        InputError: If the file can't be read, is of another run, or was altered.
    """
    path = shard_path(folder, shard)
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            table = file.read([name for name in names if wanted(name)])
        metadata = table.schema.metadata or {}
        digests = json.loads(metadata[b"digests"]) if b"digests" in metadata else None
        whole = not sealed if digests is None else _agrees(table, names, digests)
        plain = any(name.startswith(PREFIX) for name in names) and _has_form(table, shard)
    except (*_DAMAGED, RecursionError) as error:
        raise InputError(_unreadable(path, error)) from None
    if metadata.get(b"run") != run.encode():
        raise InputError(
            f"The scores of {shard} in {folder} are of another run; remove them, or score into another folder."
        )
    if not (whole and plain):
        strange = [name for name in names if isinstance(digests, dict) and name not in digests]
        what = f" (its column {strange[0]!r} is none of ours)" if strange else ""
        raise InputError(f"{path} was altered after it was written{what}; remove it and run the same command again.")
    return table


def _agrees(table: pa.Table, names: Sequence[str], digests: Any) -> bool:
    """Whether a file has the columns that were written, and those that were read hold what was written."""
    if not isinstance(digests, dict) or list(digests) != list(names):
        return False
    return all(digests[name] == _column_digest(table, name) for name in table.column_names)


def _has_form(table: pa.Table, shard: str) -> bool:
    """Whether columns have the types of a score table, and its rows are of the shard."""
    types = {field.name: field.type for field in table.schema}
    texts = all(types.get(name) == pa.string() for name in ("key", "shard"))
    numbers = all(kind == pa.float32() for name, kind in types.items() if name.startswith(_NUMBERS))
    if not texts or not numbers or types.get(FINISHED, pa.bool_()) != pa.bool_():
        return False
    empty = any(column.null_count for column in table.columns)
    return not empty and set(table.column("shard").to_pylist()) <= {shard}


def _column_digest(table: pa.Table, name: str) -> str:
    """Of a column's name, type and values, however they are cut into chunks."""
    column = table.column(name)
    if pa.types.is_string(column.type):
        return digest(name, str(column.type), *map(str, column.to_pylist()))
    lists = pa.types.is_fixed_size_list(column.type)
    kind = f"{column.type.value_type}[{column.type.list_size}]" if lists else str(column.type)
    flat = column.combine_chunks()
    values = (flat.flatten() if lists else flat).to_numpy(zero_copy_only=False)
    return digest(name, kind, len(column), hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest())


def _unreadable(path: Path, error: BaseException) -> str:
    return f"{path} can't be read ({reason_of(error)}); remove it and run the same command again."
