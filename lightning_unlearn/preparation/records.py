"""Captions and pictures as people keep them: a folder of pictures, or a table with a row for each sample."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_unlearn.errors import InputError

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_COLUMNS = ("captions", "caption", "text")
PATH_COLUMN = "file_name"


@dataclass(frozen=True)
class Record:
    """One sample before it is encoded.

    Attributes:
        key: Unique name, as a shard takes it: without dots and slashes.
        captions: Its captions; empty if it has none.
        metadata: Whatever else is known of it, JSON-like.
        place: Where it stands, for messages.
        picture: The file of its picture, if there is to be one.
    """

    key: str
    captions: list[str]
    metadata: dict[str, Any]
    place: str
    picture: Path | None = None

    @property
    def fault(self) -> str | None:
        """One sentence on what keeps it from being a sample, as far as can be told without opening its picture."""
        if not self.captions:
            return f"{self.place} has no caption; add one, or leave it out with on_bad_sample=skip."
        if self.picture is not None and not self.picture.is_file():
            return (
                f"{self.place}: there is no picture at {self.picture}; "
                "put it there, or leave it out with on_bad_sample=skip."
            )
        return None


def read_records(source: str, *, pictures: bool, key: str | None = None) -> Iterator[Record]:
    """The samples of a folder or table, in its order, one at a time.

    A folder with a ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` is read through that table; otherwise
    the captions of ``a.png`` stand in ``a.txt``, one a line, and pictures come in the order of their paths.

    Args:
        source: A folder of pictures, or a file: ``.csv``, ``.jsonl``, ``.parquet``, ``.json`` (a list) or ``.txt`` (one
            caption a line).
        pictures: Whether each sample has a picture: a table then needs a column ``file_name``, relative to its folder.
        key: Column with the samples' keys; by default the picture's path without its suffix, or else the row's number.

    Yields:
        The samples.

    Raises:
        InputError: If the source is missing or can't be read, or lacks a column.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"There is nothing at {path}; name a folder of pictures, or a table.")
    if path.is_dir():
        tables = [path / name for name in METADATA_NAMES if (path / name).is_file()]
        if len(tables) > 1:
            raise InputError(f"{path} holds {' and '.join(table.name for table in tables)}; leave only one of them.")
        if not tables:
            if key is not None:
                raise InputError(
                    f"key={key!r} names a column, but {path} has no metadata table; "
                    f"add {METADATA_NAMES[0]}, or leave key out."
                )
            yield from _folder_records(path)
            return
        path = tables[0]
    for number, row in enumerate(_rows(path)):
        place = f"{path.name}, row {number + 1}"
        if number == 0:
            _check_columns(path, row, key, pictures)
        yield _record(row, number, place, path.parent if pictures else None, key)


def _folder_records(folder: Path) -> Iterator[Record]:
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    for name in sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)):
        texts = (folder / name).with_suffix(".txt")
        captions = _read_lines(texts) if texts.is_file() else []
        shown = name.encode(errors="replace").decode()  # names need not be UTF-8, a sample's json must be
        yield Record(_key_of_path(name), captions, {PATH_COLUMN: shown}, str(folder / name), folder / name)


def _record(row: dict[str, Any], number: int, place: str, folder: Path | None, key: str | None) -> Record:
    column = next((name for name in CAPTION_COLUMNS if row.get(name) is not None), None)
    metadata = {name: value for name, value in row.items() if name not in {column, "captions"}}
    name = str(row.get(PATH_COLUMN) or "")
    if folder is not None and not name:
        raise InputError(f"{place} has no {PATH_COLUMN}; fill it in or remove the row.")
    if key is not None:
        value = row.get(key)
        chosen = "" if value is None else str(value)
        if not chosen.strip():
            raise InputError(f"{place} has no key in its column {key!r}; fill it in or remove the row.")
    else:
        chosen = _key_of_path(name) if name else f"{number:08d}"
    picture = folder / name if folder is not None else None
    return Record(
        _plain(chosen), _captions(row.get(column) if column else None), metadata, f"{place} ({name or chosen})", picture
    )


def _check_columns(path: Path, row: dict[str, Any], key: str | None, pictures: bool) -> None:
    columns = ", ".join(map(str, row)) or "none"
    if pictures and PATH_COLUMN not in row:
        raise InputError(f"{path} has no column {PATH_COLUMN!r} with the pictures' paths; its columns: {columns}.")
    if not any(name in row for name in CAPTION_COLUMNS):
        raise InputError(
            f"{path} has no column of captions; call it 'text', 'caption' or 'captions'; its columns: {columns}."
        )
    if key is not None and key not in row:
        raise InputError(f"{path} has no column {key!r} to take keys from; its columns: {columns}.")


def _captions(value: Any) -> list[str]:
    """Captions of a cell: a text, a list of texts, or such a list written as JSON, as CSV files have it."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value) if value.lstrip().startswith("[") else None
        except ValueError:
            parsed = None  # A caption may well start with a bracket.
        value = parsed if _are_texts(parsed) else [value]
    return [text.strip() for text in value if text.strip()] if _are_texts(value) else []


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _key_of_path(name: str) -> str:
    path = Path(name)
    # What lies outside the folder is called by its file's name: slashes at the front and ".." make no good key.
    inside = not path.is_absolute() and ".." not in path.parts
    return _plain((path.parent / path.stem).as_posix() if inside else path.stem)


def _plain(key: str) -> str:
    """Neither a tar file's members, nor folders, nor a list with one key a line may be split by a key."""
    key = key.strip().replace("/", "-").replace("\\", "-").replace(".", "_")
    return "".join(letter if letter.isprintable() else "_" for letter in key)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, read as they are needed (a ``.json`` is read whole)."""
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
                # Dates and decimals become text: a sample's json has no other form for them.
                yield json.loads(json.dumps(row, default=str))
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _read_lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
