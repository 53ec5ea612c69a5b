"""What a person asks, checked before anything long is done: one sentence for whatever can't be."""

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
SECTIONS = ("model", "data", "trainer", "seed_everything")


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

    @property
    def identity(self) -> tuple[str, int | None, str | None]:
        """What makes it another one than the others."""
        return self.prompt, self.seed, None if self.picture is None else str(self.picture.resolve())


@dataclass(frozen=True)
class Request:
    """What is asked, of which model, about which pictures.

    Attributes:
        output: The folder of it all.
        questions: The pictures.
        pipeline: Folder of the model; ``None`` for the sample model.
        adapter: What lies on it.
        images: Folder of the training pictures; or
        shards: Shards of them.
        prepare: Options of ``prepare``, as they are written on its command line.
        concept: Field by which queries are put together into targets.
        steps: Of the sampler.
        guidance: Its scale.
        method: How samples are scored; ``None`` leaves it to the kind of model.
        passes: Of the Fisher.
        top: Pictures in the report.
        settings: What else the config says, over what is decided here.
    """

    output: Path
    questions: Sequence[Question]
    pipeline: Path | None
    adapter: Path | None
    images: Path | None
    shards: Sequence[str]
    prepare: Mapping[str, str]
    concept: str | None
    steps: int | None
    guidance: float | None
    method: str | None
    passes: int
    top: int
    settings: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        """Side of the pictures, where it was given."""
        return int(self.prepare["size"]) if "size" in self.prepare else None


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
    lacking = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)]
    if lacking:
        raise InputError(f"Row {lacking[0]} of {path} has no prompt; name the column, or field, `prompt`.")
    return rows


def settings_of(name: str | None) -> dict[str, Any]:
    """What a file of settings says over what is decided here.

    Args:
        name: The YAML file.

    Returns:
        Its content.

    Raises:
        InputError: If it is no config.
    """
    if name is None:
        return {}
    import yaml

    path = Path(name).expanduser()
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"The settings in {path} can't be read ({reason}); give a YAML file.") from None
    if not isinstance(found, dict) or not set(found) <= set(SECTIONS):
        raise InputError(f"{path} is no file of settings; it may have {', '.join(SECTIONS)}, as a config has them.")
    return found


def request_of(given: Any) -> Request:
    """What options ask for.

    Args:
        given: The parsed options.

    Returns:
        The request, whose parts fit together.

    Raises:
        InputError: If they don't.
    """
    prepare = {**{name: str(value) for name, value in (given.prepare or {}).items()}}
    for name in ("like", "size"):
        if getattr(given, name) is not None:
            prepare[name] = str(getattr(given, name))
    _check_model(given, prepare)
    if given.passes < 2:
        raise InputError(
            f"--passes must be at least 2, one for covariances and one for eigenvalues, not {given.passes}."
        )
    if given.steps is not None and given.steps < 1:
        raise InputError(f"--steps must be at least 1, but is {given.steps}.")
    questions = questions_of(given)
    _check_concept(given.concept, questions)

    def path(name: str | None) -> Path | None:
        return None if name is None else Path(name).expanduser()

    return Request(
        Path(given.output).expanduser(),
        questions,
        path(given.pipeline),
        path(given.adapter),
        path(given.images),
        given.shards,
        prepare,
        given.concept,
        given.steps,
        given.guidance,
        given.method,
        given.passes,
        given.top,
        settings_of(given.settings),
    )


def _check_model(given: Any, prepare: Mapping[str, str]) -> None:
    named = [f"--{name}" for name in ("pipeline", "adapter", "images", "shards") if getattr(given, name)]
    if given.sample:
        named += [f"--{name}" for name in prepare]
        if named:
            raise InputError(
                f"--sample has a model and pictures of its own; leave {', '.join(named)} out, or --sample."
            )
        if given.guidance is not None:
            raise InputError("The sample model is asked without guidance; leave --guidance out.")
        return
    for applies, sentence in (
        (
            given.pipeline is None,
            "No model is named: give --pipeline, the folder of a diffusers pipeline, or --sample for the sample model.",
        ),
        (
            not given.images and not given.shards,
            "No training pictures are named: give their folder as --images, or prepared shards as --shards.",
        ),
        (
            given.images and given.shards,
            "Training pictures come from --images or from --shards; leave one of them out.",
        ),
        (
            given.adapter is not None and not Path(given.adapter).expanduser().exists(),
            f"There is no adapter at {given.adapter}; check --adapter, or the folder you run from.",
        ),
    ):
        if applies:
            raise InputError(sentence)
    ours = {"output", "images", "pipeline", "adapter", "overwrite", "index", "count"} & set(prepare)
    if ours:
        raise InputError(f"--prepare.{min(ours)} is what ask itself decides; leave it out.")
    if "size" in prepare and not prepare["size"].isdigit():
        raise InputError(f"--prepare.size is {prepare['size']!r}; give the side of the pictures in pixels.")


def _check_concept(concept: str | None, questions: Sequence[Question]) -> None:
    if concept is None or concept in ("prompt", "seed"):
        return
    lacking = [question for question in questions if concept not in question.fields]
    if lacking:
        raise InputError(
            f"--concept {concept} puts queries together that have the same {concept}, but {lacking[0].prompt[:60]!r} "
            "has none; give a field of a --prompts file (.jsonl or .csv), or `prompt`."
        )
