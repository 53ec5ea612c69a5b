"""One sample before it is encoded, and how a source of samples is to be read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_unlearn.data.weights import CAPTION_WEIGHTS
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.tally import Tally

PATH_COLUMN = "file_name"
SKIP = "leave it out with on_bad_sample=skip"


@dataclass(frozen=True)
class Record:
    """One sample before it is encoded.

    Attributes:
        key: Unique name, as a shard takes it: without dots and slashes.
        captions: Its captions; empty if it has none.
        metadata: Whatever else is known of it, JSON-like.
        place: Where it stands, for messages.
        picture: The file of its picture, or the picture's bytes, if there is to be one.
        problem: One sentence on what was wrong when it was read.
    """

    key: str
    captions: list[str]
    metadata: dict[str, Any]
    place: str
    picture: Path | bytes | None = None
    problem: str | None = None

    @property
    def fault(self) -> str | None:
        """One sentence on what keeps it from being a sample, as far as can be told without opening its picture."""
        if self.problem is not None:
            return self.problem
        if not self.captions:
            return f"{self.place} has no caption; add one, or see `caption` and `missing_caption`, or {SKIP}."
        if isinstance(self.picture, Path) and not self.picture.is_file():
            return f"{self.place}: there is no picture at {self.picture}; put it there, or {SKIP}."
        return None


@dataclass(frozen=True)
class Reading:
    """How a source of samples is read.

    Attributes:
        pictures: Whether each sample has a picture.
        key: Column with the samples' keys.
        image_column: Column with the pictures or their paths.
        caption_column: Column with the captions.
        caption: A caption for all samples, or for those that have none.
        split: Of a Hugging Face data set.
        choices: What trainers do differently.
        tally: What is not taken.
        text: Whether the network is given text, so that a sample needs a caption.
    """

    pictures: bool = True
    key: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    caption: str | None = None
    split: str | None = None
    choices: Choices = field(default_factory=Choices)
    tally: Tally = field(default_factory=Tally)
    text: bool = True

    def settled(self, captions: list[str], folder: str | None = None) -> list[str]:
        """The captions that a sample gets, where it was found with these.

        Args:
            captions: As they were found; empty if there is none.
            folder: What its folder's name says, if it is to be asked.

        Returns:
            The captions.
        """
        if self.caption is not None and (not captions or self.choices.caption_for == "all"):
            return [self.caption]
        if not captions and self.choices.missing_caption == "folder" and folder:
            return [folder]
        if not captions and (self.choices.missing_caption != "error" or not self.text):
            return [""]
        return captions


def dropped_captions(record: Record, dropout: float) -> Record:
    """A sample as training saw its captions, of which it dropped a share for the empty one.

    Args:
        record: The sample.
        dropout: The share.

    Returns:
        With the empty caption beside its own, and the weights of both.
    """
    if not dropout or not record.captions or record.captions == [""]:
        return record
    shares = record.metadata.get(CAPTION_WEIGHTS) or [1.0] * len(record.captions)
    weights = [(1 - dropout) * share / sum(shares) for share in shares]
    return replace(
        record,
        captions=[*record.captions, ""],
        metadata={**record.metadata, CAPTION_WEIGHTS: [*weights, dropout]},
    )


def captions_of_cell(value: Any) -> list[str]:
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


def key_of_path(name: str) -> str:
    """The key of a picture that is called by its path: the path without its suffix."""
    path = Path(name)
    # What lies outside the folder is called by its file's name: slashes at the front and ".." make no good key.
    inside = not path.is_absolute() and ".." not in path.parts
    return plain_key((path.parent / path.stem).as_posix() if inside else path.stem)


def plain_key(key: str) -> str:
    """Neither a tar file's members, nor folders, nor a list with one key a line may be split by a key."""
    key = key.strip().replace("/", "-").replace("\\", "-").replace(".", "_")
    return "".join(letter if letter.isprintable() else "_" for letter in key)
