"""Each family from six pictures and its pipeline's folder to a table of scores, and through a training of its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from attribution_runs import trainer
from family_runs import KINDS, PICTURES, attributed, prepared, write_run

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.weights.parameters import layer_specs, select_layers

# One of each kind of network and of conditions; `make families` runs all, which takes some minutes.
SOME = ("stable_diffusion_xl", "flux_dev", "sana", "z_image", "wan")


@pytest.mark.parametrize("name", KINDS if "EVERY_FAMILY" in os.environ else SOME)
def test_from_pictures_to_scores(tmp_path: Path, name: str) -> None:
    kind, fisher = KINDS[name], tmp_path / "fisher.safetensors"
    pipeline, shards = prepared(kind, tmp_path)
    attributed(write_run(kind, pipeline, shards, fisher, kind.selection), fisher, tmp_path)
    assert load_fisher(str(fisher)).count == PICTURES
    for method in ("unlearning", "d_trak"):
        table = read_scores(tmp_path / method)
        assert sorted(table.keys) == [f"picture-{number}" for number in range(PICTURES)]
        assert np.isfinite(table.scores).all()
        assert table.scores.std() > 0
    _fisher_of_a_training(tmp_path, name, pipeline, shards)


def _fisher_of_a_training(folder: Path, name: str, pipeline: Path, shards: Path) -> None:
    """The callback counts every sample of a training, in just the layers that ``all`` names."""
    kind, path = KINDS[name], folder / "training.safetensors"
    objective = FlowMatchingObjective(str(pipeline), **kind.said) if kind.said else None
    module = DiffusionModule(str(pipeline), objective)
    specs = layer_specs(select_layers(load_network(str(pipeline)), "all"))
    accumulator = FisherAccumulator("network", "all", "diagonal", str(path))
    data = TrainingDataModule(str(shards), batch_size=2)
    trainer(folder, accumulator, max_epochs=1).fit(module, data)
    fisher = load_fisher(str(path))
    assert fisher.count == PICTURES
    assert set(fisher.layers) == set(specs)
