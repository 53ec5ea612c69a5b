"""Tiny pipelines with a LoRA and a folder of pictures, as a person has them who asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_forms
import numpy as np
import yaml
from PIL import Image
from tiny_pipelines import flux, stable_diffusion_xl
from torch import nn

PICTURES, SIDE = 4, 16
# Random weights have no loss that could be raised so far: a small step of a given size. Few views and draws.
QUICK: dict[str, Any] = {
    "model": {
        "init_args": {
            "rise_draws": 4,
            "views": {"timesteps": 2},
            "strategy": {
                "class_path": "Newton",
                "init_args": {
                    "alpha": 1e-3,
                    "N": PICTURES,
                    "step_range": {"longest": 1e9, "least_linear": 0.0, "most_others": 1e9},
                },
            },
        }
    },
    "data": {"init_args": {"draws": 4}},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}


def _network(folder: Path, part: str) -> nn.Module:
    from lightning_unlearn.diffusion.loading import load_network

    return load_network(str(folder / part))


def _pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(PICTURES):
        # Not square, so that buckets are another thing than the middle.
        pixels = draws.integers(0, 255, (SIDE, SIDE + 8 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"dog-{number}.png")
        (folder / f"dog-{number}.txt").write_text(f"a dog {'abcd'[number]}")


def write_sdxl(folder: Path) -> list[str]:
    """A kohya user's: SDXL, a LoRA in kohya's form, folders with repeats. The options of ``ask`` that name them."""
    stable_diffusion_xl.make(folder / "sdxl")
    network = _network(folder / "sdxl", "unet")
    names = [name for name in adapter_forms.covered(network) if name.endswith(("to_k", "to_v"))]
    state = adapter_forms.kohya_state(adapter_forms.random_adapter(network, names, rank=2))
    adapter_forms.save(folder / "sdxl_lora.safetensors", state)
    _pictures(folder / "sdxl_train" / "3_sks dog")
    paths = {"pipeline": "sdxl", "adapter": "sdxl_lora.safetensors", "images": "sdxl_train"}
    named = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    buckets = ["--prepare.bucket_step", "2", "--prepare.bucket_shortest", "8", "--prepare.bucket_longest", "32"]
    return [*named, "--like", "kohya", "--size", str(SIDE), *buckets, "--settings", _settings(folder / "sdxl.yaml", {})]


def write_flux(folder: Path) -> list[str]:
    """An ai-toolkit user's: FLUX.1 dev, a LoRA in its form, no header, so that the objective is said."""
    flux.make(folder / "flux")
    network = _network(folder / "flux", "transformer")
    names = [name for name in adapter_forms.covered(network) if name.endswith(("to_k", "to_v"))]
    state = adapter_forms.dotted_state(
        adapter_forms.random_adapter(network, names, rank=2), "transformer.", alpha=False
    )
    adapter_forms.save(folder / "flux_lora.safetensors", state)
    _pictures(folder / "flux_train")
    paths = {"pipeline": "flux", "adapter": "flux_lora.safetensors", "images": "flux_train"}
    named = [word for name, path in paths.items() for word in (f"--{name}", str(folder / path))]
    said = {"class_path": "FlowMatchingObjective", "init_args": {"scheduler": str(folder / "flux"), "guidance": 1.0}}
    return [*named, "--size", str(SIDE), "--settings", _settings(folder / "flux.yaml", {"objective": said})]


def _settings(path: Path, model: dict[str, Any]) -> str:
    content: dict[str, Any] = json.loads(json.dumps(QUICK))
    content["model"]["init_args"] |= model
    path.write_text(yaml.safe_dump(content))
    return str(path)
