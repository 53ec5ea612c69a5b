"""What of a question shows before long work: whatever was named is looked at, and told from other inputs later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_unlearn.command_line.ask_config import Kind, kind_of, of_fisher
from lightning_unlearn.command_line.ask_costs import passes_for
from lightning_unlearn.command_line.ask_folder import facts_of
from lightning_unlearn.command_line.ask_request import Request
from lightning_unlearn.command_line.command_parts import check_top
from lightning_unlearn.datamodules.sources import list_shards, with_facts
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.preparation.choices import choose
from lightning_unlearn.preparation.generating import INSTEAD, check_pipeline
from lightning_unlearn.preparation.layouts import layout_of
from lightning_unlearn.preparation.layouts.files import files_in, is_picture_name


def check_request(request: Request) -> Kind:
    """Look at whatever was named, and at nothing long.

    Args:
        request: What is asked.

    Returns:
        The kind of model.

    Raises:
        InputError: If something is missing or wrong.
    """
    check_top(request.top)
    _check_method(request.method)
    choose(request.prepare.get("like"))
    if request.pipeline is not None:
        check_pipeline(request.pipeline)
    if request.images is not None:
        _check_images(request.images)
    generated = any(question.picture is None for question in request.questions)
    if generated and "text_encoder" in request.prepare:
        raise InputError(f"A pipeline generates with its own text encoder, not with --prepare.text_encoder; {INSTEAD}.")
    return kind_of(request)


def _check_method(method: str | None) -> None:
    from lightning_unlearn.baselines import BASELINES

    known = ["unlearning", *sorted(kind.__name__ for kind in BASELINES.values())]
    if method is not None and "." not in method and method not in known:
        raise InputError(f"There is no method {method!r}; take {', '.join(known)}.")


def _check_images(images: Path) -> None:
    if not images.is_dir():
        what = "is a file" if images.is_file() else "is not there"
        raise InputError(
            f"{images} {what}; give the folder of the training pictures (tables and tars become shards by `prepare`, "
            "which --shards takes)."
        )
    if layout_of(str(images)) == "folder" and not pictures_in(images):
        raise InputError(f"{images} holds no picture; give the folder of the training pictures.")


def pictures_in(folder: Path) -> int:
    """How many pictures a folder holds.

    Args:
        folder: Of training pictures.

    Returns:
        Their number, as their names have it.
    """
    return sum(map(is_picture_name, files_in(folder)))


def inputs_of(request: Request, config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What shards, Fisher and answers are made of.

    Args:
        request: What is asked.
        config: What was decided.
        known: What the folder was made of before, so that files that did not change are not read again.

    Returns:
        Name to what is known of it; ``passes`` are those of the Fisher.

    Raises:
        InputError: If a file can't be read, or there is no shard.
    """
    if request.pipeline is None:
        return {"model": "the sample model", "settings": of_fisher(config)}

    def facts(what: str, root: Path, names: list[str]) -> dict[str, Any]:
        before = known.get(what)
        return facts_of(root, names, before if isinstance(before, dict) else {})

    found: dict[str, Any] = {
        "model": "a pipeline",
        "pipeline": facts("pipeline", request.pipeline, _pipeline_files(request.pipeline)),
        "adapter": None,
        "images": None,
        "shards": None,
        "options_of_prepare": dict(request.prepare),
        "settings": of_fisher(config),
    }
    if request.adapter is not None:
        inside = request.adapter.is_dir()
        names = [*files_in(request.adapter)] if inside else [request.adapter.name]
        found["adapter"] = facts("adapter", request.adapter if inside else request.adapter.parent, names)
    if request.images is not None:
        found["images"] = facts("images", request.images, [*files_in(request.images)])
        samples = pictures_in(request.images)
    else:
        shards = with_facts(list_shards(list(request.shards)))
        found["shards"] = settings_digest({"shards": sorted([shard.url, shard.version] for shard in shards)})
        samples = sum(shard.samples or 0 for shard in shards)
    before = known.get("passes")
    kept = before if isinstance(before, int) and before else passes_for(samples)
    return {**found, "passes": request.passes or kept}


def _pipeline_files(folder: Path) -> list[str]:
    """The files of a pipeline's parts; beside them people keep whole checkpoints, which nobody reads here."""
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return ["model_index.json", *(f"{part}/{name}" for part in parts for name in files_in(folder / part))]
