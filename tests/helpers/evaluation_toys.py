"""Toys for retraining: a training config that takes a second, queries that say how they were made, score tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from command_toys import UNET
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import nn
from toys import LATENT, ToyDenoiser, ToyObjective, toy_fields, toy_shards

from lightning_unlearn.data.samples import Sample, SampleBatch, ViewBatch, decode_sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.evaluation import Outcome, Run, Study, Training
from lightning_unlearn.scores.files import RUN_FILE, run_digest, write_shard_scores
from lightning_unlearn.scores.rules import Reduced

KEYS = [f"sample-{number:05d}" for number in range(12)]
QUERIES = [f"query-{number:05d}" for number in range(3)]


def query_fields(number: int, **about: Any) -> dict[str, Any]:
    """A random picture in [-1, 1] as a query; its json says how it was made, or what is given."""
    how = about or {"seed": number, "steps": 2, "clipped": True}
    made = decode_sample(toy_fields(1000 + number))
    picture, text = made.latent.tanh().numpy(), made.text.numpy()
    return encode_sample(f"query-{number:05d}", picture, text, {"captions": ["a query"], **how})


def queries(count: int = 3, **about: Any) -> list[Sample]:
    """Such queries, decoded."""
    return [decode_sample(query_fields(number, **about)) for number in range(count)]


def toy_folder(folder: Path) -> Path:
    """A folder with ``train`` (12 samples in 3 shards), ``queries`` and a training config, ``toy.yaml``."""
    toy_shards(folder / "train", 12, 4)
    write_shards([query_fields(number) for number in range(3)], folder / "queries")
    write_config(folder / "toy.yaml", toy_config(folder))
    return folder


def toy_config(folder: Path) -> dict[str, Any]:
    """Three steps of a tiny UNet."""
    return {
        "model": {
            "class_path": "DiffusionModule",
            "init_args": {"network": UNET, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}},
        },
        "data": {
            "class_path": "TrainingDataModule",
            "init_args": {"shards": str(folder / "train"), "batch_size": 4, "samples_per_epoch": 12, "cache": True},
        },
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3},
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a YAML file."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def write_scores(
    folder: Path, scores: NDArray[np.float64], keys: Sequence[str] = KEYS, queries: Sequence[str] = QUERIES
) -> Path:
    """A run's folder with a score table ``(N, Q)``."""
    fingerprints = {"method": "invented"}
    folder.mkdir(parents=True)
    content = {"fingerprints": fingerprints, "shards": {"all": {"url": "all.tar", "version": ""}}}
    (folder / RUN_FILE).write_text(json.dumps(content))
    reduced = Reduced(torch.ones(len(keys)), torch.from_numpy(scores).float())
    write_shard_scores(folder, "all", keys, reduced, queries, run_digest(fingerprints))
    return folder


class Own(LightningModule):
    """Somebody's own module: other names, a loss of its own, manual optimization; it notes the keys that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleDict({"denoiser": ToyDenoiser(int(torch.randint(1000, ())))})
        self.loss = ToyObjective()
        self.seen: list[str] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> None:
        """One step of plain gradient descent."""
        self.seen += batch.keys
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        timesteps = torch.randint(0, 10, (len(batch),))
        noise = torch.randn(len(batch), *LATENT)
        views = ViewBatch(batch.latents, {"text": batch.text[:, 0]})
        self.manual_backward(self.loss(self.parts["denoiser"], views, timesteps, noise).mean())
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Gradient descent."""
        return torch.optim.SGD(self.parameters(), 0.05)


class Plain(Own):
    """The same with the attribute ``objective``."""

    @property
    def objective(self) -> Objective:
        """Its loss."""
        return self.loss


class Builder:
    """Makes trainings of a module as a script would, and keeps the modules."""

    def __init__(self, shards: Path, module: type[LightningModule] = Own, **trainer: Any) -> None:
        self.shards = shards
        self.module = module
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        one = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_model_summary": False}
        self.trainer: dict[str, Any] = {**one, **off, **trainer}
        self.made: list[LightningModule] = []

    def __call__(self, run: Run) -> Training:
        """A training without the run's removed samples."""
        kept = [key for key in KEYS if key not in run.removed]
        data = TrainingDataModule(str(self.shards), 4, run.seed, keys=kept, samples_per_epoch=24, cache=True)
        self.made.append(self.module())
        return Training(self.made[-1], data, Trainer(**self.trainer))


def finish(study: Study, run: Run, losses: Sequence[float], **measures: Sequence[float]) -> None:
    """Write invented numbers of a run, one a query."""
    outcomes = {
        query: Outcome(loss, [loss] * 10, **{name: values[number] for name, values in measures.items()})
        for number, (query, loss) in enumerate(zip(QUERIES, losses, strict=True))
    }
    study.write(run, outcomes, 1.0, {})


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of each finished model's file in a study."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "models").glob("*.json")}
