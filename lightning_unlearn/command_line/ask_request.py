"""What a person asks, checked before anything long is done: one sentence for whatever can't be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_unlearn.command_line.ask_questions import Question, check_concept, questions_of
from lightning_unlearn.errors import InputError

SECTIONS = ("model", "data", "trainer", "seed_everything")


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
        passes: Of the Fisher; ``None`` leaves it to the number of pictures.
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
    passes: int | None
    top: int
    settings: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        """Side of the pictures, where it was given."""
        return int(self.prepare["size"]) if "size" in self.prepare else None


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
    if given.passes is not None and given.passes < 2:
        raise InputError(
            f"--passes must be at least 2, one for covariances and one for eigenvalues, not {given.passes}."
        )
    if given.steps is not None and given.steps < 1:
        raise InputError(f"--steps must be at least 1, but is {given.steps}.")
    questions = questions_of(given)
    check_concept(given.concept, questions)

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
