from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from toys import DIM, TOKENS, ToyDenoiser, ToyObjective, tiny_unet, toy_fields, toy_shards

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import SampleBatch, ViewBatch, decode_sample
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.training import DiffusionModule

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


class RecordingObjective(ToyObjective):
    """Keeps what the network is shown."""

    def __init__(self) -> None:
        self.views: list[ViewBatch] = []
        self.timesteps: list[Tensor] = []
        self.noise: list[Tensor] = []

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        self.views.append(batch)
        self.timesteps.append(timesteps)
        self.noise.append(noise)
        return super().__call__(network, batch, timesteps, noise)


class ListRates(Callback):
    """The learning rate that each batch is trained with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def batch_of(captions: list[int], flip: bool = False) -> SampleBatch:
    return collate_samples(
        "shard", [decode_sample(toy_fields(n, count, flip=flip)) for n, count in enumerate(captions)]
    )


def mean_loss(network: nn.Module, objective: Any, batch: SampleBatch) -> float:
    """Over fixed draws."""
    generator = torch.Generator().manual_seed(5)
    views = ViewBatch(batch.latents, {"text": batch.text[:, 0]})
    with torch.no_grad():
        losses = [
            objective(
                network,
                views,
                torch.randint(0, objective.num_timesteps, (len(batch),), generator=generator),
                torch.randn(batch.latents.shape, generator=generator),
            )
            for _ in range(20)
        ]
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("kind", ["toy", "unet"])
def test_training_lowers_the_loss(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    network, objective = (ToyDenoiser(), ToyObjective()) if kind == "toy" else (tiny_unet(), DenoisingObjective())
    module = DiffusionModule(network, objective, lambda weights: torch.optim.AdamW(weights, 1e-2))
    data = TrainingDataModule(str(toy_shards(tmp_path)), batch_size=12)
    batch = batch_of([1] * 12)
    before = mean_loss(network.eval(), objective, batch)
    trainer = Trainer(max_steps=40, **QUIET)
    trainer.fit(module.train(), data)
    after = mean_loss(network.eval(), objective, batch)
    assert after < 0.9 * before
    assert 0 < float(trainer.callback_metrics["train_loss"]) < before


def test_loss_is_the_objectives_mean() -> None:
    objective = RecordingObjective()
    module = DiffusionModule(ToyDenoiser(), objective)
    batch = batch_of([1, 1, 1])
    with pytest.warns(UserWarning, match="self.log"):
        outputs = module.training_step(batch, 0)
    again = ToyObjective()(module.network, objective.views[0], objective.timesteps[0], objective.noise[0])
    assert again.shape == (3,)
    assert torch.equal(outputs["loss"], again.mean())
    assert torch.equal(outputs["sample_losses"], again)
    assert not outputs["sample_losses"].requires_grad
    assert torch.equal(outputs["timesteps"], objective.timesteps[0])
    assert outputs["keys"] == batch.keys


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_each_sample_gets_any_of_its_captions_and_nothing_else() -> None:
    torch.manual_seed(0)
    objective = RecordingObjective()
    module = DiffusionModule(ToyDenoiser(), objective)
    captions = [1, 2, 3]
    batch = batch_of(captions)
    for _ in range(60):
        module.training_step(batch, 0)
    drawn: list[set[int]] = [set(), set(), set()]
    for views in objective.views:
        assert views.text.shape == (3, TOKENS, DIM)
        assert torch.equal(views.latents, batch.latents)
        for row in range(3):
            (matching,) = [c for c in range(3) if torch.equal(views.text[row], batch.text[row, c])] or [-1]
            drawn[row].add(matching)
    assert drawn == [{0}, {0, 1}, {0, 1, 2}]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_every_timestep_and_fresh_noise_are_drawn() -> None:
    torch.manual_seed(0)
    objective = RecordingObjective()
    module = DiffusionModule(ToyDenoiser(), objective)
    for _ in range(40):
        module.training_step(batch_of([1, 1, 1]), 0)
    assert set(torch.cat(objective.timesteps).tolist()) == set(range(10))
    noise = torch.cat(objective.noise).flatten(1)
    assert len(noise.unique(dim=0)) == 120
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_half_of_the_samples_are_mirrored_if_asked_for() -> None:
    torch.manual_seed(0)
    batch = batch_of([1, 1], flip=True)
    assert batch.latents_flip is not None
    for flips, wanted in ((True, {True, False}), (False, {False})):
        objective = RecordingObjective()
        module = DiffusionModule(ToyDenoiser(), objective, flips=flips)
        for _ in range(20):
            module.training_step(batch, 0)
        seen: list[set[bool]] = [set(), set()]
        for views in objective.views:
            for row in range(2):
                mirrored = torch.equal(views.latents[row], batch.latents_flip[row])
                assert mirrored or torch.equal(views.latents[row], batch.latents[row])
                seen[row].add(mirrored)
        assert seen == [wanted, wanted]


def test_flips_that_the_shards_lack_are_an_error() -> None:
    with pytest.raises(InputError, match=r"hold no latent_flip.npy; .*\.$"):
        DiffusionModule(ToyDenoiser(), ToyObjective(), flips=True).training_step(batch_of([1]), 0)


def test_schedule_is_stepped_after_every_optimizer_step(tmp_path: Path) -> None:
    rates = ListRates()
    module = DiffusionModule(
        ToyDenoiser(),
        ToyObjective(),
        lambda weights: torch.optim.SGD(weights, 1.0),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )
    data = TrainingDataModule(str(toy_shards(tmp_path)), batch_size=2)
    Trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[rates], **QUIET).fit(module, data)
    assert rates.rates == [1.0, 1.0, 1 / 2, 1 / 2, 1 / 3, 1 / 3]


def test_without_a_schedule_the_rate_stays(tmp_path: Path) -> None:
    rates = ListRates()
    module = DiffusionModule(ToyDenoiser(), ToyObjective())
    Trainer(max_epochs=1, callbacks=[rates], **QUIET).fit(
        module, TrainingDataModule(str(toy_shards(tmp_path)), batch_size=4)
    )
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)
    assert rates.rates == [1e-3] * 3


def test_all_weights_of_the_network_are_trained(tmp_path: Path) -> None:
    network = tiny_unet()
    before = {name: value.clone() for name, value in network.named_parameters()}
    module = DiffusionModule(network)
    Trainer(max_steps=1, **QUIET).fit(module, TrainingDataModule(str(toy_shards(tmp_path)), batch_size=4))
    assert network.training
    assert [name for name, value in network.named_parameters() if torch.equal(value, before[name])] == []


def test_training_starts_from_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    data = TrainingDataModule(str(toy_shards(tmp_path)), batch_size=4)
    first = DiffusionModule(ToyDenoiser(seed=1), ToyObjective())
    trainer = Trainer(max_steps=2, **QUIET)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    second = DiffusionModule(ToyDenoiser(seed=2), ToyObjective(), weights=str(tmp_path / "a.ckpt"), prefix="network.")
    for name, value in first.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], value)


def test_network_may_be_named_by_its_folder(tmp_path: Path) -> None:
    wanted = tiny_unet()
    wanted.save_pretrained(tmp_path)  # type: ignore[operator]
    module = DiffusionModule(str(tmp_path), DenoisingObjective())
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in module.network.state_dict().items())
    assert module.network.training
