"""Toy indexes: a tiny model's, by a real predict; and as a script with a JSON file of jobs, in other processes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from attribution_runs import ragged_fields, trainer
from lightning.pytorch import Callback
from toys import ToyDenoiser, ToyObjective

from lightning_unlearn.callbacks import IndexWriter
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.draws.views import Views
from lightning_unlearn.index import IndexPass
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection

SAMPLES, SAMPLES_PER_SHARD = 11, 4


def toy_index_module(
    seed: int = 0, views: Views | None = None, parameters: str | list[str] = "all"
) -> UnlearningModule:
    """A small network with Linear and Conv2d layers, of which an index is made."""
    views = views or Views(2, flips=True, noise="per_sample")
    return UnlearningModule(ToyDenoiser(seed), ToyObjective(), parameters=parameters, views=views)


def toy_index_data(folder: Path, samples: int = SAMPLES, **settings: Any) -> AttributionDataModule:
    """Shards of samples with one to three captions, and two queries; made if they are not there."""
    shards = folder / f"train-{samples}"
    if not shards.is_dir():
        write_shards(ragged_fields(range(samples)), shards, samples_per_shard=SAMPLES_PER_SHARD)
        write_shards(ragged_fields(range(1, 3), prefix="query"), folder / "queries")
    return AttributionDataModule(str(shards), str(folder / "queries"), **{"batch_size": 3, **settings})


def make_index(
    module: UnlearningModule,
    data: AttributionDataModule,
    out: Path,
    *callbacks: Callback,
    side: int = 3,
    seed: int = 0,
    **settings: Any,
) -> IndexWriter:
    """Run predict with an IndexWriter."""
    writer = IndexWriter(str(out))
    found = trainer(out.parent, writer, *callbacks, inference_mode=False, **settings)
    found.predict(IndexPass(module, Projection(layer_specs(module.layers), side, seed)), data)
    return writer


class Stall(Callback):
    """Stops for good once some shards are kept, so that the process can be killed there."""

    def __init__(self, out: Path, shards: int) -> None:
        self.out, self.shards = out, shards

    def on_predict_batch_start(self, *_: Any) -> None:
        if len(list((self.out / "shards").glob("*.safetensors"))) >= self.shards:
            (self.out / "stalled").touch()
            time.sleep(600)


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    where = Path(job["out"])
    stall = [Stall(where, job["stall"])] if "stall" in job else []
    kept = make_index(toy_index_module(), toy_index_data(Path(job["folder"])), where, *stall, **job["trainer"])
    (where / f"kept-{kept.kept}-{time.time_ns()}").touch()
