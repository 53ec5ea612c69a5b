"""The pictures that a person asks about: prompts to generate them of, or files with the prompts that they are of."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest

LONGEST_PROMPT = 10_000
LONGEST_NAME = 40


@dataclass(frozen=True)
class Question:
    """One picture that is asked about.

    Attributes:
        prompt: What it was, or will be, generated with.
        seed: Of the generation; ``None`` for a picture that was given.
        picture: The file that was given.
        fields: What else its prompts' file says of it.
        key: Its name in tables and reports.
    """

    prompt: str
    seed: int | None = None
    picture: Path | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""

    @property
    def words(self) -> str:
        """What a person knows it by."""
        known = self.prompt.lower() if self.picture is None else self.picture.stem
        words = re.sub(r"[^A-Za-z0-9]+", "-", known).strip("-")[:LONGEST_NAME].strip("-") or "query"
        return words if self.seed is None else f"{words}-seed-{self.seed}"

    def said_of(self, name: str) -> Any:
        """A field of it.

        Args:
            name: The field's.

        Returns:
            Its value; ``None`` if there is none.
        """
        return {**self.fields, "prompt": self.prompt, "seed": self.seed}.get(name)

    @property
    def identity(self) -> tuple[str, int | None, str | None]:
        """What makes it another one than the others."""
        return self.prompt, self.seed, None if self.picture is None else str(self.picture.resolve())


def questions_of(given: Any) -> list[Question]:
    """The pictures that options ask about.

    Args:
        given: The parsed options.

    Returns:
        At least one question.

    Raises:
        InputError: If there is none, or they don't fit together.
    """
    rows = [{"prompt": prompt} for prompt in given.prompt] + ([] if given.prompts is None else _rows(given.prompts))
    if not rows and given.query:
        raise InputError("Each --query needs the prompt that it was generated with; give it as --prompt.")
    if not rows:
        raise InputError("Nothing is asked: give a --prompt to generate a picture of, or a --query with its --prompt.")
    prompts: list[tuple[str, dict[str, Any]]] = []
    for row in rows:
        prompt = str(row.pop("prompt")).strip()
        if not prompt:
            raise InputError("A prompt is empty; write what the picture is of.")
        if len(prompt) > LONGEST_PROMPT:
            raise InputError(
                f"A prompt has {len(prompt):,} letters, and no text encoder reads more than {LONGEST_PROMPT:,}; "
                f"shorten it ({prompt[:40]!r} …)."
            )
        prompts.append((prompt, row))
    questions = _given(given, prompts) if given.query else _generated(given, prompts)
    asked = [question.identity for question in questions]
    twice = next((question for question in questions if asked.count(question.identity) > 1), None)
    if twice is not None:
        raise InputError(f"The same is asked twice ({twice.prompt[:60]!r}); ask once, or with another --seed.")
    words = [question.words for question in questions]
    # Prompts that begin alike have a number of their own.
    return [
        replace(question, key=name if words.count(name) == 1 else f"{name}-{digest(*map(str, question.identity))[:6]}")
        for question, name in zip(questions, words, strict=True)
    ]


def _given(given: Any, prompts: list[tuple[str, dict[str, Any]]]) -> list[Question]:
    if len(prompts) != len(given.query):
        raise InputError(
            f"There are {len(given.query)} --query and {len(prompts)} prompts; give each picture the prompt that it "
            "was generated with, in the same order."
        )
    if given.seed:
        raise InputError("--seed is for pictures that are generated here, and --query gives ready ones; leave it out.")
    for path in given.query:
        _check_picture(Path(path).expanduser())
    return [
        Question(prompt, None, Path(path).expanduser(), fields)
        for path, (prompt, fields) in zip(given.query, prompts, strict=True)
    ]


def _generated(given: Any, prompts: list[tuple[str, dict[str, Any]]]) -> list[Question]:
    seeds = given.seed or [0]
    wrong = [seed for seed in seeds if not 0 <= seed < 2**63]
    if wrong:
        raise InputError(f"A seed is a number from 0 on, below 2⁶³, but one is {wrong[0]}; choose another.")
    return [Question(prompt, seed, None, fields) for prompt, fields in prompts for seed in seeds]


def _check_picture(path: Path) -> None:
    from PIL import Image

    if not path.is_file():
        raise InputError(f"There is no picture at {path}; check --query, or the folder you run from.")
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # Pillow raises nearly anything at broken files
        raise InputError(f"{path} can't be read as a picture ({type(error).__name__}); give another one.") from None


def _rows(name: str) -> list[dict[str, Any]]:
    """The prompts of a file: one a line, or with further fields as .jsonl or .csv."""
    path = Path(name).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise InputError(
            f"The prompts in {path} can't be read ({reason}); give a text file, one prompt a line."
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        match path.suffix.lower():
            case ".jsonl":
                rows = [dict(json.loads(line)) for line in lines]
            case ".csv":
                rows = [dict(row) for row in csv.DictReader(io.StringIO(text))]
            case _:
                rows = [{"prompt": line} for line in lines]
    except (ValueError, TypeError) as error:
        raise InputError(f"The prompts in {path} are no {path.suffix[1:]} ({error}); correct the file.") from None
    if not rows:
        raise InputError(f"{path} holds no prompt; write one a line.")
    lacking = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)]
    if lacking:
        raise InputError(f"Row {lacking[0]} of {path} has no prompt; name the column, or field, `prompt`.")
    return rows


def check_concept(concept: str | None, questions: Sequence[Question]) -> None:
    """See that each question says which others it belongs to.

    Args:
        concept: The field that says it; ``None`` where each is asked alone.
        questions: They.

    Raises:
        InputError: If one does not.
    """
    if concept is None:
        return
    lacking = [question for question in questions if question.said_of(concept) is None]
    if lacking:
        raise InputError(
            f"--concept {concept} puts queries together that have the same {concept}, but {lacking[0].prompt[:60]!r} "
            "has none; give a field of a --prompts file (.jsonl or .csv), or `prompt`."
        )
