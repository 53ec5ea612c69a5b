"""What makes the pictures of a pipeline: its own call, on the model that is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from lightning_unlearn.command_line.ask_config import Kind
from lightning_unlearn.command_line.ask_queries import Maker
from lightning_unlearn.command_line.ask_questions import Question
from lightning_unlearn.command_line.ask_request import Request
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.preparation.adapter_options import options_of_adapter
from lightning_unlearn.preparation.generating import PictureMaker


def pipeline_maker(request: Request, kind: Kind, config: Mapping[str, Any], device: torch.device) -> Maker:
    """What generates the pictures of a pipeline with an adapter on it.

    Args:
        request: What is asked.
        kind: Of the model.
        config: Of the attribution, which names the network.
        device: Where the pipeline runs.

    Returns:
        Question to picture, and what is known of it.
    """
    assert request.pipeline is not None
    model, size = config["model"]["init_args"], size_of(request, kind)
    adapter = None if request.adapter is None else str(request.adapter)
    network = load_network(model["network"], model.get("weights"), model.get("prefix", ""), model.get("averaged"))
    tokens = tuple(request.prepare["token"].split(",")) if "token" in request.prepare else ()
    maker = PictureMaker(request.pipeline, network, adapter, tokens, size, request.steps, request.guidance, device)
    named = {} if request.adapter is None else {"adapter": request.adapter.name}

    def make(question: Question) -> tuple[Image.Image, dict[str, Any]]:
        assert question.seed is not None
        picture = maker.make(question.prompt, question.seed)
        return picture, {"kind": "generated", "seed": question.seed, **maker.facts, **named}

    return make


def size_of(request: Request, kind: Kind) -> int | None:
    """Side of the training's pictures.

    Args:
        request: What is asked.
        kind: Of the model.

    Returns:
        In pixels: as it was given, or as the adapter's header has it; ``None`` leaves it to the pipeline.
    """
    if request.adapter is None or kind != "adapter":
        return request.size
    return options_of_adapter(str(request.adapter), request.size, flips=False)[0]
