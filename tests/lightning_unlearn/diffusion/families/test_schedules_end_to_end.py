"""From pictures and a pipeline's folder to scores, by the commands alone, for families of noise schedules."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_toys import run
from PIL import Image
from tiny_pipelines import ddpm, dit, hunyuan_dit, kandinsky_2, pixart, stable_diffusion_xl

from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.preparation import prepare
from lightning_unlearn.scores.files import read_scores

COUNT = 6


@dataclass(frozen=True)
class Family:
    """A pipeline, and what `prepare` is told of its pictures."""

    make: Callable[[Path], Path]
    side: int = 16
    said: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "stable_diffusion_xl": Family(stable_diffusion_xl.make),
    "pixart_alpha": Family(pixart.make),
    "pixart_sigma": Family(partial(pixart.make, sigma=True)),
    "hunyuan_dit": Family(hunyuan_dit.make, 64),
    "kandinsky_2": Family(kandinsky_2.make, 16, {"image_states": "states.npy"}),
    "dit": Family(dit.make, 16, {"class_labels": "kind"}),
    "unconditional": Family(ddpm.make),
    "classes": Family(partial(ddpm.make, num_class_embeds=5), 16, {"class_labels": "kind"}),
}


def write_pictures(folder: Path, side: int) -> Path:
    noise = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(COUNT):
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "kind": number % 5, "captions": ["a cat on a mat"[: 2 * number]]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    np.save(folder.parent / "states.npy", noise.standard_normal((COUNT, kandinsky_2.STATE)).astype(np.float32))
    return folder


# A variance, classes, states of pictures and nothing at all; `make families` runs all.
EVERY = [*((name, "all") for name in FAMILIES), ("kandinsky_2", "auto")]
SOME = [("pixart_alpha", "all"), ("classes", "all"), ("kandinsky_2", "auto"), ("unconditional", "all")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "parameters"), EVERY if "EVERY_FAMILY" in os.environ else SOME)
def test_from_pictures_to_scores(tmp_path: Path, name: str, parameters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family = FAMILIES[name]
    pipeline = family.make(tmp_path / "pipeline")
    pictures = write_pictures(tmp_path / "pictures", family.side)
    prepare("train", str(pictures), str(pipeline), size=family.side, missing_caption="empty", **family.said)
    model: dict[str, Any] = {
        "network": str(pipeline),
        "parameters": parameters,
        "rise_draws": 4,
        "fisher": f"{parameters}.safetensors",
        "views": {"timesteps": 2},
        # Random weights have no loss that could be raised so far: a small step of a given size.
        "strategy": {
            "class_path": "Newton",
            "init_args": {
                "alpha": 1e-7,
                "N": COUNT,
                "step_range": {"longest": 1e9, "least_linear": 0.0, "most_others": 1e9},
            },
        },
    }
    data = {"shards": "train", "queries": "train", "query_keys": ["2"], "draws": 4, "batch_size": 3}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "UnlearningModule", "init_args": model},
        "data": {"class_path": "AttributionDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    path = tmp_path / f"{parameters}.yaml"
    path.write_text(yaml.safe_dump(config))
    run("fisher", "--config", path, "--kind", "ekfac", "--passes", "2", "--output", model["fisher"])
    assert load_fisher(model["fisher"]).count > 0
    run("attribute", "--config", path, "--output", tmp_path / f"scores-{parameters}")
    table = read_scores(tmp_path / f"scores-{parameters}")
    assert sorted(table.keys) == [str(number) for number in range(COUNT)]
