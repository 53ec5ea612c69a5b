"""A folder of pictures with a caption file beside each, with or without kohya's names of folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.caption_files import DEFAULT_FILE, caption_suffixes, captions_beside
from lightning_unlearn.preparation.layouts.files import (
    LOSS_MASK,
    REGULARISATION_FOLDERS,
    files_in,
    is_mask_name,
    is_picture_name,
    kinds_taken,
    readable_suffixes,
    repeats_of_folder,
)
from lightning_unlearn.preparation.records import PATH_COLUMN, SKIP, Reading, Record, key_of_path


def folder_records(folder: Path, reading: Reading) -> Iterator[Record]:
    """The samples of a folder, in the order of their paths.

    Args:
        folder: The folder; folders within it count.
        reading: How it is read.

    Yields:
        The samples, those of kinds that can't be read among them as bad ones.
    """
    names = list(files_in(folder))
    pictures = list(_pictures(names, reading))
    numbered = _is_numbered(folder, pictures, reading)
    if numbered and reading.choices.repeats == "auto":
        for parent in sorted({_parent(folder, name) for name in pictures}):
            reading.tally.add("folders' numbers of repeats became weights (say repeats=none if they are none)", parent)
    for name in pictures:
        subset = repeats_of_folder(_parent(folder, name)) if numbered else None
        if numbered and (subset is None or subset[0] < 1):
            reading.tally.add("pictures lie in folders without a number of repeats, which kohya's trainer skips", name)
            continue
        yield _record(folder, name, subset, reading)
    _count_others(names, set(pictures), reading)


def _pictures(names: list[str], reading: Reading) -> Iterator[str]:
    kinds = kinds_taken(reading.choices)
    for name in names:
        if not is_picture_name(name):
            continue
        if is_mask_name(name) and reading.choices.masks != "picture":
            if reading.choices.masks != "loss" or not name.endswith(LOSS_MASK):
                reading.tally.add("masks were left out", name)
        elif PurePosixPath(name).suffix.lower() not in kinds:
            reading.tally.add("pictures are not of the `picture_kinds` that are taken", name)
        else:
            yield name


def _parent(folder: Path, name: str) -> str:
    return PurePosixPath(name).parent.name or folder.resolve().name


def _is_numbered(folder: Path, pictures: list[str], reading: Reading) -> bool:
    """Whether the folders' names say how often their pictures are repeated."""
    numbered = [repeats_of_folder(_parent(folder, name)) is not None for name in pictures]
    match reading.choices.repeats:
        case "folder":
            # A folder that a trainer's configuration names need not have a number; one number, and all need it.
            return any(numbered)
        case "auto":
            return bool(numbered) and all(numbered)
        case "none":
            return False


def _record(folder: Path, name: str, subset: tuple[int, str] | None, reading: Reading) -> Record:
    path = folder / name
    shown = name.encode(errors="replace").decode()  # names need not be UTF-8, a sample's json must be
    metadata: dict[str, Any] = {PATH_COLUMN: shown}
    captions: list[str] = []
    problem = None
    if path.suffix.lower() not in readable_suffixes():
        problem = f"{path} is a picture of a kind that can't be read here ({path.suffix}); convert it, or {SKIP}."
    else:
        try:
            captions = captions_beside(path, reading.choices)
        except InputError as error:
            problem = str(error)
    if reading.caption is not None and captions and reading.choices.caption_for == "all":
        reading.tally.add("caption files were not read, because `caption` is for all", name)
    words = subset[1] if subset else None
    if subset is not None:
        metadata |= {"weight": subset[0]}
        if _is_regularisation(folder, name):
            metadata |= {"regularisation": True}
            reading.tally.add("pictures are regularisation (class) pictures, and marked so", name)
    if not captions and words and reading.choices.repeats == "auto" and reading.choices.missing_caption == "error":
        captions = [words]
    settled = reading.settled(captions, words)
    if settled == [""] and problem is None and reading.text:
        reading.tally.add("samples have the empty caption", name)
    return Record(key_of_path(name), settled, metadata, str(path), path, problem)


def _is_regularisation(folder: Path, name: str) -> bool:
    parents = {part.lower() for part in PurePosixPath(name).parts[:-2]} | {folder.resolve().name.lower()}
    return bool(parents & REGULARISATION_FOLDERS)


def _count_others(names: list[str], pictures: set[str], reading: Reading) -> None:
    """Count caption files without a picture, and whatever else is neither picture nor caption."""
    suffixes = caption_suffixes(reading.choices)
    with_picture = {str(PurePosixPath(name).with_suffix("")) for name in pictures}
    for name in names:
        path = PurePosixPath(name)
        default = path.name == DEFAULT_FILE and reading.choices.missing_caption == "default_file"
        if is_picture_name(name) or default:
            continue
        if path.suffix not in suffixes:
            reading.tally.add("other files were left out", name)
        elif str(path.with_suffix("")) not in with_picture:
            reading.tally.add("caption files have no picture", name)
