"""Samples of several forms and weights in training: each as often as its weight says, in batches of one form."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import Tensor
from toys import ToyDenoiser, ToyObjective, grey_png, told, toy_fields

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.data.batches import form_of
from lightning_unlearn.data.groups import Group
from lightning_unlearn.data.samples import SampleBatch, ViewBatch, decode_sample
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.datamodules.dealing import Deal, Repeats
from lightning_unlearn.datamodules.real import RealSamples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.datamodules.training_stream import TrainingStream
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import DiagonalFisher, Fisher
from lightning_unlearn.training import DiffusionModule, FisherPass

FORMS = ((3, 8, 8), (3, 4, 12), (3, 12, 4))


def shaped(number: int, shape: tuple[int, ...], **facts: Any) -> dict[str, Any]:
    latent = np.random.default_rng(number).standard_normal(shape).astype(np.float32)
    return told({**toy_fields(number), "latent.npy": npy_bytes(latent)}, **facts)


def bucketed(folder: Path, samples: int = 17, weights: tuple[float, ...] = (1,), samples_per_shard: int = 5) -> Path:
    fields = [shaped(number, FORMS[number % 7 % 3], weight=weights[number % len(weights)]) for number in range(samples)]
    write_shards(fields, folder, samples_per_shard=samples_per_shard)
    return folder


def epoch(
    folder: Path, rank: int, world_size: int, batch_size: int = 4, number: int = 0, **more: Any
) -> list[SampleBatch]:
    shards = list_shards(str(folder))
    deal = Deal([group for shard in shards for group in shard.groups], batch_size, world_size)
    stream = TrainingStream(shards, rank, world_size, batch_size, deal.batches, 0, None, 5000, deal=deal, **more)
    stream.epoch = number
    return list(stream)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_an_epoch_of_a_bucketed_set_has_each_sample_once_in_as_many_batches_on_every_rank(
    tmp_path: Path, world_size: int, batch_size: int
) -> None:
    folder = bucketed(tmp_path)
    ranks = [epoch(folder, rank, world_size, batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for found in ranks for batch in found]
    assert sorted(key for batch in batches for key in batch.keys) == [f"sample-{n:05d}" for n in range(17)]
    assert max(map(len, batches)) <= batch_size + (batch_size == 1)
    assert not any(batch.error for batch in batches)


def test_epochs_differ_in_order_and_a_seed_gives_the_same_one(tmp_path: Path) -> None:
    folder = bucketed(tmp_path)
    keys = [[batch.keys for batch in epoch(folder, 0, 1, number=number)] for number in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]


def test_memory_holds_no_more_than_a_window(tmp_path: Path) -> None:
    """Batches are full as soon as a window's samples came, however many there are."""
    folder = bucketed(tmp_path, 60)
    shards = list_shards(str(folder))
    deal = Deal([group for shard in shards for group in shard.groups], 4, 1)
    turn = deal.turn(8, "seed")
    waiting: Counter[int] = Counter()
    for number in range(60):
        fields = decode_sample(shaped(number, FORMS[number % 7 % 3]))
        for batch in turn.batches_of(form_of(fields), 1.0):
            waiting[batch] += 1
            if waiting[batch] == turn.size_of(batch):
                del waiting[batch]
        assert sum(waiting.values()) <= 3 * (8 + 2 * 4)
    assert not waiting


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
    readers=st.integers(1, 6),
)
def test_whatever_forms_there_are_readers_have_as_many_batches(
    counts: list[int], batch_size: int, readers: int
) -> None:
    groups = [Group(f"form {number}", count, count, 1.0) for number, count in enumerate(counts)]
    most = sum(counts) // readers * readers  # batches, where none is empty
    if most < len(counts):
        with pytest.raises(InputError, match="too few for as many batches"):
            Deal(groups, batch_size, readers)
        return
    deal = Deal(groups, batch_size, readers)
    turn = deal.turn(7, "seed")
    found: Counter[int] = Counter()
    for group in groups:
        for _ in range(group.samples):
            found.update(turn.batches_of(group.form, 1.0))
    assert sorted(found) == list(range(deal.batches * readers))
    for number, size in found.items():
        assert size == turn.size_of(number)
    wished = sum(-(-count // batch_size) for count in counts)
    # Batches are only larger than asked for where so many could not be dealt evenly.
    assert max(found.values()) <= batch_size or -(-wished // readers) * readers > sum(counts)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(0, 2**30))
def test_a_sample_comes_as_often_as_its_weight_to_less_than_one(tenths: list[int], seed: int) -> None:
    total = Fraction(sum(tenths), 10)
    marks = max(1, round(total))
    repeats = Repeats(float(total / marks), seed)
    times = [repeats.of(tenth / 10) for tenth in tenths]
    assert abs(sum(times) - marks) <= 1  # the last mark may fall to rounding
    for tenth, count in zip(tenths, times, strict=True):
        assert abs(count - float(Fraction(tenth, 10) * marks / total)) < 1 + 1e-9


def test_over_turns_a_sample_comes_as_often_as_its_weight() -> None:
    """2.5 is two or three, half of the time each: three standard errors of a thousand draws."""
    times = [Repeats(1.0, seed).of(2.5) for seed in range(1000)]
    assert set(times) == {2, 3}
    assert abs(np.mean(times) - 2.5) < 3 * 0.5 / np.sqrt(1000)


def test_weights_repeat_samples_of_each_form(tmp_path: Path) -> None:
    folder = bucketed(tmp_path, weights=(10, 5, 20))
    for world_size in (1, 2):
        batches = [batch for rank in range(world_size) for batch in epoch(folder, rank, world_size)]
        times = Counter(key for batch in batches for key in batch.keys)
        assert times == {f"sample-{n:05d}": (2, 1, 4)[n % 3] for n in range(17)}


class Records(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[list[str]] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> Tensor:
        self.keys.append(batch.keys)
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("settings", [{}, {"every_sample": True}, {"num_workers": 2}, {"cache": True}])
def test_a_trainer_sees_a_weighted_bucketed_set(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = bucketed(tmp_path / "set", weights=(2, 1))
    module = Records()
    trainer(tmp_path, max_epochs=2).fit(module, TrainingDataModule(str(folder), 4, **settings))
    times = Counter(key for keys in module.keys for key in keys)
    assert times == {f"sample-{n:05d}": 2 * (2, 1)[n % 2] for n in range(17)}


def test_chosen_samples_keep_their_weights(tmp_path: Path) -> None:
    folder = bucketed(tmp_path / "set", weights=(2, 1))
    chosen = [f"sample-{n:05d}" for n in range(4)]
    module = Records()
    trainer(tmp_path, max_epochs=1).fit(module, TrainingDataModule(str(folder), 4, keys=chosen))
    assert Counter(key for keys in module.keys for key in keys) == dict(zip(chosen, (2, 1, 2, 1), strict=True))


def test_two_folders_of_one_form_each_are_a_set_of_two(tmp_path: Path) -> None:
    for number, shape in enumerate(FORMS[:2]):
        write_shards([shaped(3 * number + n, shape) for n in range(3)], tmp_path / str(number))
    module = Records()
    data = TrainingDataModule([str(tmp_path / "0"), str(tmp_path / "1")], 2)
    trainer(tmp_path, max_epochs=1).fit(module, data)
    assert sorted(key for keys in module.keys for key in keys) == [f"sample-{n:05d}" for n in range(6)]


@pytest.mark.parametrize("differ", [{"weight": 3}, {}])
def test_what_no_manifest_says_is_refused_and_not_guessed(tmp_path: Path, differ: dict[str, Any]) -> None:
    fields = [shaped(0, FORMS[0]), shaped(1, FORMS[0] if differ else FORMS[1], **differ)]
    write_shards(fields, tmp_path)
    (tmp_path / "manifest.json").unlink()
    data = TrainingDataModule(str(tmp_path), 2, samples_per_epoch=2)
    with pytest.raises(InputError, match=r"differ in shape or weight.*no manifest says"):
        list(data.train_dataloader())
    if differ:
        real = RealSamples(list_shards(str(tmp_path)), "real", 0, decode_sample(fields[0]), skip_bad=False)
        with pytest.raises(InputError, match="no manifest says"):
            real.take(0, 2)


def test_a_sample_that_the_manifest_does_not_list_is_refused(tmp_path: Path) -> None:
    folder = bucketed(tmp_path)
    shards = list_shards(str(folder))
    deal = Deal([group for shard in shards for group in shard.groups if "8x8" in group.form], 4, 1)
    stream = TrainingStream(shards, 0, 1, 4, deal.batches, 0, None, 5000, deal=deal)
    assert any("manifest does not list" in str(batch.error) for batch in stream)


def test_real_samples_come_as_often_as_training_saw_them(tmp_path: Path) -> None:
    folder = bucketed(tmp_path, 6, weights=(6, 2, 4))
    real = RealSamples(list_shards(str(folder)), "real", 0, decode_sample(toy_fields(0)), skip_bad=False)
    for turn in range(3):
        times = Counter(sample.key for sample in real.take(12 * turn, 12))
        assert times == {f"sample-{n:05d}": (3, 1, 2)[n % 3] for n in range(6)}


# ---------------------------------------------------------------------------------- what is summed over a pass


class Still(ToyObjective):
    """A loss of the sample alone, so that a repetition is the sample again."""

    def __call__(self, network: torch.nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss at timestep 3 with no noise."""
        return super().__call__(network, batch, torch.full_like(timesteps, 3), torch.ones_like(noise))


def fisher_of(folder: Path, out: Path, kind: str) -> Fisher:
    module = FisherPass(ToyDenoiser().double(), Still(), "all")
    accumulator = FisherAccumulator(target="network", parameters="all", fisher=kind, path=str(out))  # type: ignore[arg-type]
    trainer(folder, accumulator, max_epochs=1, precision="64-true").fit(
        module, TrainingDataModule(str(folder), 4, every_sample=True)
    )
    return DiagonalFisher.load(str(out))


def naive_diagonal(fields: list[dict[str, Any]], times: list[int]) -> dict[str, Tensor]:
    """Mean of squared gradients over a list that holds the samples so many times, one at a time, in float64."""
    network, objective = ToyDenoiser().double(), Still()
    sums = {name: torch.zeros_like(weight) for name, weight in network.named_parameters()}
    repeated = [one for one, count in zip(fields, times, strict=True) for _ in range(count)]
    for sample in map(decode_sample, repeated):
        batch = ViewBatch(sample.latent[None].double(), {"text": sample.text[:1].double()})
        loss = objective(network, batch, torch.zeros(1).long(), torch.zeros_like(batch.latents)).sum()
        for (name, _), gradient in zip(
            network.named_parameters(), torch.autograd.grad(loss, list(network.parameters())), strict=True
        ):
            sums[name] += gradient.square()
    return {name: total / len(repeated) for name, total in sums.items()}


def test_a_fisher_of_weighted_samples_is_that_of_a_set_that_repeats_them(tmp_path: Path) -> None:
    weights = [30, 10, 20, 10, 10]
    fields = [shaped(n, FORMS[n % 2], weight=weight) for n, weight in enumerate(weights)]
    write_shards(fields, tmp_path / "weighted", samples_per_shard=2)
    found = fisher_of(tmp_path / "weighted", tmp_path / "fisher.safetensors", "diagonal")
    assert found.count == 8
    expected = naive_diagonal(fields, [3, 1, 2, 1, 1])
    unweighted = naive_diagonal(fields, [1] * 5)
    for name, value in found.tensors().items():
        mean = value.double() / found.count
        # Sums of eight squares of gradients that are sums over 64 places, in float32 or wider.
        torch.testing.assert_close(mean, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(mean, unweighted[name], rtol=1e-3)


def test_captions_are_drawn_by_their_shares_in_training() -> None:
    from lightning_unlearn.data.batches import collate_samples

    sample = decode_sample(told(toy_fields(0, 2), caption_weights=[1, 0]))
    module = DiffusionModule(ToyDenoiser(), ToyObjective())
    views, *_ = module._draw(collate_samples("training", [sample] * 20))
    assert all(torch.equal(text, sample.text[0]) for text in views.text)


def test_a_loss_mask_reaches_the_loss_in_training_and_no_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    half = np.repeat([1.0, 0.0], 4)[:, None].repeat(8, 1)
    masked = encode_sample(
        "masked",
        rng.standard_normal(FORMS[0]).astype(np.float32),
        rng.standard_normal((1, 4, 6)).astype(np.float32),
        {"captions": ["a"]},
        loss_mask=grey_png(half),
    )
    write_shards([masked, toy_fields(1)], tmp_path)
    (batch,) = TrainingDataModule(str(tmp_path), 2).train_dataloader()
    assert batch.masks is not None
    rows = dict(zip(batch.keys, batch.masks, strict=True))
    assert torch.equal(rows["masked"], torch.from_numpy(half).float())
    assert (rows["sample-00001"] == 1).all()

    class Masked(ToyObjective):
        takes_masks = True

        def __call__(self, network: Any, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
            """The mean of the mask."""
            assert batch.mask is not None
            return batch.mask.flatten(1).mean(1)

    views, *_ = DiffusionModule(ToyDenoiser(), Masked())._draw(batch)
    assert views.mask is not None
    assert sorted(views.mask.flatten(1).mean(1).tolist()) == [0.5, 1.0]
    with pytest.raises(InputError, match="has a loss mask, of which ToyObjective knows nothing"):
        DiffusionModule(ToyDenoiser(), ToyObjective())._draw(batch)
