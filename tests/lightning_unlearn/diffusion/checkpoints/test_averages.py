"""Averaged weights wherever a checkpoint has them: taken, asked for, or named; never mixed up in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_forms import assert_weights, load_into, moved
from diffusers.training_utils import EMAModel
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from toys import ToyDenoiser, tiny_unet

from lightning_unlearn.errors import InputError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def prefixed(prefix: str, by: float) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in moved(by).items()}


def dotless(prefix: str, by: float) -> dict[str, Tensor]:
    return {f"{prefix}{name.replace('.', '')}": value for name, value in moved(by).items()}


TRAINED = {"state_dict": prefixed("model.unet.", 1)}
# Checkpoints with trained weights, moved by 1, and averages, moved by 2; and the place of these.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "a callback's state": (
        {**TRAINED, "callbacks": {"EMA": {"ema_state_dict": prefixed("unet.", 2)}}},
        "ema_state_dict",
    ),
    "timm's key": ({**TRAINED, "state_dict_ema": prefixed("model.unet.", 2)}, "state_dict_ema"),
    "a key of the model": ({**TRAINED, "ema_model": moved(2)}, "ema_model"),
    "a key without a word for it": ({**TRAINED, "averaged_model_state": moved(2)}, "averaged_model_state"),
    "a prefix": ({"state_dict": {**prefixed("unet.", 1), **prefixed("unet_ema.", 2)}}, "unet_ema"),
    "lucidrains' prefix": ({**prefixed("online_model.", 1), **prefixed("ema_model.", 2)}, "ema_model"),
    "LDM's averages of a module": (
        {
            "state_dict": {
                **prefixed("model.unet.", 1),
                **dotless("model_ema.unet", 2),
                "model_ema.decay": torch.ones(()),
            }
        },
        "model_ema.unet",
    ),
    "averages without names": (
        {**TRAINED, "ema": EMAModel([nn.Parameter(v) for v in moved(2).values()]).state_dict()},
        "ema.shadow_params",
    ),
    # torch_ema.ExponentialMovingAverage.state_dict()
    "torch-ema's": (
        {
            "model": moved(1),
            "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(moved(2).values()), "collected_params": None},
        },
        "ema.shadow_params",
    ),
}


def test_the_networks_weights_are_in_its_order() -> None:
    # The numbers above stand for these.
    assert list(moved(0)) == [name for name, _ in tiny_unet().named_parameters()]


@pytest.mark.parametrize("form", FORMS)
def test_averages_that_lie_elsewhere_are_named_and_can_be_asked_for(tmp_path: Path, form: str) -> None:
    content, place = FORMS[form]
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="also holds averaged weights") as caught:
        state, origin = load_into(tmp_path / "a.ckpt")
    assert_weights(state, moved(1))
    assert not origin.averaged
    assert len(origin.left) == 1
    assert place in origin.left[0]
    assert place in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for averaged in (True, place, origin.left[0]):
            state, origin = load_into(tmp_path / "a.ckpt", averaged=averaged)
            assert_weights(state, moved(2))
            assert origin.averaged
        state, origin = load_into(tmp_path / "a.ckpt", averaged=False)
    assert_weights(state, moved(1))
    assert origin.record()["averaged"] is False
    with pytest.raises(InputError, match=r"no weights of this network at 'elsewhere'; places of averaged weights: '"):
        load_into(tmp_path / "a.ckpt", averaged="elsewhere")


def test_two_sets_of_averages_are_not_chosen_from(tmp_path: Path) -> None:
    torch.save({**TRAINED, "ema_fast": moved(2), "ema_slow": moved(3)}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"more than once \('ema_fast\.', 'ema_slow\.'\); name .* by `averaged`"):
        load_into(tmp_path / "a.ckpt", averaged=True)
    assert_weights(load_into(tmp_path / "a.ckpt", averaged="ema_slow")[0], moved(3))


def test_averages_where_there_are_none(tmp_path: Path) -> None:
    safetensors.torch.save_file(moved(1), tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not load_into(tmp_path / "a.safetensors")[1].averaged
    with pytest.warns(UserWarning, match="holds no averaged weights"):
        assert not load_into(tmp_path / "a.safetensors", averaged=True)[1].averaged


def test_averages_alone_are_taken_and_not_passed_off_as_others(tmp_path: Path) -> None:
    torch.save(EMAModel(tiny_unet().parameters()).state_dict(), tmp_path / "a.pt")
    state, origin = load_into(tmp_path / "a.pt")
    assert_weights(state, moved(0))
    assert origin.averaged
    with pytest.raises(InputError, match="holds only averaged weights"):
        load_into(tmp_path / "a.pt", averaged=False)


def test_averages_of_another_network_without_names_are_refused(tmp_path: Path) -> None:
    shadow = [value.clone() for value in moved(1).values()]
    torch.save({"shadow_params": shadow[:-1]}, tmp_path / "a.pt")
    with pytest.raises(
        InputError, match=f"has {len(shadow) - 1} tensors without names, but the network has {len(shadow)}"
    ):
        load_into(tmp_path / "a.pt")
    shadow[3] = torch.zeros(7)
    torch.save({"shadow_params": shadow}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"has \(7,\) as number 3, where the network has \("):
        load_into(tmp_path / "a.pt")


def test_averages_of_pytorch_are_known_by_their_counter(tmp_path: Path) -> None:
    network = tiny_unet()
    network.load_state_dict(moved(2))
    averages = AveragedModel(network)
    averages.update_parameters(network)
    torch.save({"model": moved(1), "second": averages.state_dict()}, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=r"in second\.module"):
        assert_weights(load_into(tmp_path / "a.pt")[0], moved(1))
    state, origin = load_into(tmp_path / "a.pt", averaged=True)
    assert_weights(state, moved(2))
    assert origin.averaged


class Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.unet = ToyDenoiser(seed=1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum((parameter.square().sum() for parameter in self.parameters()), torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Saver(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore")
def test_the_averages_of_lightnings_callback_lie_in_its_state(tmp_path: Path) -> None:
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1)
    trainer = Trainer(max_epochs=4, callbacks=[averaging, Saver(tmp_path / "a.ckpt")], **QUIET)
    trainer.fit(Training(), DataLoader(torch.zeros(2, 1)))  # type: ignore[arg-type]
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    (state,) = [s["average_model_state"] for s in content["callbacks"].values() if "average_model_state" in s]
    found, origin = load_into(tmp_path / "a.ckpt", network=ToyDenoiser(seed=3))
    assert_weights(found, {name.removeprefix("unet."): value for name, value in content["state_dict"].items()})
    assert "average_model_state" in origin.left[0]
    found, origin = load_into(tmp_path / "a.ckpt", averaged="average_model_state.unet", network=ToyDenoiser(seed=3))
    assert_weights(found, {name.removeprefix("unet."): value for name, value in state.items()})
    assert origin.averaged
