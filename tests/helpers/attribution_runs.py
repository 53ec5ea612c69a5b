"""Unlearning and scoring of toys: in this process, or, as a script with a JSON file of jobs, in others."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from reference import per_sample_gradients, sums_of_squares
from torch import Tensor, nn
from toys import DIM, LATENT, TOKENS, ToyDenoiser, ToyObjective, done_shards, tiny_unet, told

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.command_line.race_command import RaceRun
from lightning_unlearn.command_line.scoring_words import Announcer
from lightning_unlearn.data.samples import Sample, ViewBatch, decode_sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.fisher import DiagonalFisher
from lightning_unlearn.scores.racing import Race
from lightning_unlearn.strategies import STRATEGIES, Strategy
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_parameters, layer_specs, select_layers

SAMPLES = 24
# Both numbers of captions and of samples in a shard differ, as they do in real data.
SAMPLES_PER_SHARD = 5
# Of those that the tiny UNet learns, as many are scored: each takes it a sixth of a second.
SCORED = 14
# Linear and Conv2d layers, with and without bias. With queries and keys as well, so small a network would have its
# attention saturated before its loss rises by a tenth, and a second step would multiply the first one's rounding.
CHOSEN = ["conv_in", "conv_out", r".*attn2\.to_(v|out\.0)"]


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints and saves nothing."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def ragged_fields(numbers: Any = range(SAMPLES), prefix: str = "sample") -> list[dict[str, Any]]:
    """Samples with one to three captions and flips, whose pictures follow from their captions, so that text matters."""
    means = np.random.default_rng(1234).standard_normal((TOKENS, DIM, *LATENT)) / np.sqrt(TOKENS * DIM)
    fields = []
    for number in numbers:
        rng = np.random.default_rng(number + 1000 * (prefix != "sample"))
        meaning = rng.standard_normal((TOKENS, DIM))
        latent = np.einsum("td,tdchw->chw", meaning, means) + 0.1 * rng.standard_normal(LATENT)
        text = meaning + 0.1 * rng.standard_normal((1 + number % 3, TOKENS, DIM))
        captions = [f"caption {c} of {number}" for c in range(len(text))]
        arrays = [array.astype(np.float32) for array in (latent, text, np.ascontiguousarray(latent[..., ::-1]))]
        fields.append(
            encode_sample(f"{prefix}-{number:05d}", arrays[0], arrays[1], {"captions": captions}, latent_flip=arrays[2])
        )
    return fields


def loud_fields(times: float) -> list[dict[str, Any]]:
    """The samples that are scored, their pictures so many times as far from zero: the model knows them less well."""
    louder = []
    for sample in map(decoded, ragged_fields(range(SCORED))):
        assert sample.latent_flip is not None
        latent, flip = (times * picture.numpy() for picture in (sample.latent, sample.latent_flip))
        louder.append(encode_sample(sample.key, latent, sample.text.numpy(), sample.metadata, latent_flip=flip))
    return louder


def grouped_fields() -> list[dict[str, Any]]:
    """Five queries of two artists, and a part of one of them."""
    half = np.repeat([1.0, 0.0], LATENT[1] // 2)[:, None].repeat(LATENT[2], 1)
    return [
        told(fields, half if number == 3 else None, artist="Marc" if number % 2 else "Klee")
        for number, fields in enumerate(ragged_fields(range(1, 6), prefix="query"))
    ]


def decoded(fields: Mapping[str, Any]) -> Sample:
    """A sample out of its fields."""
    return decode_sample({"__url__": "toys", **fields})


def random_fisher(network: nn.Module, parameters: str | list[str]) -> DiagonalFisher:
    """A Fisher of a network's own weights, with values of any size between 0.1 and 1.1."""
    layers = select_layers(network, parameters)
    fisher = DiagonalFisher(layer_specs(layers))
    generator = torch.Generator().manual_seed(5)
    kept = layer_parameters(layers)
    fisher.load_tensors(
        {name: (torch.rand(value.shape, generator=generator) + 0.1).to(value) * 3 for name, value in kept.items()}
    )
    fisher.count = 3
    fisher.weights = {name: value.detach().clone() for name, value in kept.items()}
    return fisher


def exact_fisher(
    network: nn.Module, objective: Objective, samples: list[Sample], parameters: str | list[str]
) -> DiagonalFisher:
    """The diagonal Fisher over one view of each sample, one backward pass a sample."""
    layers = select_layers(network, parameters)
    kept = layer_parameters(layers)
    dtype = next(iter(kept.values())).dtype
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn(sample.latent.shape, generator=generator).to(dtype) for sample in samples]
    timesteps = torch.randint(0, objective.num_timesteps, (len(samples),), generator=generator)

    def loss(number: int) -> Tensor:
        sample = samples[number]
        batch = ViewBatch(sample.latent[None].to(dtype), {"text": sample.text[:1].to(dtype)})
        return objective(network, batch, timesteps[number : number + 1], noises[number][None])[0]

    required = {name: value.requires_grad for name, value in kept.items()}
    for value in kept.values():
        value.requires_grad_(True)
    sums = sums_of_squares(per_sample_gradients(loss, kept, len(samples)))
    for name, value in kept.items():
        value.requires_grad_(required[name])
    fisher = DiagonalFisher(layer_specs(layers))
    fisher.load_tensors(sums)
    fisher.count = len(samples)
    fisher.weights = {name: value.detach().clone() for name, value in kept.items()}
    return fisher


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def toy_model() -> Path:
    """A folder with shards, queries, a tiny UNet that learned a little of them, and its Fisher; made once a process."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="attribution-toys-"))
    folder = Path(_FOLDERS[-1].name)
    write_shards(ragged_fields(range(SCORED)), folder / "train", samples_per_shard=SAMPLES_PER_SHARD)
    write_shards(ragged_fields(range(1, 3), prefix="query"), folder / "queries")
    write_shards(grouped_fields(), folder / "grouped", samples_per_shard=2)
    samples = [decoded(fields) for fields in ragged_fields()]
    network, objective = tiny_unet(), DenoisingObjective()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        rows = torch.randint(0, SAMPLES, (8,), generator=generator).tolist()
        batch = ViewBatch(
            torch.stack([samples[row].latent for row in rows]),
            {"text": torch.stack([samples[row].text[0] for row in rows])},
        )
        timesteps = torch.randint(0, objective.num_timesteps, (8,), generator=generator)
        loss = objective(network, batch, timesteps, torch.randn(batch.latents.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "network.pt")
    exact_fisher(network, objective, samples, CHOSEN).save(folder / "fisher.safetensors")
    return folder


@functools.cache
def toy_deltas() -> Path:
    """The deltas of :func:`toy_model`'s queries, unlearned in one process to a rise of a tenth."""
    folder = toy_model()
    unlearn(toy_module(folder), toy_data(folder, draws=31), folder / "deltas.ckpt")
    return folder / "deltas.ckpt"


def toy_module(
    folder: Path, strategy: Strategy | None = None, views: Views | None = None, **settings: Any
) -> UnlearningModule:
    """The module of :func:`toy_model`."""
    network = tiny_unet()
    network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    settings = {
        "views": views or Views(2, flips=True, noise="per_sample"),
        "rise_draws": 16,
        "parameters": CHOSEN,
        **settings,
    }
    return UnlearningModule(network, fisher=str(folder / "fisher.safetensors"), strategy=strategy, **settings)


class PartlyUsed(ToyDenoiser):
    """Has a layer that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.unused = nn.Linear(2, 2)


def partly_used_module(strategy: Strategy | None = None, views: Views | None = None) -> UnlearningModule:
    """A module that also unlearns a layer that no loss depends on."""
    network = PartlyUsed()
    return UnlearningModule(network, ToyObjective(), random_fisher(network, "all"), "all", strategy, views)


def toy_data(folder: Path, shards: str = "train", queries: str = "queries", **settings: Any) -> AttributionDataModule:
    """The datamodule of :func:`toy_model`, with draws that nothing divides."""
    defaults: dict[str, Any] = {"draws": 100, "draw_batch_size": 7, "batch_size": 4}
    return AttributionDataModule(str(folder / shards), str(folder / queries), **{**defaults, **settings})


def unlearn(
    module: UnlearningModule, data: AttributionDataModule, checkpoint: Path | None = None, **settings: Any
) -> Trainer:
    """Run fit, and keep its checkpoint."""
    found = trainer(data_folder(data), **settings)
    found.fit(module, data)
    if checkpoint is not None:
        found.save_checkpoint(checkpoint)
    return found


def score(
    module: UnlearningModule,
    data: AttributionDataModule,
    out: Path,
    deltas: Path | None,
    *callbacks: Callback,
    writer: Mapping[str, Any] | None = None,
    **settings: Any,
) -> ScoreWriter:
    """Run predict with a ScoreWriter."""
    score_writer = ScoreWriter(str(out), **(writer or {}))
    found = trainer(data_folder(data), score_writer, *callbacks, **settings)
    found.predict(module, data, ckpt_path=None if deltas is None else str(deltas), weights_only=True)
    return score_writer


def data_folder(data: AttributionDataModule) -> Path:
    """Where Lightning may write."""
    return Path(str(data.query_patterns)).parent


def race(
    module: UnlearningModule,
    data: AttributionDataModule,
    out: Path,
    deltas: Path,
    settings: Mapping[str, Any],
    *callbacks: Callback,
    writer: Mapping[str, Any] | None = None,
    **of_trainer: Any,
) -> None:
    """Run a race of these settings."""
    score_writer = ScoreWriter(str(out), **(writer or {}))
    found = trainer(data_folder(data), score_writer, Announcer(out), *callbacks, **of_trainer)
    RaceRun(Race(**settings), module, data, found, out, deltas).run()


class Stall(Callback):
    """Stops for good once some shards are written, so that the process can be killed there."""

    def __init__(self, out: Path, shards: int) -> None:
        self.out, self.shards = out, shards

    def on_predict_batch_start(self, *_: Any) -> None:
        if len(done_shards(self.out)) >= self.shards:
            (self.out / "stalled").touch()
            time.sleep(600)


def strategy_of(settings: Mapping[str, Any]) -> Strategy:
    """A job's strategy: ``name`` and arguments, of which ``optimizer`` is torch's ``name`` and its arguments."""
    arguments = {"name": "newton", **settings}
    if "optimizer" in arguments:
        of_optimizer = dict(arguments["optimizer"])
        arguments["optimizer"] = functools.partial(getattr(torch.optim, of_optimizer.pop("name")), **of_optimizer)
    return STRATEGIES[arguments.pop("name")](**arguments)


def run_jobs(jobs: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Run fits and predicts one after the other; each rank leaves a JSON file of what it saw."""
    for job in jobs:
        folder, out = Path(job["folder"]), Path(job["out"])
        data = toy_data(folder, job.get("shards", "train"), **job.get("data", {}))
        strategy = strategy_of(job.get("strategy", {}))
        module = toy_module(folder, strategy) if "network" not in job else partly_used_module(strategy)
        seen: dict[str, Any] = {}
        if job["kind"] == "fit":
            unlearn(module, data, out / "deltas.ckpt", **settings)
            assert module.deltas is not None
            seen = {"deltas": tensors_digest(module.deltas.named()), "results": module.results}
        elif job["kind"] == "race":
            module.views = Views(**job["views"])
            race(module, data, out, Path(job["deltas"]), job["race"], **settings)
        else:
            callbacks = [Stall(out, job["stall"])] if "stall" in job else []
            writer = score(module, data, out, Path(job["deltas"]), *callbacks, **settings)
            seen = {"scored": writer.scored, "failures": writer.failures}
        seen |= {"steps": module.trainer.global_step, "world_size": module.trainer.world_size}
        (out / f"rank-{module.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[1]).read_text())
    run_jobs(request["jobs"], request["trainer"])
