"""The pictures that are asked about, in a folder as ``prepare`` takes it: given, or generated with their prompts."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_unlearn.command_line.ask_questions import Question
from lightning_unlearn.command_line.ask_request import Request
from lightning_unlearn.command_line.command_parts import say
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.fingerprints import digest, settings_digest

PICTURES, SHARDS = "pictures", "shards"
TABLE = "metadata.jsonl"
# Options of prepare that are of the training's captions and folders, and of no query.
OF_TRAINING = (
    "caption",
    "caption_for",
    "caption_lines",
    "caption_suffix",
    "caption_dropout",
    "missing_caption",
    "repeats",
    "masks",
    "mask_folder",
    "picture_kinds",
    "image_column",
    "caption_column",
    "class_labels",
    "split",
    "key",
    "like",
    "on_bad_sample",
    "samples_per_shard",
)
# What was made of the training pictures' sizes and colours, as their manifest says it.
GEOMETRY = ("exif", "alpha", "crop", "resize", "buckets", "bucket_step", "bucket_shortest", "bucket_longest")

Maker = Callable[[Question], tuple[Image.Image, dict[str, Any]]]


def name_of(questions: Sequence[Question], how: dict[str, Any]) -> str:
    """What a set of questions is called: by its first one, for people, and a digest of all.

    Args:
        questions: They, in their order.
        how: What else their pictures depend on.

    Returns:
        A folder's name.
    """
    about = [
        [question.prompt, question.seed, dict(question.fields), question.picture and _content(question.picture)]
        for question in questions
    ]
    return f"{questions[0].key[:40].strip('-')}-{settings_digest({'questions': about, 'how': how})[:8]}"


def _content(picture: Path) -> str:
    return digest(picture.read_bytes().hex())


def is_prepared(folder: Path) -> bool:
    """Whether the queries in a folder are shards already.

    Args:
        folder: Of the queries.

    Returns:
        Whether they are.
    """
    return (folder / SHARDS / MANIFEST).is_file()


class Gallery:
    """Pictures of whatever was ever asked, each with what is known of it.

    Args:
        folder: Where they lie.
        how: What they depend on besides prompts and seeds.
    """

    def __init__(self, folder: Path, how: dict[str, Any]) -> None:
        self.folder, self.how = folder, how

    def place(self, question: Question) -> Path:
        """Where a question's picture lies, or will.

        Args:
            question: The question.

        Returns:
            A file; what is known of it lies beside it.
        """
        content = None if question.picture is None else _content(question.picture)
        name = settings_digest({"prompt": question.prompt, "seed": question.seed, "of": content, "how": self.how})[:8]
        return self.folder / f"{question.words}-{name}.png"

    def left(self, questions: Sequence[Question]) -> list[Question]:
        """The questions whose pictures are not there yet.

        Args:
            questions: All of them.

        Returns:
            Those that are left.
        """
        return [question for question in questions if not self.place(question).is_file()]

    def fill(self, questions: Sequence[Question], make: Callable[[], Maker]) -> None:
        """Make the pictures that are not there, one after the other.

        Args:
            questions: All of them.
            make: Gives what makes a picture, with what is known of it; called if there is one to make.
        """
        if not (left := self.left(questions)):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        maker = make()
        for question in left:
            picture, facts = maker(question)
            stream, place = io.BytesIO(), self.place(question)
            # Which way is up is prepare's choice.
            exif = picture.getexif()
            picture.save(stream, "PNG", **({"exif": exif} if exif else {}))
            # What is known of a picture comes before it, since it says that both are there.
            write_atomically(place.with_suffix(".json"), json.dumps(facts).encode())
            write_atomically(place, stream.getvalue())
            say(f"  {question.prompt[:60]!r}: {place}")

    def show(self, questions: Sequence[Question], folder: Path) -> None:
        """Put the pictures of questions into a folder as ``prepare`` takes it.

        Args:
            questions: They; their pictures are there.
            folder: Of the queries.
        """
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        rows = []
        for question in questions:
            place = self.place(question)
            facts = json.loads(place.with_suffix(".json").read_bytes())
            about = {"prompt": question.prompt, "captions": [question.prompt], "file_name": f"{question.key}.png"}
            rows.append({**question.fields, **facts, **about})
            write_atomically(folder / PICTURES / f"{question.key}.png", place.read_bytes())
        write_atomically(folder / PICTURES / TABLE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def given_picture(question: Question) -> tuple[Image.Image, dict[str, Any]]:
    """A picture that a person gave.

    Args:
        question: With a picture.

    Returns:
        The picture as it is turned and coloured in its file, and what is known of it.
    """
    assert question.picture is not None
    with Image.open(question.picture) as picture:
        kept = picture.copy()
        kept.info |= {"exif": picture.info["exif"]} if "exif" in picture.info else {}
    # PNG keeps pixels as they are, in the modes that it has.
    if kept.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        kept = kept.convert("RGB")
    return kept, {"kind": "given", "of": question.picture.name}


def query_words(request: Request, folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The options by which the queries of a pipeline are prepared: as its training pictures, but for their captions.

    Args:
        request: What is asked.
        folder: Of the queries.
        manifest: Of the training pictures.

    Returns:
        Words of the command line.
    """
    options = {name: value for name, value in request.prepare.items() if name not in OF_TRAINING}
    sides = manifest.get("pictures") or {}
    if sides and sides.get("height") == sides.get("width"):
        options.setdefault("size", str(sides["height"]))
    if manifest.get("flips"):
        options.setdefault("flips", "true")
    choices = (manifest.get("reading") or {}).get("choices") or {}
    for name in GEOMETRY:
        if name in choices:
            options.setdefault(name, str(choices[name]))
    return ["--images", str(folder / PICTURES), *_model(request), *_words(options), "--output", str(folder / SHARDS)]


def training_words(request: Request, output: Path) -> list[str]:
    """The options by which the training pictures are prepared.

    Args:
        request: What is asked.
        output: Where their shards go.

    Returns:
        Words of the command line.
    """
    return ["--images", str(request.images), *_model(request), *_words(request.prepare), "--output", str(output)]


def _words(options: Mapping[str, str]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _model(request: Request) -> list[str]:
    adapter = [] if request.adapter is None else ["--adapter", str(request.adapter)]
    return ["--pipeline", str(request.pipeline), *adapter]
