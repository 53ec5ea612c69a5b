"""A family of flows beside its own pipeline: calls that the pipeline made, and ours with the same inputs."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pipeline_oracle import NetworkCall, first_middle_last, recorded
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.diffusion.families import Family, family_of

PROMPTS = ["", "a b", "a cat on a mat"]
HEIGHT, WIDTH = 16, 32  # in pixels; not square, so that rows and columns can't be taken for each other
ASKED = slice(len(PROMPTS), 2 * len(PROMPTS))
"""The rows of a call with classifier-free guidance that are given the prompt."""


@dataclass
class Opened:
    """A tiny pipeline and its network."""

    folder: Path
    pipeline: Any
    network: nn.Module
    family: Family

    def encoded(self, prompts: list[str] = PROMPTS) -> Conditions:
        """What the family makes of prompts."""
        return self.family.encode(self.pipeline, prompts)


def opened(folder: Path) -> Opened:
    """The pipeline that lies in a folder."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    network = (getattr(pipeline, "transformer", None) or pipeline.unet).eval()
    return Opened(folder, pipeline, network, family_of(network))


def generated(model: Opened, calls_a_step: int = 1, **settings: Any) -> list[NetworkCall]:
    """The network's calls while the pipeline generates in three steps: the first, a middle and the last.

    Where a step has two calls, the first is that with the prompt.
    """
    with recorded(model.network) as calls:
        usual = {"prompt": list(PROMPTS), "height": HEIGHT, "width": WIDTH, "num_inference_steps": 3}
        model.pipeline(**usual | settings, output_type="latent", generator=torch.Generator().manual_seed(3))
    assert len(calls) == 3 * calls_a_step
    return first_middle_last(calls[::calls_a_step])


def assert_predicts(
    model: Opened, noisy: Tensor, times: Tensor, output: Tensor, further: Conditions | None = None
) -> None:
    """The family gives what the pipeline got, for all rows and for each alone."""
    conditions = model.encoded() | (further or {})
    with torch.no_grad():
        ours = model.family.predict(model.network, noisy, times, ViewBatch(noisy, conditions))
        rows = [
            model.family.predict(
                model.network,
                noisy[row : row + 1],
                times[row : row + 1],
                ViewBatch(noisy[row : row + 1], {name: array[row : row + 1] for name, array in conditions.items()}),
            )
            for row in range(len(noisy))
        ]
    torch.testing.assert_close(ours, output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(rows), output, rtol=1e-5, atol=1e-5)
    # Or text would not matter, and a wrong one would pass.
    assert (ours[0] - ours[1]).abs().max() > 1e-4


def views(model: Opened, shape: tuple[int, ...]) -> tuple[ViewBatch, Tensor]:
    """Random views in double precision with the prompts' conditions, and noise."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, len(PROMPTS), *shape, generator=generator, dtype=torch.float64)
    conditions = {name: array.double() for name, array in model.encoded().items()}
    return ViewBatch(latents, conditions), noise


def script_table(model: Opened, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """As diffusers' scripts look them up: σ in double precision, the scheduler's times, and our numbers of them."""
    scheduler = model.pipeline.scheduler.from_config(model.pipeline.scheduler.config)
    ours = torch.tensor([scheduler.config.num_train_timesteps - 1 - index for index in indices])
    return scheduler.sigmas[indices].double(), scheduler.timesteps[indices], ours


def write_samples(model: Opened, folder: Path, shape: tuple[int, ...], count: int = 6) -> Path:
    """Shards of random latents with conditions of random captions."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(26, (count, 5), generator=generator).tolist()
    captions = ["".join(string.ascii_lowercase[letter] for letter in word) for word in letters]
    conditions, fields = model.encoded(captions), []
    for row, caption in enumerate(captions):
        latent = torch.randn(shape, generator=generator)
        arrays = {f"{name}.npy": npy_bytes(array[row : row + 1].numpy()) for name, array in conditions.items()}
        text = conditions["text"][row : row + 1].numpy()
        fields.append(encode_sample(f"sample-{row}", latent.numpy(), text, {"captions": [caption]}) | arrays)
    write_shards(fields, folder, samples_per_shard=3)
    return folder


def chosen_of(names: Callable[[str], bool], network: nn.Module) -> set[str]:
    """Names of the Linear layers for which something holds."""
    return {name for name, part in network.named_modules() if isinstance(part, nn.Linear) and names(name)}


def config_of(folder: Path, part: str) -> dict[str, Any]:
    """The config of a part of a pipeline."""
    return dict(json.loads((folder / part / "config.json").read_bytes()))
