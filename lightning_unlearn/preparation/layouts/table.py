"""A table with a row for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.files import files_in, is_mask_name, is_picture_name, readable_suffixes
from lightning_unlearn.preparation.records import (
    PATH_COLUMN,
    SKIP,
    Reading,
    Record,
    captions_of_cell,
    key_of_path,
    plain_key,
)
from lightning_unlearn.preparation.tables import is_picture, table_rows

CAPTION_COLUMNS = ("captions", "caption", "text")


def table_records(path: Path, reading: Reading, *, whole_folder: bool) -> Iterator[Record]:
    """The samples of a table, in its order.

    Args:
        path: The table; pictures are named relative to its folder.
        reading: How it is read.
        whole_folder: Whether all pictures in its folder should be in it; otherwise only those in folders that it names.

    Yields:
        The samples.

    Raises:
        InputError: If the table can't be read, or lacks a column.
    """
    listed: set[Path] = set()
    for number, row in enumerate(table_rows(path)):
        if number == 0:
            check_columns(path, row, reading)
        record = row_record(row, number, f"{path.name}, row {number + 1}", path.parent, reading)
        if isinstance(record.picture, Path):
            listed.add(record.picture.resolve())
        yield record
    if listed:
        _count_unlisted(path, listed, whole_folder, reading)


def row_record(row: dict[str, Any], number: int, place: str, folder: Path | None, reading: Reading) -> Record:
    """The sample in a row.

    Args:
        row: Column to value.
        number: Of the row, from 0.
        place: Where it stands, for messages.
        folder: That paths of pictures are relative to.
        reading: How it is read.

    Returns:
        The sample.

    Raises:
        InputError: If a cell that names the sample is empty.
    """
    names = (reading.caption_column,) if reading.caption_column else CAPTION_COLUMNS
    column = next((name for name in names if row.get(name) is not None), None)
    images = reading.image_column or PATH_COLUMN
    image = row.get(images)
    dropped = {column, "captions", *([images] if is_picture(image) else [])}
    metadata = {name: value for name, value in row.items() if name not in dropped}
    content, name = _content_and_name(image)
    if reading.pictures and not name and content is None:
        raise InputError(f"{place} has no {images}; fill it in or remove the row.")
    chosen = _key(row, name, number, place, reading)
    picture: Path | bytes | None = None
    problem = None
    if reading.pictures and folder is not None:
        picture = content if content is not None else folder / name
        if isinstance(picture, Path) and picture.suffix.lower() not in readable_suffixes() and picture.is_file():
            problem = f"{place} ({name}) is of a kind that can't be read here; convert it, or {SKIP}."
    captions = reading.settled(captions_of_cell(row.get(column) if column else None))
    if captions == [""] and problem is None and reading.text:
        reading.tally.add("samples have the empty caption", name or chosen)
    return Record(plain_key(chosen), captions, metadata, f"{place} ({name or chosen})", picture, problem)


def _content_and_name(image: Any) -> tuple[bytes | None, str]:
    """The bytes of a picture that lies in a cell, and its path, where there are such."""
    if isinstance(image, bytes):
        return image, ""
    if is_picture(image):
        return image["bytes"], str(image.get("path") or "")
    return None, "" if image is None or isinstance(image, dict | list) else str(image)


def _key(row: dict[str, Any], name: str, number: int, place: str, reading: Reading) -> str:
    if reading.key is None:
        return key_of_path(name) if name else f"{number:08d}"
    value = row.get(reading.key)
    chosen = "" if value is None else str(value)
    if not chosen.strip():
        raise InputError(f"{place} has no key in its column {reading.key!r}; fill it in or remove the row.")
    return chosen


def check_columns(path: Path, row: dict[str, Any], reading: Reading) -> None:
    """Refuse a table that lacks a column that is needed.

    Args:
        path: The table.
        row: Its first row.
        reading: How it is read.

    Raises:
        InputError: If a column is not there.
    """
    columns = ", ".join(map(str, row)) or "none"
    images = reading.image_column or PATH_COLUMN
    if reading.pictures and images not in row:
        raise InputError(
            f"{path} has no column {images!r} with the pictures' paths; name it with `image_column`; "
            f"its columns: {columns}."
        )
    names = (reading.caption_column,) if reading.caption_column else CAPTION_COLUMNS
    needed = reading.caption is None and (reading.text or reading.caption_column is not None)
    if needed and not any(name in row for name in names):
        wanted = repr(reading.caption_column) if reading.caption_column else "'text', 'caption' or 'captions'"
        raise InputError(
            f"{path} has no column of captions, {wanted}; name it with `caption_column`; its columns: {columns}."
        )
    if reading.key is not None and reading.key not in row:
        raise InputError(f"{path} has no column {reading.key!r} to take keys from; its columns: {columns}.")


def _count_unlisted(path: Path, listed: set[Path], whole_folder: bool, reading: Reading) -> None:
    if whole_folder:
        found = {path.parent / name for name in files_in(path.parent)}
    else:
        found = {
            file for folder in {picture.parent for picture in listed} if folder.is_dir() for file in folder.iterdir()
        }
    for file in sorted(found):
        if not is_picture_name(file.name) or file.name.startswith(".") or file.resolve() in listed:
            continue
        mask = is_mask_name(file.name)
        reading.tally.add("masks were left out" if mask else f"pictures are not listed in {path.name}", file.name)
