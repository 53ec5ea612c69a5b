"""Data sets of Hugging Face's library that lie on the disk: arrow, folders of parquet files, imagefolder with splits.

They are read by that library, offline and row by row; nothing is fetched and nothing is copied to its cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.files import METADATA_NAMES, is_picture_name
from lightning_unlearn.preparation.layouts.table import check_columns, row_record
from lightning_unlearn.preparation.records import Reading, Record
from lightning_unlearn.preparation.tables import as_json

ARROW_FILES = ("dataset_dict.json", "state.json")


def hugging_face_form(folder: Path) -> str | None:
    """In which form a folder is a data set of Hugging Face's.

    Args:
        folder: The folder.

    Returns:
        ``"arrow"``, ``"parquet"`` or ``"imagefolder"``; ``None`` if it is none of these.
    """
    if any((folder / name).is_file() for name in ARROW_FILES):
        return "arrow"
    if any((folder / name).is_file() for name in METADATA_NAMES):
        return None
    within = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if any((path / name).is_file() for path in within for name in METADATA_NAMES):
        return "imagefolder"
    names = [path.name for place in (folder, *within) for path in place.iterdir()]
    if any(name.endswith(".parquet") for name in names) and not any(is_picture_name(name) for name in names):
        return "parquet"
    return None


def hugging_face_records(folder: Path, form: str, reading: Reading) -> Iterator[Record]:
    """The samples of a data set of Hugging Face's.

    Args:
        folder: The folder.
        form: See :func:`hugging_face_form`.
        reading: How it is read; its split must be named where there are several.

    Yields:
        The samples.

    Raises:
        InputError: If the library is missing, or the data set can't be read, or lacks a split or column.
    """
    rows = _split(folder, _load(folder, form), reading)
    column, rows = _raw_pictures(folder, rows, reading)
    reading = _with_column(reading, column)
    count = 0
    iterator = enumerate(rows)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            break
        except Exception as error:  # the library raises nearly anything at damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"{folder} can't be read past its row {count} ({reason}); make it again.") from None
        row = {name: as_json(value) for name, value in row.items()}
        if number == 0:
            check_columns(folder, row, reading)
        row = _named(row, column, folder)
        yield row_record(row, number, f"{folder.name}, row {number + 1}", folder, reading)
        count += 1


def _load(folder: Path, form: str) -> Any:
    # Read when the library is imported: from then on it asks nobody.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{folder} is a Hugging Face data set ({form}), which needs datasets; "
            "`pip install lightning-unlearn[datasets]`."
        ) from None
    try:
        if form == "arrow":
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(form, data_dir=str(folder.resolve()), streaming=True)
    except Exception as error:  # likewise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder} can't be read as a Hugging Face data set ({reason}); make it again.") from None


def _split(folder: Path, loaded: Any, reading: Reading) -> Any:
    if not isinstance(loaded, dict):
        if reading.split is not None:
            raise InputError(f"{folder} has no splits; leave `split` out.")
        return loaded
    names = ", ".join(map(str, loaded))
    if reading.split is None and len(loaded) > 1:
        raise InputError(f"{folder} has the splits {names}; say which was trained on with `split`.")
    split = reading.split or next(iter(loaded), "")
    if split not in loaded:
        raise InputError(f"{folder} has no split {split!r}; its splits: {names or 'none'}.")
    return loaded[split]


def _raw_pictures(folder: Path, rows: Any, reading: Reading) -> tuple[str | None, Any]:
    """The column of pictures, and rows in which these are left undecoded."""
    import datasets

    features = rows.features or {}
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not reading.pictures or reading.image_column not in {None, *columns}:
        return reading.image_column, rows
    if reading.image_column is None and len(columns) != 1:
        held = f"the columns of pictures {', '.join(columns)}" if columns else "no column of pictures"
        raise InputError(f"{folder} has {held}; name one with `image_column`; its columns: {', '.join(features)}.")
    column = reading.image_column or columns[0]
    return column, rows.cast_column(column, datasets.Image(decode=False))


def _with_column(reading: Reading, column: str | None) -> Reading:
    from dataclasses import replace

    return replace(reading, image_column=column)


def _named(row: dict[str, Any], column: str | None, folder: Path) -> dict[str, Any]:
    """The row, its picture called by its path within the data set, not by one of this machine."""
    value = row.get(column) if column is not None else None
    if not isinstance(value, dict) or not value.get("path"):
        return row
    path = Path(value["path"])
    inside = path.is_absolute() and path.is_relative_to(folder.resolve())
    return {**row, column or "": {**value, "path": str(path.relative_to(folder.resolve())) if inside else str(path)}}
