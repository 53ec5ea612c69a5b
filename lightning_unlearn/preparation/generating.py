"""Pictures by a pipeline's own call, with the adapter on it that is looked at: what a person would have generated."""

from __future__ import annotations

import json
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from lightning_unlearn.diffusion.adapters import load_adapter
from lightning_unlearn.diffusion.checkpoints import check_safetensors, variant_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.model_parts import load_part
from lightning_unlearn.preparation.text_changes import TextChanges

NETWORKS = ("unet", "transformer")
INSTEAD = "generate the picture yourself, and give it as --query with its --prompt"


class PictureMaker:
    """A pipeline out of its folder, in float32, with an adapter on its network and its text encoders.

    Args:
        folder: Of the pipeline.
        network: Its network, as it is asked, so that the model that makes the picture is the same.
        adapter: Put on it as for an attribution.
        tokens: Files of learned tokens.
        size: Side of the pictures in pixels; by default the pipeline's.
        steps: Of its sampler; by default the pipeline's.
        guidance: Its scale; by default the pipeline's.
        device: Where it runs.
        adapted: Whether the network is in use: the adapter is on it already, and it stays on the device.

    Raises:
        InputError: If the pipeline can't be loaded, or makes no pictures.
    """

    def __init__(
        self,
        folder: Path,
        network: nn.Module,
        adapter: str | None,
        tokens: tuple[str, ...],
        size: int | None,
        steps: int | None,
        guidance: float | None,
        device: torch.device,
        *,
        adapted: bool = False,
    ) -> None:
        check_pipeline(folder)
        self.folder, self.network = folder, network.eval()
        part = next((name for name in NETWORKS if (folder / name / "config.json").is_file()), None)
        if part is None:
            raise InputError(f"{folder} has neither a unet nor a transformer; {INSTEAD}.")
        settings: dict[str, Any] = {part: network, "use_safetensors": True, "variant": variant_of(folder / part)}
        self.pipeline: Any = load_part(diffusers.DiffusionPipeline.from_pretrained, folder, **settings)
        parameters = signature(type(self.pipeline).__call__).parameters
        for name in ("prompt", "num_inference_steps", "generator", "output_type"):
            if name not in parameters:
                raise InputError(f"{type(self.pipeline).__name__} in {folder} takes no {name}; {INSTEAD}.")
        self.settings: dict[str, Any] = {}
        for name, value in (
            ("height", size),
            ("width", size),
            ("num_inference_steps", steps),
            ("guidance_scale", guidance),
        ):
            if value is None:
                continue
            if name not in parameters:
                raise InputError(f"{type(self.pipeline).__name__} in {folder} takes no {name}; leave it out.")
            self.settings[name] = value
        self._changed(adapter, tokens, adapted)
        self._placed(device, adapted)
        told = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        self.facts: dict[str, Any] = {
            "scheduler": type(self.pipeline.scheduler).__name__,
            **{
                name: self.settings.get(given, parameters[given].default)
                for name, given in told.items()
                if given in parameters
            },
        }

    def _changed(self, adapter: str | None, tokens: tuple[str, ...], adapted: bool) -> None:
        if adapter is not None and not adapted:
            load_adapter(self.network, adapter)
        if changes := TextChanges(adapter, tokens):
            parts = {name: part for name, part in self.pipeline.components.items() if part is not None}
            encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
            tokenizers = {
                name.replace("tokenizer", "text_encoder"): part
                for name, part in parts.items()
                if name.startswith("tokenizer")
            }
            changes.apply(encoders, tokenizers)

    def _placed(self, device: torch.device, adapted: bool) -> None:
        if device.type != "cpu" and not adapted and find_spec("accelerate") is not None:
            # One part at a time: encoders, network and VAE together take more than a picture needs.
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def make(self, prompt: str, seed: int) -> Image.Image:
        """Generate a picture.

        Args:
            prompt: Its prompt.
            seed: Of the starting noise, which is drawn on the CPU.

        Returns:
            The picture.

        Raises:
            InputError: If the pipeline gives none that could be looked at.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            with torch.no_grad():
                made = self.pipeline(prompt=prompt, generator=generator, output_type="np", **self.settings)
        except torch.OutOfMemoryError:
            raise InputError(
                f"The device has too little memory to generate a picture with {self.folder}; {INSTEAD}."
            ) from None
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"The pipeline in {self.folder} generates no picture ({reason}); {INSTEAD}.") from None
        images = getattr(made, "images", None)
        if images is None:
            raise InputError(f"{type(self.pipeline).__name__} in {self.folder} makes no pictures; {INSTEAD}.")
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            raise InputError(
                f"The pipeline's safety checker hid the picture of {prompt!r} with seed {seed}; take another seed or "
                "prompt."
            )
        pixels = np.asarray(images[0])  # (height, width, channels) in [0, 1]
        if not np.isfinite(pixels).all():
            raise InputError(
                f"The picture of {prompt!r} with seed {seed} is not finite; see to the pipeline and the adapter."
            )
        values = (pixels.clip(0, 1) * 255).round().astype("uint8")
        return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def check_pipeline(folder: Path) -> None:
    """Refuse what is no pipeline of diffusers.

    Args:
        folder: What was given.

    Raises:
        InputError: If it is none.
    """
    if folder.is_file():
        raise InputError(
            f"{folder} is a file; diffusers makes the folder that is needed of it: "
            "DiffusionPipeline's from_single_file, then save_pretrained."
        )
    if not folder.is_dir():
        raise InputError(f"There is no pipeline at {folder}; name the folder that save_pretrained of diffusers made.")
    try:
        parts = json.loads((folder / "model_index.json").read_bytes())
        assert isinstance(parts, dict)
    except (OSError, ValueError, AssertionError):
        raise InputError(
            f"{folder} has no model_index.json that names its parts; name a folder that save_pretrained of a diffusers "
            "pipeline made."
        ) from None
    for name, part in parts.items():
        if isinstance(part, list) and part[-1] is not None and (folder / name).is_dir():
            check_safetensors(folder / name)
