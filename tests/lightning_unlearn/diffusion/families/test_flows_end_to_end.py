"""From a pipeline's folder and shards to scores, by the commands alone, for each family of flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_toys import run
from flow_pipelines import opened, write_samples
from tiny_pipelines import aura_flow, chroma, flux, flux_2, stable_diffusion_3

from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.run_record import read_run


@dataclass(frozen=True)
class Flow:
    """A family of flows, and what its files don't say."""

    make: Callable[[Path], Path]
    shape: tuple[int, int, int]
    said: dict[str, Any] = field(default_factory=dict)


FLOWS = {
    "stable_diffusion_3": Flow(stable_diffusion_3.make, (4, 8, 16)),
    "flux_dev": Flow(flux.make, (4, 8, 16), {"guidance": 3.5}),
    "flux_schnell": Flow(partial(flux.make, dev=False), (4, 8, 16)),
    "chroma": Flow(chroma.make, (4, 8, 16), {"density": "uniform"}),
    "flux_2_dev": Flow(flux_2.make, (16, 4, 8), {"guidance": 3.5}),
    "flux_2_klein": Flow(partial(flux_2.make, dev=False), (16, 4, 8)),
    "aura_flow": Flow(aura_flow.make, (4, 8, 16), {"density": "logit_normal"}),
}


@pytest.mark.parametrize(
    ("name", "parameters"), [*((name, "all") for name in FLOWS), ("stable_diffusion_3", "text_kv")]
)
def test_from_a_pipeline_to_scores(tmp_path: Path, name: str, parameters: str) -> None:
    flow = FLOWS[name]
    pipeline = flow.make(tmp_path / "pipeline")
    train = write_samples(opened(pipeline), tmp_path / "train", flow.shape)
    model: dict[str, Any] = {
        "network": str(pipeline),
        "parameters": parameters,
        "rise_draws": 4,
        "fisher": str(tmp_path / "fisher.safetensors"),
        "views": {"timesteps": 2},
        # Random weights have no loss that could be raised so far: a small step of a given size.
        "strategy": {
            "class_path": "Newton",
            "init_args": {
                "alpha": 1e-7,
                "N": 6,
                "step_range": {"longest": 1e9, "least_linear": 0.0, "most_others": 1e9},
            },
        },
    }
    if flow.said:
        said = {"scheduler": str(pipeline), **flow.said}
        model["objective"] = {"class_path": "FlowMatchingObjective", "init_args": said}
    data = {"shards": str(train), "queries": str(train), "query_keys": ["sample-2"], "draws": 4, "batch_size": 3}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "UnlearningModule", "init_args": model},
        "data": {"class_path": "AttributionDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    run("fisher", "--config", path, "--kind", "ekfac", "--passes", "2", "--output", model["fisher"])
    assert load_fisher(model["fisher"]).count > 0
    run("attribute", "--config", path, "--output", tmp_path / "unlearning")
    run("attribute", "--config", path, "--output", tmp_path / "rival", "--method", "DTRAK")
    for method in ("unlearning", "rival"):
        table = read_scores(tmp_path / method)
        assert sorted(table.keys) == [f"sample-{number}" for number in range(6)]
    about = read_run(tmp_path / "unlearning")
    assert about is not None
    assert "FlowMatchingObjective" in str(about)
