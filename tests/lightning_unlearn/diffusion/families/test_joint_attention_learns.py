"""A small network of joint attention that has learned 24 pictures: whoever is unlearned is found first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import random_fisher, trainer
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_unlearn.callbacks import FisherAccumulator, ScoreWriter
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.draws.views import Views, place_timesteps
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies import Newton
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.module import UnlearningModule

PICTURES, STEPS, COPIES = 24, 250, 2
SHAPE, TOKENS, DIM = (3, 8, 8), 4, 16


def made_up() -> tuple[Tensor, Tensor]:
    """Smooth pictures, and the states of a caption for each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(PICTURES, SHAPE[0], 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear").clamp(-1, 1)
    return pictures, torch.randn(PICTURES, TOKENS, DIM, generator=generator)


def learned(objective: FlowMatchingObjective) -> nn.Module:
    """The network after a minute or less of training."""
    from diffusers import SD3Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = SD3Transformer2DModel(
            sample_size=SHAPE[1],
            patch_size=2,
            in_channels=SHAPE[0],
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=DIM,
            caption_projection_dim=32,
            pooled_projection_dim=DIM,
            out_channels=SHAPE[0],
            pos_embed_max_size=SHAPE[1],
            qk_norm="rms_norm",
        )
    pictures, text = (array.repeat(COPIES, *[1] * (array.ndim - 1)) for array in made_up())
    batch = ViewBatch(pictures, {"text": text, "pooled": text.mean(1)})
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    losses = []
    for _ in range(STEPS):
        uniform = torch.rand(len(pictures), generator=generator, dtype=torch.float64)
        timesteps = place_timesteps(uniform, (0.0, 1.0), objective.num_timesteps, objective.density())
        loss = objective(network, batch, timesteps, torch.randn(pictures.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])  # it has learned something
    return network.eval()


@pytest.fixture(scope="module")
def objective() -> FlowMatchingObjective:
    return FlowMatchingObjective({"shift": 3.0}, density="logit_normal")


@pytest.fixture(scope="module")
def network(objective: FlowMatchingObjective) -> nn.Module:
    return learned(objective)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    fields = []
    for number, (picture, text) in enumerate(zip(*made_up(), strict=True)):
        about = {"captions": [f"picture {number}"]}
        pooled = {"pooled.npy": npy_bytes(text.mean(0, keepdim=True).numpy())}
        fields.append(encode_sample(f"picture-{number:02d}", picture.numpy(), text[None].numpy(), about) | pooled)
    write_shards(fields, folder, samples_per_shard=8)
    return folder


@pytest.mark.parametrize("parameters", ["text_kv", "all"])
def test_a_training_picture_finds_itself_first(
    tmp_path: Path, network: nn.Module, objective: FlowMatchingObjective, shards: Path, parameters: str
) -> None:
    fisher = tmp_path / "fisher.safetensors"
    accumulator = FisherAccumulator("network", parameters, "ekfac", str(fisher), eigenvalue_epoch=4)
    passes = trainer(tmp_path, accumulator, max_epochs=8)
    passes.fit(
        FisherPass(network, objective, parameters), TrainingDataModule(str(shards), batch_size=8, every_sample=True)
    )
    module = UnlearningModule(network, objective, str(fisher), parameters, views=Views(8), rise_draws=16)
    keys = [f"picture-{number:02d}" for number in range(0, PICTURES, 4)]
    data = AttributionDataModule(str(shards), str(shards), query_keys=keys, draws=32, batch_size=PICTURES)
    run = trainer(tmp_path, ScoreWriter(str(tmp_path / "run")))
    run.fit(module, data)
    run.predict(module, data)
    table = read_scores(tmp_path / "run")
    for column, key in enumerate(table.queries):
        assert table.keys[int(table.scores[:, column].argmax())] == key


class StopError(RuntimeError):
    pass


class StopAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.batches:
            raise StopError


def test_scores_do_not_depend_on_batches_order_or_a_restart(
    tmp_path: Path, network: nn.Module, objective: FlowMatchingObjective, shards: Path
) -> None:
    """The law, for pooled text, a density of timesteps and noise of each sample's own."""
    fisher = random_fisher(network, "text_kv")
    views = Views(4, noise="per_sample")
    module = UnlearningModule(
        network, objective, fisher, strategy=Newton(target_increase=0.5), views=views, rise_draws=8
    )
    queries: dict[str, Any] = {"query_keys": ["picture-03", "picture-20"], "draws": 16}
    trainer(tmp_path).fit(module, AttributionDataModule(str(shards), str(shards), **queries))
    backwards = tmp_path / "backwards"
    backwards.mkdir()
    names = sorted(path.name for path in shards.glob("*.tar"))
    for new, old in zip(names, reversed(names), strict=True):
        shutil.copy(shards / old, backwards / new)

    def scored(out: str, folder: Path, batch_size: int, *callbacks: Callback) -> ScoreTable:
        data = AttributionDataModule(str(folder), str(shards), batch_size=batch_size, **queries)
        trainer(tmp_path, ScoreWriter(str(tmp_path / out)), *callbacks).predict(module, data)
        return read_scores(tmp_path / out)

    expected = scored("expected", shards, 8)
    with pytest.raises(StopError):
        scored("restarted", shards, 3, StopAfter(4))  # within the second shard
    for found in (
        scored("single", shards, 1),
        scored("odd", shards, 5),
        scored("backwards", backwards, 8),
        scored("restarted", shards, 3),
    ):
        assert found.keys == expected.keys
        assert (abs(found.scores - expected.scores).max(0) <= 1e-4 * expected.scores.std(0)).all()
