"""Rows of tables as people keep them: ``.csv``, ``.jsonl``, ``.parquet``, a ``.json`` list, or lines of text."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_unlearn.errors import InputError


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, read as they are needed (a ``.json`` is read whole).

    Args:
        path: The file; its suffix says what it is.

    Yields:
        Column to value; a text or list of texts without a column stands in ``captions``.

    Raises:
        InputError: If it can't be read.
    """
    readers = {
        ".csv": _csv_rows,
        ".jsonl": _jsonl_rows,
        ".parquet": _parquet_rows,
        ".json": _json_rows,
        ".txt": _txt_rows,
    }
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{path} is no folder and none of {', '.join(readers)}; name a folder of pictures, or such a table."
        )
    rows = enumerate(readers[path.suffix.lower()](path), start=1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError:
            raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
        except (ValueError, OSError, csv.Error) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{path} can't be read as {path.suffix} ({reason}); write it again.") from None
        if isinstance(row, str | list):
            row = {"captions": row}
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, row {number} is a {type(row).__name__}; each must be a text, a list of texts, or an object."
            )
        yield row


def _csv_rows(path: Path) -> Iterator[Any]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has not as many cells as the header")
            yield row


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None


def _json_rows(path: Path) -> Iterator[Any]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("it holds no list")
    yield from rows


def _txt_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            yield line.rstrip("\n")


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for row in itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024)):
                yield {name: as_json(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def as_json(value: Any) -> Any:
    """A value as a sample's json can hold it; a picture that lies in a table stays what it is.

    Args:
        value: Of a cell.

    Returns:
        The value; dates, decimals and other things that JSON does not know become text.
    """
    return value if is_picture(value) else json.loads(json.dumps(value, default=str))


def is_picture(value: Any) -> bool:
    """Whether a cell holds a picture: its bytes, or bytes and path as Hugging Face data sets have it."""
    return isinstance(value, bytes) or (
        isinstance(value, dict) and "bytes" in value and isinstance(value["bytes"], bytes | None)
    )
