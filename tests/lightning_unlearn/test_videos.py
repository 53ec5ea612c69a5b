"""Latents ``(C, F, H, W)`` on the whole way: shards, masks, draws, captured gradients, unlearning, scores."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import random_fisher, trainer
from reference import per_sample_gradients
from torch import Tensor, nn
from toys import grey_png

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.data.samples import Sample, ViewBatch, decode_sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.diffusion.mean_errors import drawn_error, mean_error
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation import prepare
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.parameters import layer_parameters, select_layers

SHAPE = (3, 4, 6, 8)
DIM = 5


class ToyVideoDenoiser(nn.Module):
    """A Conv3d over places and frames, then Linear layers at each of them, with text."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch = nn.Conv3d(SHAPE[0], 6, 3, padding=1)
            self.text = nn.Linear(DIM, 6)
            self.out = nn.Linear(6, SHAPE[0])

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict the noise: ``(B, C, F, H, W)``."""
        hidden = self.patch(noisy).movedim(1, -1)  # (B, F, H, W, 6)
        told = self.text(text).mean(1)[:, None, None, None]
        hidden = torch.tanh(hidden + told) * (1 + timesteps.to(noisy).reshape(-1, 1, 1, 1, 1) / 10)
        out: Tensor = self.out(hidden)
        return out.movedim(-1, 1)


class ToyVideoObjective(Objective):
    """A ten-step schedule: x_t = (1 - s) x0 + s ε, predict ε."""

    num_timesteps = 10
    takes_masks = True

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each view: ``(B,)``."""
        s = ((timesteps + 1) / 11).to(noise).reshape(-1, 1, 1, 1, 1)
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        return mean_error((prediction - noise).square(), batch.mask)


def fields(number: int, **more: Any) -> dict[str, Any]:
    draws = np.random.default_rng(number)
    latent = draws.standard_normal(SHAPE).astype(np.float32)
    text = draws.standard_normal((1 + number % 2, 2, DIM)).astype(np.float32)
    captions = [f"caption {caption} of {number}" for caption in range(len(text))]
    flip = np.ascontiguousarray(latent[..., ::-1])
    return encode_sample(f"video-{number}", latent, text, {"captions": captions}, latent_flip=flip, **more)


def decoded(number: int, **more: Any) -> Sample:
    return decode_sample({"__url__": "videos", **fields(number, **more)})


def test_a_video_is_read_with_the_mask_of_its_places() -> None:
    half = np.repeat([[1.0, 0.0]], 6, 0).repeat(4, 1)
    sample = decoded(1, mask=grey_png(half))
    assert sample.latent.shape == SHAPE
    assert sample.latent_flip is not None
    assert torch.equal(sample.latent_flip, sample.latent.flip(-1))
    assert sample.mask is not None
    assert sample.mask.tolist() == half.tolist()


@pytest.mark.parametrize("dimensions", [2, 5])
def test_other_numbers_of_axes_are_refused(dimensions: int) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2,) * dimensions, np.float32))
    with pytest.raises(InputError, match="must be float16 or float32 with 3 or 4"):
        decode_sample({"__url__": "videos", **fields(1), "latent.npy": stream.getvalue()})


def test_mask_holds_in_all_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, normal = torch.rand(2, 2, *SHAPE, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, *SHAPE[-2:], generator=generator, dtype=torch.float64)
    for row in range(2):
        weights, total, product = 0.0, 0.0, 0.0
        for place in np.ndindex(*SHAPE):
            share = float(mask[row][place[-2:]])
            weights += share
            total += share * float(errors[row][place])
            product += share**0.5 * float(errors[row][place] * normal[row][place])
        assert float(mean_error(errors, mask)[row]) == pytest.approx(total / weights, rel=1e-12)
        assert float(drawn_error(errors, normal, mask)[row]) == pytest.approx(product * (2 / weights) ** 0.5, rel=1e-12)


def test_captured_gradients_are_those_of_each_video() -> None:
    network, objective = ToyVideoDenoiser().double(), ToyVideoObjective()
    samples = [decoded(number) for number in range(3)]
    latents = torch.stack([sample.latent for sample in samples]).double()
    text = torch.stack([sample.text[0] for sample in samples]).double()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = torch.tensor([1, 5, 9])
    layers = select_layers(network, ["text", "out"])

    def loss(rows: slice) -> Tensor:
        return objective(network, ViewBatch(latents[rows], {"text": text[rows]}), timesteps[rows], noise[rows]).sum()

    with GradientCapture(layers, network) as capture:
        loss(slice(3)).backward()
    found = capture.take()
    network.zero_grad()
    expected = per_sample_gradients(lambda row: loss(slice(row, row + 1)), layer_parameters(layers), 3)
    for name, layer in found.items():
        for row in range(3):
            torch.testing.assert_close(layer.weight_gradients()[row], expected[f"{name}.weight"][row])
            torch.testing.assert_close(layer.bias_gradients()[row], expected[f"{name}.bias"][row])


def test_three_dimensional_convolutions_are_left_out_of_all_and_refused_by_name() -> None:
    assert set(select_layers(ToyVideoDenoiser(), "all")) == {"text", "out"}
    with pytest.raises(InputError, match="patch"):
        select_layers(ToyVideoDenoiser(), ["patch"])


def scores(folder: Path, shards: Path, queries: Path, batch_size: int) -> ScoreTable:
    network = ToyVideoDenoiser()
    module = UnlearningModule(
        network,
        ToyVideoObjective(),
        random_fisher(network, "all"),
        "all",
        views=Views(2, flips=True, noise="per_sample"),
        rise_draws=4,
    )
    data = AttributionDataModule(str(shards), str(queries), draws=6, batch_size=batch_size, draw_batch_size=4)
    run = trainer(folder, ScoreWriter(str(folder / "run")))
    run.fit(module, data)
    run.predict(module, data)
    return read_scores(folder / "run")


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """The law, with a region: the same deviations whatever the batch size."""
    write_shards([fields(number) for number in range(7)], tmp_path / "train", samples_per_shard=4)
    half = np.repeat([[1.0, 0.0]], 6, 0).repeat(4, 1)
    write_shards([fields(20), fields(21, mask=grey_png(half))], tmp_path / "queries")
    one, four = (scores(tmp_path / str(size), tmp_path / "train", tmp_path / "queries", size) for size in (1, 4))
    assert one.keys == four.keys
    spread = one.scores.std(0)
    assert (spread > 0).all()
    assert (abs(one.scores - four.scores).max(0) <= 1e-4 * spread).all()


def test_training_takes_mirrored_videos(tmp_path: Path) -> None:
    write_shards([fields(number) for number in range(4)], tmp_path / "train")
    network = ToyVideoDenoiser()
    before = network.out.weight.detach().clone()
    module = DiffusionModule(network, ToyVideoObjective(), flips=True)
    trainer(tmp_path, max_epochs=1).fit(module, TrainingDataModule(str(tmp_path / "train"), batch_size=2))
    assert not torch.equal(before, network.out.weight)


def test_ready_videos_are_packed(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    latents, text = draws.standard_normal((2, *SHAPE)), draws.standard_normal((2, 4, DIM))
    for name, array in (("latents", latents), ("text", text)):
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    (tmp_path / "captions.jsonl").write_text('{"captions": ["one"]}\n{"captions": ["two"]}\n')
    (shard,) = prepare(
        output=str(tmp_path / "shards"),
        latents=str(tmp_path / "latents.npy"),
        text=str(tmp_path / "text.npy"),
        captions=str(tmp_path / "captions.jsonl"),
        dtype="float32",
    )
    for number, sample in enumerate(read_samples(shard)):
        assert np.array_equal(sample.latent, latents[number].astype(np.float32))
