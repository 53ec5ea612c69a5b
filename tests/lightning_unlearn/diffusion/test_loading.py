from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import ToyDenoiser, tiny_unet

from lightning_unlearn.diffusion.checkpoints import AveragedChoice, read_checkpoint, read_state
from lightning_unlearn.diffusion.loading import load_network, load_weights
from lightning_unlearn.errors import InputError

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class CreatesFile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Foreign(LightningModule):
    """A user's module: its network is two attributes deep, and beside it stands another."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"unet": ToyDenoiser(seed=1), "other": ToyDenoiser(seed=2)})

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum((parameter.square().sum() for parameter in self.model["unet"].parameters()), torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveEveryStep(Callback):
    """Keeps the weights that are being trained, and saves a checkpoint, after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Foreign)
        self.trained.append({name: value.clone() for name, value in pl_module.model["unet"].state_dict().items()})
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def train(folder: Path, callbacks: list[Callback], steps: int = 3) -> SaveEveryStep:
    saver = SaveEveryStep(folder)
    trainer = Trainer(max_steps=steps, callbacks=[*callbacks, saver], **QUIET)
    trainer.fit(Foreign(), DataLoader(torch.zeros(steps, 1)))  # type: ignore[arg-type]
    return saver


def loaded(path: Path | str, prefix: str = "", averaged: AveragedChoice = None) -> dict[str, Tensor]:
    network = ToyDenoiser(seed=3)
    load_weights(network, str(path), prefix, averaged)
    return network.state_dict()


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def refusal(path: Path | str, prefix: str = "", network: nn.Module | None = None) -> str:
    network = network or ToyDenoiser(seed=3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_weights(network, str(path), prefix)
    assert_same(network.state_dict(), before)  # all or nothing
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(path) in message
    return message


@pytest.mark.filterwarnings("ignore")
def test_network_is_found_by_its_prefix_in_a_lightning_checkpoint(tmp_path: Path) -> None:
    saver = train(tmp_path, [])
    assert_same(loaded(tmp_path / "3.ckpt", "model.unet."), saver.trained[2])
    # Without averaging there is one set of weights, whatever is asked for.
    assert_same(loaded(tmp_path / "3.ckpt", "model.unet.", averaged=False), saver.trained[2])


@pytest.mark.filterwarnings("ignore")
def test_averaged_and_trained_weights_of_an_ema_checkpoint(tmp_path: Path) -> None:
    saver = train(tmp_path, [EMAWeightAveraging(decay=0.75)])
    average = saver.trained[0]  # the first update copies
    for trained in saver.trained[1:]:
        average = {name: 0.75 * value + 0.25 * trained[name] for name, value in average.items()}
    assert_same(loaded(tmp_path / "3.ckpt", "model.unet.", averaged=False), saver.trained[2])
    found = loaded(tmp_path / "3.ckpt", "model.unet.")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value)
        assert not torch.equal(found[name], saver.trained[2][name])


def test_state_dict_and_safetensors_need_no_prefix(tmp_path: Path) -> None:
    state = ToyDenoiser(seed=1).state_dict()
    torch.save(state, tmp_path / "state.pt")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("state.pt", "state.safetensors", "old.pt"):
        assert_same(loaded(tmp_path / name), state)


def test_prefix_in_safetensors_and_in_names_of_torch_compile(tmp_path: Path) -> None:
    state = ToyDenoiser(seed=1).state_dict()
    compiled = {f"unet.{name}": value for name, value in torch.compile(ToyDenoiser(seed=1)).state_dict().items()}
    assert all("._orig_mod." in name for name in compiled)
    safetensors.torch.save_file(compiled, tmp_path / "state.safetensors")
    assert_same(loaded(tmp_path / "state.safetensors", "unet."), state)
    # A part of a network may be compiled: `network.text = torch.compile(network.text)`.
    torch.save({name.replace("text.", "text._orig_mod."): value for name, value in state.items()}, tmp_path / "part.pt")
    assert_same(loaded(tmp_path / "part.pt"), state)


def test_weights_are_cast_to_the_networks_dtype(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in ToyDenoiser(seed=1).state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    assert_same(loaded(tmp_path / "half.pt"), {name: value.float() for name, value in state.items()})


def test_entries_that_are_no_tensors_are_no_weights(tmp_path: Path) -> None:
    state = ToyDenoiser(seed=1).state_dict()
    torch.save({"state_dict": {**state, "metric._extra_state": {"count": 3}}, "epoch": 3}, tmp_path / "a.ckpt")
    assert_same(read_state(str(tmp_path / "a.ckpt")), state)
    torch.save({**state, "step": 3}, tmp_path / "b.pt")
    assert_same(read_state(str(tmp_path / "b.pt")), state)


@pytest.mark.filterwarnings("ignore")
def test_wrong_prefix_is_answered_with_those_that_hold_the_network(tmp_path: Path) -> None:
    train(tmp_path, [], steps=1)
    message = refusal(tmp_path / "1.ckpt", "unet.")
    assert "lacks 6 of the network's 6 weights under the prefix 'unet.'" in message
    assert "prefixes that hold it: 'model.other.', 'model.unet.'." in message


def test_prefix_where_there_is_none_is_answered_with_the_empty_one(tmp_path: Path) -> None:
    # 'context.weight' ends like 'text.weight', but is another name.
    state = ToyDenoiser(seed=1).state_dict()
    torch.save(
        {**state, "con" + "text.weight": torch.zeros(1), "con" + "conv_in.weight": torch.zeros(1)}, tmp_path / "a.pt"
    )
    assert "prefixes that hold it: ''." in refusal(tmp_path / "a.pt", "unet.")


def test_file_of_another_model_names_what_is_missing(tmp_path: Path) -> None:
    state = ToyDenoiser(seed=1).state_dict()
    del state["text.bias"]
    torch.save(state, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert "lacks 1 of the network's 6 weights" in message
    assert "text.bias" in message
    assert "none" in message


def test_other_shapes_are_an_error(tmp_path: Path) -> None:
    torch.save({**ToyDenoiser(seed=1).state_dict(), "text.weight": torch.zeros(5, 7)}, tmp_path / "a.pt")
    assert "text.weight is (5, 7), but the network's is (5, 6)" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("old", [True, False])
def test_checkpoint_never_runs_code(tmp_path: Path, old: bool) -> None:
    made = tmp_path / "made"
    weights = ToyDenoiser(seed=1).state_dict()
    state = {"state_dict": weights, "hyper_parameters": {"evil": CreatesFile(made)}}
    torch.save(state, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    with pytest.raises(InputError, match="without running code"):
        read_checkpoint(str(tmp_path / "a.ckpt"))
    if old:  # nothing lists what such a file names
        assert "without running code" in refusal(tmp_path / "a.ckpt")
    else:
        assert_same(loaded(tmp_path / "a.ckpt"), weights)
    assert not made.exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False)  # it would have
    assert made.exists()


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    for name in ("a.ckpt", "a.safetensors"):
        assert "There are no weights" in refusal(tmp_path / name)
    assert "There are no weights" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", bytes(1000), b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_file_of_something_else_is_an_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(content)
    refusal(tmp_path / f"a.{suffix}")


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoint_is_an_error_or_loads(tmp_path: Path) -> None:
    torch.save(ToyDenoiser(seed=1).state_dict(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for length in range(0, len(whole) - 1, 257):
        (tmp_path / "a.pt").write_bytes(whole[:length])
        refusal(tmp_path / "a.pt")
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0, 1500, 3):
            content[place] = rng.integers(256)
        (tmp_path / "a.pt").write_bytes(content)
        try:
            read_checkpoint(str(tmp_path / "a.pt"))
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("content", [3, [1], {"state_dict": [1]}, {"state_dict": 3}])
def test_checkpoint_without_a_state_dict_is_an_error(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    assert "state_dict" in refusal(tmp_path / "a.ckpt") or "state dict" in refusal(tmp_path / "a.ckpt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a pipeline has it: a network and a scheduler."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_unet().save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """The network's own folder, to be spoiled."""
    shutil.copytree(saved / "unet", tmp_path / "network")
    return tmp_path / "network"


def test_diffusers_network_is_loaded_from_its_folder_or_the_pipelines(saved: Path) -> None:
    wanted = tiny_unet()
    for folder in (saved, saved / "unet"):
        network = load_network(str(folder))
        assert type(network) is type(wanted)
        assert not network.training
        assert_same(network.state_dict(), wanted.state_dict())


def test_diffusers_network_of_a_pipeline_may_be_a_transformer(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "unet", tmp_path / "transformer")
    assert_same(load_network(str(tmp_path)).state_dict(), tiny_unet().state_dict())


def test_weights_replace_those_of_a_folder(saved: Path, tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in tiny_unet().state_dict().items()}
    torch.save({f"net.{name}": value for name, value in state.items()}, tmp_path / "a.pt")
    assert_same(load_network(str(saved), str(tmp_path / "a.pt"), "net.").state_dict(), state)


def test_network_may_be_given_ready(tmp_path: Path) -> None:
    network = ToyDenoiser().train()
    assert load_network(network) is network
    assert not network.training


def folder_refusal(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        load_network(str(folder))
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(folder) in message
    return message


def test_folder_without_a_network_is_an_error(tmp_path: Path) -> None:
    assert "unet/" in folder_refusal(tmp_path)
    assert "unet/" in folder_refusal(tmp_path / "missing")


def test_folder_that_lacks_weights_is_an_error_and_not_filled_with_random_ones(copy: Path) -> None:
    path = copy / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["conv_in.bias"]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    message = folder_refusal(copy)
    assert "lacks 1 weights" in message
    assert "conv_in.bias" in message


def test_folder_with_weights_of_another_shape_is_an_error(copy: Path) -> None:
    path = copy / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**state, "conv_in.bias": torch.zeros(3)}, path, {"format": "pt"})
    folder_refusal(copy)


@pytest.mark.parametrize(
    "config", ["{", "[]", "{}", '{"_class_name": "Nothing"}', '{"_class_name": 3}', '{"_class_name": "DDPMScheduler"}']
)
def test_folder_with_a_config_of_something_else_is_an_error(copy: Path, config: str) -> None:
    (copy / "config.json").write_text(config)
    folder_refusal(copy)


def test_folder_with_damaged_or_no_weights_is_an_error(copy: Path) -> None:
    path = copy / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    folder_refusal(copy)
    path.unlink()
    folder_refusal(copy)


def test_folder_never_runs_code(copy: Path, tmp_path: Path) -> None:
    (copy / "diffusion_pytorch_model.safetensors").unlink()
    made = tmp_path / "made"
    torch.save({**tiny_unet().state_dict(), "evil": CreatesFile(made)}, copy / "diffusion_pytorch_model.bin")
    folder_refusal(copy)
    assert not made.exists()
