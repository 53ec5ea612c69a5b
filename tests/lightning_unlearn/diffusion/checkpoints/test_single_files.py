"""Single-file models: the names that LDM, SGM and the first code of transformers give, through diffusers' converter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapter_forms import stable_diffusion_xl
from checkpoint_forms import assert_weights, load_into, original_state
from torch import Tensor, nn
from toys import tiny_unet

from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.errors import InputError

PREFIX = "model.diffusion_model."


def stable_diffusion_1() -> nn.Module:
    return tiny_unet(layers_per_block=2)


def stable_diffusion_2() -> nn.Module:
    return tiny_unet(layers_per_block=2, use_linear_projection=True)


def sdxl() -> nn.Module:
    return stable_diffusion_xl().float()


NETWORKS: list[Callable[[], nn.Module]] = [stable_diffusion_1, stable_diffusion_2, sdxl]


def by(number: float, network: nn.Module) -> dict[str, Tensor]:
    return {name: value + number for name, value in network.state_dict().items()}


def single_file(network: nn.Module, averages: bool = True) -> dict[str, Tensor]:
    """As LDM and SGM save their models: trained weights moved by 1, averages by 2, and the parts beside them."""
    trained = {f"{PREFIX}{name}": value for name, value in original_state(network, by(1, network)).items()}
    averaged = {
        f"model_ema.diffusion_model{name.replace('.', '')}": value
        for name, value in original_state(network, by(2, network)).items()
    }
    beside = {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.zeros(3),
        "betas": torch.zeros(3),
        "model_ema.decay": torch.ones(()),
    }
    return {**trained, **(averaged if averages else {}), **beside}


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_single_files_with_their_averages(tmp_path: Path, make: Callable[[], nn.Module], form: str) -> None:
    network, path = make(), tmp_path / f"model.{form}"
    content = single_file(network)
    if form == "ckpt":
        torch.save({"state_dict": content, "global_step": 3}, path)
    else:
        safetensors.torch.save_file(content, path)
    with pytest.warns(UserWarning, match=r"also holds averaged weights, in .*model_ema\.diffusion_model"):
        state, origin = load_into(path, network=make())
    assert_weights(state, by(1, network))
    assert not origin.averaged
    state, origin = load_into(path, averaged=True, network=make())
    assert_weights(state, by(2, network))
    assert origin.averaged


@pytest.mark.parametrize("prefix", ["", PREFIX, f"_forward_module.{PREFIX}", f"module._orig_mod.{PREFIX}", "unet."])
def test_original_names_behind_any_prefix(tmp_path: Path, prefix: str) -> None:
    network = stable_diffusion_1()
    state = {f"{prefix}{name}": value for name, value in original_state(network, by(1, network)).items()}
    torch.save(state, tmp_path / "a.pt")
    assert_weights(load_into(tmp_path / "a.pt", network=stable_diffusion_1())[0], by(1, network))


def test_a_folder_of_configs_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    network = stable_diffusion_1()
    network.save_config(tmp_path / "unet")  # type: ignore[operator]
    safetensors.torch.save_file(single_file(network, averages=False), tmp_path / "model.safetensors")
    found = load_network(str(tmp_path), str(tmp_path / "model.safetensors"))
    assert_weights(found.state_dict(), by(1, network))


def test_a_single_file_of_another_model_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(single_file(stable_diffusion_1(), averages=False), tmp_path / "a.safetensors")
    for other in (stable_diffusion_2, sdxl, lambda: tiny_unet(cross_attention_dim=7, layers_per_block=2)):
        network = other()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(InputError, match="another model"):
            load_into(tmp_path / "a.safetensors", network=network)
        assert_weights(network.state_dict(), before)


def test_a_single_file_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    # Each of the smaller network's weights is there, of the same shape.
    larger = tiny_unet(layers_per_block=2, transformer_layers_per_block=2)
    safetensors.torch.save_file(single_file(larger, averages=False), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="of a larger model"):
        load_into(tmp_path / "a.safetensors", network=stable_diffusion_1())


def test_a_single_file_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    content = single_file(stable_diffusion_1(), averages=False)
    del content[f"{PREFIX}out.2.bias"]
    safetensors.torch.save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"lacks 1 of .*conv_out\.bias"):
        load_into(tmp_path / "a.safetensors", network=stable_diffusion_1())
