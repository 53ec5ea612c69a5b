"""Captions in files of their own, beside the pictures."""

from __future__ import annotations

from pathlib import Path

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.layouts.files import CAPTION_SUFFIXES
from lightning_unlearn.preparation.records import SKIP

DEFAULT_FILE = "default.txt"


def caption_suffixes(choices: Choices) -> tuple[str, ...]:
    """Suffixes that a caption file may have."""
    return CAPTION_SUFFIXES if choices.caption_suffix is None else (choices.caption_suffix,)


def captions_beside(picture: Path, choices: Choices) -> list[str]:
    """The captions of a picture that stand in a file of the same name.

    Args:
        picture: The picture's file.
        choices: Which suffix that file has, and what its lines mean.

    Returns:
        The captions, those for the whole folder if there is no such file; none if there is nothing in it.

    Raises:
        InputError: If the file can't be read, or there are two that differ.
    """
    found = [picture.with_suffix(suffix) for suffix in caption_suffixes(choices)]
    texts = {path: _read(path) for path in found if path.is_file()}
    if len(set(texts.values())) > 1:
        names = " and ".join(path.name for path in texts)
        raise InputError(f"{picture} has {names}, which differ; say which with `caption_suffix`, or {SKIP}.")
    default = picture.with_name(DEFAULT_FILE)
    if not texts and choices.missing_caption == "default_file" and default.is_file():
        return captions_of_text(_read(default), choices)
    if not texts:
        return []
    path, text = next(iter(texts.items()))
    captions = captions_of_text(text, choices)
    if not captions and choices.missing_caption == "folder":
        raise InputError(f"{path} is empty, at which kohya's trainer stops; write a caption, or {SKIP}.")
    return captions


def captions_of_text(text: str, choices: Choices) -> list[str]:
    """The captions in what a caption file holds.

    Args:
        text: Its content.
        choices: What its lines mean.

    Returns:
        The captions; none if it is blank.
    """
    lines = [line.strip() for line in text.splitlines()]
    if choices.caption_lines == "first":
        # The first line is the caption even where it is blank, as long as the file is not.
        return lines[:1] if any(lines) else []
    if choices.caption_lines == "joined":
        tags = [tag.strip() for line in lines for tag in line.split(",")]
        joined = ", ".join(tag for tag in tags if tag)
        return [joined] if joined else []
    return [line for line in lines if line]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8, or {SKIP}.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); see to its rights, or {SKIP}.") from None
