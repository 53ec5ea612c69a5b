"""What the files of a folder are: pictures, masks, captions, tables, or something else."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import Choices

PICTURE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".tga", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw",
})  # fmt: skip
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")
# As OneTrainer calls them.
MASK_NAME = re.compile(r"-(masklabel|condlabel)$")
LOSS_MASK = "-masklabel.png"
REGULARISATION_FOLDERS = frozenset({"reg", "regularization", "regularisation", "reg_images"})


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes of the pictures that Pillow can open here."""
    from PIL import Image

    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def files_in(folder: Path) -> Iterator[str]:
    """The files of a folder and those below it in the order of their paths, without hidden ones.

    Linked folders are followed, as trainers do, each once.

    Args:
        folder: The folder.

    Yields:
        Paths relative to it, with slashes.

    Raises:
        InputError: If a folder can't be read.
    """
    found: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"The folder {error.filename} can't be read ({error.strerror}); see to its rights.")

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            inside = Path(place).relative_to(folder)
            found.extend((inside / name).as_posix() for name in names if not name.startswith("."))
        seen.add(real)
    yield from sorted(found)


def is_picture_name(name: str) -> bool:
    """Whether a file is called as a picture, of a kind that can be read or not."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def is_mask_name(name: str) -> bool:
    """Whether a picture is called as a mask, or condition, of another."""
    return MASK_NAME.search(PurePosixPath(name).stem) is not None


def kinds_taken(choices: Choices) -> frozenset[str]:
    """Suffixes of the pictures that are to be taken, whether they can be read or not."""
    if choices.picture_kinds is None:
        return PICTURE_SUFFIXES
    kinds = (kind.strip().lower() for kind in choices.picture_kinds.split(","))
    return frozenset("." + kind.lstrip(".") for kind in kinds if kind)


def repeats_of_folder(name: str) -> tuple[int, str] | None:
    """What a folder called as kohya's trainer takes it says.

    Args:
        name: Such as ``10_sks dog``.

    Returns:
        ``(10, "sks dog")``; ``None`` if it is called otherwise.
    """
    number, _, words = name.partition("_")
    return (int(number), words) if number.isascii() and number.isdigit() else None
