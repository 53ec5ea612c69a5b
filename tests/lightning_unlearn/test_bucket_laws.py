"""The law of deviations where a run holds several latent shapes and text of different length; captions that weigh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from attribution_runs import decoded, score, toy_deltas, toy_model, toy_module, trainer
from lightning.pytorch import Callback
from toys import DIM, TOKENS, ToyDenoiser, ToyObjective, tiny_unet

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.diffusion.families.unet import UNetFamily
from lightning_unlearn.draws.unlearning_draws import DrawBatch, real_batches
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.rules import reduce_losses
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.fixed_draws import draw_losses
from lightning_unlearn.weights.deltas import NetworkLoss

SHAPES = ((3, 8, 8), (3, 4, 12), (3, 12, 8))
SAMPLES = 13
VIEWS = Views(2, noise="per_sample")
TOLERANCE = 1e-4  # of the standard deviation over samples, as in test_laws


def fields(number: int, *, prefix: str = "sample", masked: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(number + 1000 * (prefix != "sample"))
    captions = 1 + number % 3
    tokens = 3 + number % 4 if masked else TOKENS
    conditions = {"text": rng.standard_normal((captions, tokens, DIM)).astype(np.float32)}
    if masked:
        conditions["text_mask"] = np.ones((captions, tokens), np.float32)
    latent = rng.standard_normal(SHAPES[number % 5 % 3]).astype(np.float32)
    told = {"captions": [f"caption {c}" for c in range(captions)]}
    return encode_sample(f"{prefix}-{number:05d}", latent, conditions, told)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    write_shards([fields(number) for number in range(SAMPLES)], folder / "train", samples_per_shard=6)
    return folder


def scored(folder: Path, out: Path, *callbacks: Callback, **data: Any) -> ScoreTable:
    module = AttributionDataModule(str(folder), str(toy_model() / "queries"), **data)
    score(toy_module(toy_model(), views=VIEWS), module, out, toy_deltas(), *callbacks)
    return read_scores(out)


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    return scored(shards / "train", tmp_path_factory.mktemp("expected") / "out", batch_size=1)


def assert_same(found: ScoreTable, expected: ScoreTable) -> None:
    assert found.keys == expected.keys
    assert (abs(found.scores - expected.scores).max(0) <= TOLERANCE * expected.scores.std(0)).all()


@pytest.mark.parametrize("data", [{"batch_size": 4}, {"batch_size": 64}, {"batch_size": 3, "num_workers": 2}])
def test_scores_of_a_bucketed_set_do_not_depend_on_batches_or_workers(
    shards: Path, expected: ScoreTable, tmp_path: Path, data: dict[str, Any]
) -> None:
    assert len(expected.keys) == SAMPLES
    assert (expected.scores.std(0) > 1e-3).all()
    assert_same(scored(shards / "train", tmp_path / "out", **data), expected)


def test_scores_of_a_bucketed_set_do_not_depend_on_order_or_cut(expected: ScoreTable, tmp_path: Path) -> None:
    order = np.random.default_rng(3).permutation(SAMPLES).tolist()
    write_shards([fields(number) for number in order], tmp_path / "cut", samples_per_shard=4)
    assert_same(scored(tmp_path / "cut", tmp_path / "out", batch_size=5), expected)


def test_rows_of_a_shards_file_are_in_the_shards_order_whatever_the_batch_size(shards: Path, tmp_path: Path) -> None:
    for batch_size in (2, 64):
        out = tmp_path / str(batch_size)
        scored(shards / "train", out, batch_size=batch_size)
        files = sorted((out / "scores").glob("*.parquet"))
        keys = [pq.read_table(path)["key"].to_pylist() for path in files]
        assert keys == [[f"sample-{n:05d}" for n in range(at, min(at + 6, SAMPLES))] for at in (0, 6, 12)]


class StopError(RuntimeError):
    pass


class StopAfter(Callback):
    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 4:
            raise StopError


def test_a_bucketed_run_that_is_stopped_goes_on(shards: Path, expected: ScoreTable, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        scored(shards / "train", tmp_path / "out", StopAfter(), batch_size=2)
    assert_same(scored(shards / "train", tmp_path / "out", batch_size=3), expected)


class Masked(ToyDenoiser):
    """Averages tokens that its mask counts."""

    def forward(self, noisy: Any, timesteps: Any, text: Any, mask: Any = None) -> Any:
        """Predict the noise."""
        states = torch.tanh(self.text(text))
        mean = (states * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        hidden = torch.tanh(self.conv_in(noisy) + mean[:, :, None, None]) * (
            1 + timesteps.to(noisy)[:, None, None, None] / 10
        )
        return self.conv_out(hidden)


class MaskedObjective(ToyObjective):
    """The loss of a network that is given a mask of its text."""

    def __call__(self, network: Any, batch: ViewBatch, timesteps: Any, noise: Any) -> Any:
        """Mean squared error of each view."""
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        noisy = (1 - s) * batch.latents + s * noise
        prediction = network(noisy, timesteps, batch.text, batch.conditions["text_mask"])
        return (prediction - noise).square().flatten(1).mean(1)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_text_of_different_length_goes_in_one_batch_and_changes_no_loss(tmp_path: Path, batch_size: int) -> None:
    write_shards([fields(number, masked=True) for number in range(SAMPLES)], tmp_path / "train")
    write_shards([fields(1, prefix="query", masked=True)], tmp_path / "queries")
    views, loss = Views(2, noise="per_sample"), NetworkLoss(Masked().double(), MaskedObjective())
    found: dict[int, dict[str, list[float]]] = {}
    for size in (1, batch_size):
        data = AttributionDataModule(str(tmp_path / "train"), str(tmp_path / "queries"), batch_size=size)
        data.setup("predict")
        found[size] = {}
        for batch in data.predict_dataloader():
            if size == 64:
                assert len(batch.latents) > 1 or batch.latents.shape[1:] not in [(3, 8, 8)]
            for view in views.of(batch, 10):
                losses = loss(view.batch.to(torch.device("cpu"), torch.float64), view.timesteps, view.noise.double())
                for row, value in zip(view.rows.tolist(), losses.tolist(), strict=True):
                    found[size].setdefault(batch.keys[row], []).append(value)
    assert found[1].keys() == found[batch_size].keys()
    for key, losses in found[1].items():
        # Sums over at most 288 places and 6 tokens, in float64.
        np.testing.assert_allclose(found[batch_size][key], losses, rtol=1e-12)


# ---------------------------------------------------------------------------------- unlearning


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_real_draws_of_several_forms_are_the_same_on_any_number_of_ranks(world_size: int, batch_size: int) -> None:
    """As many batches on every rank, and each draw's loss is that of the draw alone."""
    samples = [decoded(fields(number, masked=True)) for number in range(10)]
    loss = NetworkLoss(Masked().double(), MaskedObjective())

    def losses(batches: list[DrawBatch]) -> dict[int, float]:
        found = {}
        for part in (part for batch in batches for part in batch.parts()):
            values = draw_losses(loss, part, {}, "real", 0)
            for number, value, weight in zip(part.numbers, values.tolist(), part.weights.tolist(), strict=True):
                if weight:
                    assert number not in found
                    found[number] = value
        return found

    alone = losses(real_batches("real", 0, samples, 20, 0, 1, 1))
    ranks = [real_batches("real", 0, samples, 20, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    together: dict[int, float] = {}
    for batches in ranks:
        assert max(sum(len(part.numbers) for part in batch.parts()) for batch in batches) <= batch_size
        together |= losses(batches)
    assert together.keys() == alone.keys() == set(range(20, 30))
    for number, value in alone.items():
        assert together[number] == pytest.approx(value, rel=1e-12)


def test_queries_of_several_shapes_are_unlearned_in_one_run(shards: Path, tmp_path: Path) -> None:
    write_shards([fields(number, prefix="query") for number in range(3)], tmp_path / "queries")
    # A step of a given size, since a search measures many losses.
    module = toy_module(toy_model(), Newton(alpha=0.01, N=SAMPLES), VIEWS)
    data = AttributionDataModule(str(shards / "train"), str(tmp_path / "queries"), draws=8, draw_batch_size=4)
    run = trainer(tmp_path)
    run.fit(module, data)
    assert len({tuple(query.latent.shape) for query in data.queries}) == 3
    run.save_checkpoint(tmp_path / "deltas.ckpt")
    score(module, data, tmp_path / "out", tmp_path / "deltas.ckpt")
    assert read_scores(tmp_path / "out").scores.shape == (SAMPLES, 3)


# ---------------------------------------------------------------------------------- captions that weigh


def test_a_deviation_is_the_mean_over_captions_by_their_shares(tmp_path: Path) -> None:
    """Against a loop in float64 over captions that stand there as often as they weigh."""
    generator = torch.Generator().manual_seed(0)
    base, risen = torch.rand(2, 2, 3, 2, 3, 4, generator=generator, dtype=torch.float64).unbind(0)
    base, risen = base[0], risen  # (B, flips, captions, draws), (Q, B, flips, captions, draws)
    base[1, :, 2], risen[:, 1, :, 2] = torch.nan, torch.nan  # the second sample has two captions
    counts = [[3, 0, 1], [1, 4], [2, 2, 2]]
    shares = [[count / sum(row) for count in row] for row in counts]
    found = reduce_losses(base, risen, "ratio", "max", 1, shares, keep_deviations=True)
    for sample, row in enumerate(counts):
        repeated = [caption for caption, count in enumerate(row) for _ in range(count)]
        for query in range(2):
            sides = []
            for flip in range(2):
                values = []
                for caption in repeated:
                    for draw in range(4):
                        before, after = base[sample, flip, caption, draw], risen[query, sample, flip, caption, draw]
                        values.append(float((after - before) / (after + before)))
                sides.append(sum(values) / len(values))
            assert float(found.scores[sample, query]) == pytest.approx(max(sides), rel=1e-12)
        losses = [
            float(base[sample, flip, caption, draw]) for flip in range(2) for caption in repeated for draw in range(4)
        ]
        assert float(found.base_losses[sample]) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_scores_follow_the_shares_of_captions_in_the_shards(tmp_path: Path) -> None:
    """With all weight on one caption, the score is that of a sample with this caption alone."""
    several = fields(2)
    told = json.loads(several["json"])
    weighed = {**several, "json": json.dumps({**told, "caption_weights": [1, 0, 0]}).encode()}
    sample = decoded(several)
    alone = encode_sample("sample-00002", sample.latent.numpy(), sample.text[:1].numpy(), {"captions": ["caption 0"]})
    scores = {}
    for name, one in (("weighed", weighed), ("alone", alone), ("several", several)):
        write_shards([one], tmp_path / name)
        scores[name] = scored(tmp_path / name, tmp_path / f"out-{name}").scores
    np.testing.assert_allclose(scores["weighed"], scores["alone"], rtol=1e-6)
    assert not np.allclose(scores["several"], scores["alone"], rtol=1e-3)


def test_a_network_without_a_mask_for_its_text_refuses_text_that_has_one() -> None:
    """Samples of different length are padded in a batch, and padding would be taken for text."""
    batch = collate_samples("shard", [decoded(fields(number, masked=True)) for number in (0, 5)])
    views = batch.views(torch.arange(2), torch.zeros(2).long())
    with pytest.raises(InputError, match=r"'text_mask', which tells text from padding.* takes none"):
        UNetFamily().check_batch(tiny_unet(), views.latents, views)
