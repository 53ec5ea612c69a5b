"""Custom Diffusion's weights, against diffusers' own attention processors that hold them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_forms import outputs
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import tiny_unet

from lightning_unlearn.diffusion.adapters import load_adapter
from lightning_unlearn.diffusion.adapters.learned_tokens import read_learned_tokens
from lightning_unlearn.errors import InputError


def base() -> Any:
    return tiny_unet().double()


def customised(query_too: bool) -> nn.Module:
    """As ``train_custom_diffusion.py`` makes the network."""
    network = base()
    torch.manual_seed(2)
    processors: dict[str, Any] = {}
    for name in network.attn_processors:
        attention = network.get_submodule(name.removesuffix(".processor"))
        processors[name] = CustomDiffusionAttnProcessor(
            train_kv="attn2" in name,
            train_q_out=query_too and "attn2" in name,
            hidden_size=attention.to_q.out_features,
            cross_attention_dim=attention.to_k.in_features,
        ).double()
    network.set_attn_processor(processors)
    return network


def trained(network: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, processor in network.attn_processors.items()
        if isinstance(processor, CustomDiffusionAttnProcessor)
        for key, value in processor.state_dict().items()
    }


@pytest.mark.parametrize("query_too", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "bin", "folder", "unet."])
def test_it_computes_what_the_processors_compute(tmp_path: Path, query_too: bool, form: str) -> None:
    theirs = customised(query_too)
    assert not torch.allclose(outputs(theirs), outputs(base()), atol=1e-3)
    path = tmp_path / f"pytorch_custom_diffusion_weights.{'safetensors' if form == 'safetensors' else 'bin'}"
    state = trained(theirs)
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({f"{form if form == 'unet.' else ''}{name}": value for name, value in state.items()}, path)
    network = base()
    names = list(network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(network, str(tmp_path if form == "folder" else path))
    assert list(network.state_dict()) == names
    torch.testing.assert_close(outputs(network), outputs(theirs), rtol=0, atol=1e-9)


def test_what_diffusers_itself_saves_is_read(tmp_path: Path) -> None:
    theirs: Any = customised(False)
    theirs.save_attn_procs(tmp_path, safe_serialization=False, weight_name="pytorch_custom_diffusion_weights.bin")
    network = base()
    load_adapter(network, str(tmp_path / "pytorch_custom_diffusion_weights.bin"))
    torch.testing.assert_close(outputs(network), outputs(theirs), rtol=0, atol=1e-9)


def test_the_papers_own_files_hold_weights_and_words(tmp_path: Path) -> None:
    weights = {f"{name}": value + 1 for name, value in base().state_dict().items() if "attn2.to_k" in name}
    torch.save({"unet": weights, "modifier_token": {"<new1>": torch.ones(6)}}, tmp_path / "delta.bin")
    network = base()
    load_adapter(network, str(tmp_path / "delta.bin"))
    for name, value in weights.items():
        assert torch.equal(network.state_dict()[name], value)
    (token,) = read_learned_tokens(str(tmp_path / "delta.bin"))
    assert token.word == "<new1>"


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path: Path) -> None:
    state, own = trained(customised(False)), base().state_dict()
    last = list(state)[-1]

    def refusal(content: dict[str, Tensor]) -> str:
        torch.save(content, tmp_path / "pytorch_custom_diffusion_weights.bin")
        network = base()
        with pytest.raises(InputError) as error:
            load_adapter(network, str(tmp_path))
        assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
        return str(error.value)

    assert "fit no layer" in refusal({**state, last: torch.ones(3, 3)})
    assert "fit no layer" in refusal({**state, "strange.weight": torch.ones(3)})
    assert "training failed" in refusal({**state, last: state[last] * torch.nan})
    same = {name: own[name.replace(".processor", "").replace("_custom_diffusion", "")] for name in state}
    assert "does nothing" in refusal(same)
