"""Pictures and captions as people keep them, a file for each layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.files import METADATA_NAMES
from lightning_unlearn.preparation.layouts.folder import folder_records
from lightning_unlearn.preparation.layouts.hugging_face import hugging_face_form, hugging_face_records
from lightning_unlearn.preparation.layouts.table import table_records
from lightning_unlearn.preparation.layouts.tars import tar_records
from lightning_unlearn.preparation.records import Reading, Record

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

__all__ = ["TAR_SUFFIXES", "layout_of", "read_records"]


def layout_of(source: str) -> str:
    """How a source of samples is laid out.

    Args:
        source: A folder or a file.

    Returns:
        ``"folder"``, ``"table"``, ``"tar"``, or, of Hugging Face, ``"arrow"``, ``"parquet"`` or ``"imagefolder"``.

    Raises:
        InputError: If it is missing, or could be two things.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"There is nothing at {path}; name a folder of pictures, or a table.")
    if not path.is_dir():
        return "tar" if path.name.lower().endswith(TAR_SUFFIXES) else "table"
    if form := hugging_face_form(path):
        return form
    tables = [name for name in METADATA_NAMES if (path / name).is_file()]
    if len(tables) > 1:
        raise InputError(f"{path} holds {' and '.join(tables)}; leave only one of them.")
    return "table" if tables else "folder"


def read_records(source: str, reading: Reading) -> Iterator[Record]:
    """The samples of a folder, table, tar or data set, in its order, one at a time.

    Args:
        source: A folder of pictures, or a file: ``.csv``, ``.jsonl``, ``.parquet``, ``.json`` (a list), ``.txt`` (one
            caption a line), ``.tar``.
        reading: How it is read.

    Yields:
        The samples.

    Raises:
        InputError: If the source is missing or can't be read, or lacks a column.
    """
    layout = layout_of(source)
    path = Path(source).expanduser()
    if layout not in {"arrow", "parquet", "imagefolder"} and reading.split is not None:
        raise InputError(f"{path} is no Hugging Face data set, and has no splits; leave `split` out.")
    match layout:
        case "tar":
            yield from tar_records(path, reading)
        case "table":
            table = next((path / name for name in METADATA_NAMES if (path / name).is_file()), path)
            yield from table_records(table, reading, whole_folder=path.is_dir())
        case "folder":
            for name, value in (("key", reading.key), ("caption_column", reading.caption_column)):
                if value is not None:
                    raise InputError(
                        f"{name}={value!r} names a column, but {path} has no metadata table; "
                        f"add {METADATA_NAMES[0]}, or leave {name} out."
                    )
            yield from folder_records(path, reading)
        case form:
            yield from hugging_face_records(path, form, reading)
