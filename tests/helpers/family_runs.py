"""From a pipeline's folder and six pictures to scores, by the commands a user gives, whichever family it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from command_toys import run
from PIL import Image
from tiny_pipelines import (
    aura_flow,
    chroma,
    cog_view_4,
    flux,
    flux_2,
    lumina_2,
    qwen_image,
    sana,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    wan,
    z_image,
)

PICTURES, SIDE = 6, 16


@dataclass(frozen=True)
class Kind:
    """A family, what its files don't say, and the selection that its runs take.

    Attributes:
        make: Saves a tiny pipeline.
        selection: Of weights.
        said: Settings of the objective of a flow.
    """

    make: Callable[[Path], Path]
    selection: str = "attention"
    said: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "stable_diffusion": Kind(stable_diffusion.make, "text_kv"),
    "stable_diffusion_xl": Kind(stable_diffusion_xl.make, "text_kv"),
    "stable_diffusion_3": Kind(stable_diffusion_3.make, "text_kv"),
    "flux_dev": Kind(flux.make, "text_kv", {"guidance": 3.5}),
    "flux_schnell": Kind(partial(flux.make, dev=False), "text_kv"),
    "chroma": Kind(chroma.make, "text_kv", {"density": "uniform"}),
    "flux_2_dev": Kind(flux_2.make, "text_kv", {"guidance": 3.5}),
    "flux_2_klein": Kind(partial(flux_2.make, dev=False), "text_kv"),
    "aura_flow": Kind(aura_flow.make, "text_kv", {"density": "logit_normal"}),
    "sana": Kind(sana.make, "text_kv"),
    "qwen_image": Kind(qwen_image.make, "text_kv"),
    "lumina_2": Kind(lumina_2.make, said={"density": "uniform"}),
    "z_image": Kind(z_image.make),
    "cog_view_4": Kind(cog_view_4.make, said={"density": "uniform", "shift": 1.0}),
    "wan": Kind(wan.make, "text_kv", {"density": "uniform"}),
}
"""By the names of their tiny pipelines."""


def write_pictures(folder: Path) -> Path:
    """Six pictures of noise, each with a caption of its own length."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    rows = []
    for number in range(PICTURES):
        pixels = draws.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture-{number}.png")
        rows.append(json.dumps({"file_name": f"picture-{number}.png", "caption": "a b"[: 1 + number % 3] + " cat"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def write_run(kind: Kind, pipeline: Path, shards: Path, fisher: Path, selection: str) -> Path:
    """The YAML that a user would write for it."""
    model: dict[str, Any] = {
        "network": str(pipeline),
        "parameters": selection,
        "rise_draws": 4,
        "fisher": str(fisher),
        "views": {"timesteps": 2},
        # Random weights have no loss that could be raised so far: a small step of a given size.
        "strategy": {
            "class_path": "Newton",
            "init_args": {
                "alpha": 1e-3,
                "N": PICTURES,
                "step_range": {"longest": 1e9, "least_linear": 0.0, "most_others": 1e9},
            },
        },
    }
    if kind.said:
        said = {"scheduler": str(pipeline), **kind.said}
        model["objective"] = {"class_path": "FlowMatchingObjective", "init_args": said}
    data = {"shards": str(shards), "queries": str(shards), "query_keys": ["picture-2"], "draws": 4, "batch_size": 3}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "UnlearningModule", "init_args": model},
        "data": {"class_path": "AttributionDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    path = fisher.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def prepared(kind: Kind, folder: Path) -> tuple[Path, Path]:
    """A tiny pipeline's folder, and shards of the pictures that ``prepare`` made with it."""
    pipeline = kind.make(folder / "pipeline")
    pictures, shards = write_pictures(folder / "pictures"), folder / "shards"
    numbers = {"--size": SIDE, "--samples_per_shard": 3, "--device": "cpu"}
    options = [str(part) for pair in numbers.items() for part in pair]
    run("prepare", "--images", pictures, "--pipeline", pipeline, "--output", shards, *options)
    return pipeline, shards


def attributed(config: Path, fisher: Path, output: Path) -> None:
    """A Fisher, then unlearning and D-TRAK, each to a table in a folder of its own."""
    run("fisher", "--config", config, "--kind", "diagonal", "--passes", "1", "--output", fisher)
    run("attribute", "--config", config, "--output", output / "unlearning")
    run("attribute", "--config", config, "--output", output / "d_trak", "--method", "DTRAK")
