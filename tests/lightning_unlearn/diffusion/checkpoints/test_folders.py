"""Folders: shards, variants, a training's ``checkpoint-N``, and the parts of distributed checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from checkpoint_forms import assert_weights, load_into, moved
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn
from toys import tiny_unet

from lightning_unlearn.diffusion.loading import load_network, load_network_with_origin
from lightning_unlearn.errors import InputError


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def unet(by: float) -> Any:
    network = tiny_unet()
    network.load_state_dict(moved(by))
    return network


def refused(path: Path | str, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        load_into(path, **settings)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def network_refused(path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        load_network(str(path), **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sharded_folder_its_index_and_its_pipeline(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path / "unet", max_shard_size="30KB")
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    for path in (index, tmp_path / "unet", tmp_path):
        assert_weights(load_into(path)[0], moved(1))
    for folder in (tmp_path, tmp_path / "unet"):
        assert_weights(load_network(str(folder)).state_dict(), moved(1))


def test_shards_of_pickle_are_read_as_tensors_where_their_index_is_named(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path, max_shard_size="30KB", safe_serialization=False)
    assert len(list(tmp_path.glob("*.bin"))) > 1
    assert_weights(load_into(tmp_path / "diffusion_pytorch_model.bin.index.json")[0], moved(1))
    assert "is pickle" in refused(tmp_path)


def test_an_index_that_promises_what_is_not_there_is_refused(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path, max_shard_size="30KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    first = min(tmp_path.glob("*-00001-of-*.safetensors"))
    state = safetensors.torch.load_file(first)
    lost = next(iter(state))
    safetensors.torch.save_file({name: value for name, value in state.items() if name != lost}, first)
    with pytest.raises(InputError, match=f"lacks {lost}"):
        load_into(index)
    first.unlink()
    assert "is not there" in refused(index)
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    assert "no file of weights beside it" in refused(index)
    index.write_text("{")
    assert "no index" in refused(index)


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_a_folder_that_has_its_weights_only_in_half_precision(tmp_path: Path, shard_size: str) -> None:
    wanted = {name: value.half().float() for name, value in moved(1).items()}
    unet(1).half().save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size=shard_size)
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    network = load_network(str(tmp_path))
    # A delta would be lost in half precision.
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert_weights(network.state_dict(), wanted)
    for path in (tmp_path, tmp_path / "unet", *(tmp_path / "unet").glob("*.json")):
        if path.name != "config.json":
            assert_weights(load_into(path)[0], wanted)


def test_weights_in_bfloat16_become_the_networks_float32(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in moved(1).items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert_weights(load_into(tmp_path / "model.safetensors")[0], {name: value.float() for name, value in state.items()})
    unet(1).bfloat16().save_pretrained(tmp_path / "unet")
    network = load_network(str(tmp_path))
    assert_weights(network.state_dict(), {name: value.float() for name, value in state.items()})


def test_several_variants_and_none_without_a_name_are_refused(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path, variant="fp16")
    unet(2).save_pretrained(tmp_path, variant="bf16")
    assert "bf16, fp16" in network_refused(tmp_path)
    assert "several sets" in refused(tmp_path)
    one = tmp_path / "diffusion_pytorch_model.bf16.safetensors"
    assert_weights(load_network(str(tmp_path), str(one)).state_dict(), moved(2))
    unet(3).save_pretrained(tmp_path)
    assert_weights(load_network(str(tmp_path)).state_dict(), moved(3))


def test_weights_that_are_said_not_to_be_averaged_lie_beside_the_others(tmp_path: Path) -> None:
    # As in the folder of Stable Diffusion 1.5.
    unet(1).save_pretrained(tmp_path)
    unet(2).save_pretrained(tmp_path, variant="non_ema")
    for averaged, by in ((None, 1), (True, 1), (False, 2)):
        network, origin = load_network_with_origin(str(tmp_path), averaged=averaged)
        assert_weights(network.state_dict(), moved(by))
        assert origin is not None
        assert origin.averaged is (by == 1)


def test_averages_as_a_variant_are_named_and_can_be_asked_for(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path)
    unet(2).save_pretrained(tmp_path, variant="ema")
    with pytest.warns(UserWarning, match="as the variant ema"):
        network, origin = load_network_with_origin(str(tmp_path))
    assert_weights(network.state_dict(), moved(1))
    assert origin is not None
    assert not origin.averaged
    assert origin.left == ("ema",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network, origin = load_network_with_origin(str(tmp_path), averaged=True)
    assert_weights(network.state_dict(), moved(2))
    assert origin is not None
    assert origin.averaged


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As diffusers' training scripts save one with ``--use_ema``: through EMAModel."""
    folder = tmp_path / "checkpoint-5"
    averages = EMAModel(unet(2).parameters(), model_cls=UNet2DConditionModel, model_config=tiny_unet().config)
    averages.save_pretrained(folder / "unet_ema")
    unet(1).save_pretrained(folder / "unet")
    (folder / "optimizer.bin").write_bytes(b"anything")
    return folder


@pytest.mark.parametrize(("averaged", "by"), [(None, 2), (True, 2), (False, 1), ("unet_ema", 2)])
def test_a_checkpoint_of_diffusers_scripts(checkpoint: Path, averaged: bool | str | None, by: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network, origin = load_network_with_origin(str(checkpoint), averaged=averaged)
        found, where = load_into(checkpoint, averaged=averaged)
    assert_weights(network.state_dict(), moved(by))
    assert_weights(found, moved(by))
    assert origin is not None
    assert origin.averaged is where.averaged is (by == 2)
    said = [str(warning.message) for warning in caught if "averaged weights are taken" in str(warning.message)]
    # Which was taken is said where nobody chose.
    assert len(said) == (2 if averaged is None else 0)
    assert all("unet_ema" in message for message in said)


def test_a_checkpoint_without_averages_says_so_where_they_were_asked_for(tmp_path: Path) -> None:
    unet(1).save_pretrained(tmp_path / "checkpoint-5" / "unet")
    for load in (
        lambda: load_network_with_origin(str(tmp_path / "checkpoint-5"), averaged=True)[1],
        lambda: load_into(tmp_path / "checkpoint-5", averaged=True)[1],
    ):
        with pytest.warns(UserWarning, match="no averaged weights"):
            origin = load()
        assert origin is not None
        assert not origin.averaged


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_averages_without_names_lie_beside_the_trained_weights(tmp_path: Path, suffix: str) -> None:
    # As SimpleTuner saves them: numbers in the network's order, and no config of their own.
    unet(1).save_pretrained(tmp_path / "unet")
    (tmp_path / "unet_ema").mkdir()
    averages = EMAModel(unet(2).parameters())
    if suffix == "pt":
        torch.save(averages.state_dict(), tmp_path / "unet_ema" / "ema_model.pt")
    else:
        numbered = {f"shadow_params.{i}": tensor for i, tensor in enumerate(averages.shadow_params)}
        safetensors.torch.save_file(numbered, tmp_path / "unet_ema" / "ema_model.safetensors")
    network, origin = load_network_with_origin(str(tmp_path), averaged=True)
    assert_weights(network.state_dict(), moved(2))
    assert origin is not None
    assert origin.averaged
    assert_weights(load_network(str(tmp_path), averaged=False).state_dict(), moved(1))


def test_with_weights_a_folder_needs_its_config_alone(tmp_path: Path) -> None:
    tiny_unet().save_config(tmp_path / "unet")
    safetensors.torch.save_file(moved(1), tmp_path / "a.safetensors")
    assert_weights(load_network(str(tmp_path), str(tmp_path / "a.safetensors")).state_dict(), moved(1))
    assert "config.json files suffice" in network_refused(tmp_path / "a.safetensors")


def test_a_folder_of_pickle_or_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "There are no weights at" in refused(tmp_path)
    torch.save(moved(1), tmp_path / "diffusion_pytorch_model.bin")
    assert "is pickle" in refused(tmp_path)
    # Named, it is read as what it is: tensors.
    assert_weights(load_into(tmp_path / "diffusion_pytorch_model.bin")[0], moved(1))


def test_two_files_of_which_neither_is_the_models_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("model", "model_1"):
        safetensors.torch.save_file(moved(1), tmp_path / f"{name}.safetensors")
    assert "model.safetensors, model_1.safetensors" in refused(tmp_path)
    (tmp_path / "model_1.safetensors").unlink()
    assert_weights(load_into(tmp_path)[0], moved(1))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, 2)
        self.out = nn.Linear(2, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_checkpoint_of_torch_is_answered_with_the_command_that_joins_it(tmp_path: Path) -> None:
    network, folder = Small(), tmp_path / "last.ckpt"
    distributed_checkpoint.save(network.state_dict(), checkpoint_id=folder)
    message = refused(folder, network=Small())
    assert "FSDP" in message
    refused(next(folder.glob("*.distcp")), network=Small())
    command = message.split("`")[1].split()
    assert command[0] == "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command[1:]], check=True, env=environment, capture_output=True)
    result = message.rsplit(" ", 1)[1].removesuffix(".")
    assert_weights(load_into(result, network=Small())[0], network.state_dict())


def test_a_sharded_checkpoint_of_lightning_is_answered_with_lightnings_command(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    for name in (".metadata", "__0_0.distcp", "meta.pt"):
        (tmp_path / "last.ckpt" / name).touch()
    command = "python -m lightning.pytorch.utilities.consolidate_checkpoint"
    assert f"`{command} {tmp_path / 'last.ckpt'}`" in refused(tmp_path / "last.ckpt")


def test_parts_within_a_folder_of_accelerate_are_found(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / ".metadata").touch()
    assert f"dcp_to_torch {tmp_path / 'pytorch_model_fsdp_0'}" in refused(tmp_path)


@pytest.mark.parametrize("script", [True, False])
def test_a_checkpoint_of_deepspeed_is_answered_with_its_script(tmp_path: Path, script: bool) -> None:
    step = tmp_path / "last.ckpt" / "checkpoint"
    step.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (step / name).touch()
    (step.parent / "latest").write_text("checkpoint")
    if script:
        (step.parent / "zero_to_fp32.py").touch()
    start = f"python {step.parent / 'zero_to_fp32.py'}" if script else "python -m deepspeed.utils.zero_to_fp32"
    for path in (step.parent, step, step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        message = refused(path)
        assert "DeepSpeed" in message
        assert f"`{start} {step.parent} {step.parent}/consolidated" in message
