"""What an adapter's file may hold: taken whole, or refused in one sentence; off, it is the model before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_forms as forms
import pytest
import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters import adapter_off, adapter_scales, has_adapter, load_adapter, merge_adapter
from lightning_unlearn.errors import InputError

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
K, V = f"{ATTENTION}.to_k", f"{ATTENTION}.to_v"
KOHYA = f"lora_unet_{K.replace('.', '_')}"
State = dict[str, Tensor]


def adapter(**settings: Any) -> dict[str, forms.Adapter]:
    return forms.random_adapter(forms.stable_diffusion(), [K, V], **settings)


def kohya() -> State:
    return forms.kohya_state(adapter())


def loaded(folder: Path, state: State, header: dict[str, str] | None = None) -> nn.Module:
    network = forms.stable_diffusion()
    load_adapter(network, forms.save(folder / "lora.safetensors", state, header))
    return network


def changed(**tensors: Tensor | None) -> State:
    """kohya's form with tensors of the first layer put in another's place, or left out."""
    state = kohya()
    for name, tensor in tensors.items():
        key = f"{KOHYA}.{name.replace('__', '.')}"
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


# ---------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (lambda: changed(alpha=None), "an alpha for 1 layers and none for 1"),
        (lambda: changed(alpha=torch.tensor(0.0)), r"alpha of .*to_k is 0, .*above 0"),
        (lambda: changed(alpha=torch.tensor(float("nan"))), "alpha of .* is nan"),
        (lambda: changed(alpha=torch.ones(2)), "alpha of .* is of shape"),
        (lambda: changed(lora_up__weight=None), "has alpha, down but no up beside down"),
        (lambda: changed(lora_down__weight=None), "no down beside up"),
        (lambda: changed(lora_up__weight=torch.ones(8, 2)), "no rank in common"),
        (lambda: changed(lora_up__weight=torch.ones(9, 3)), "9 outputs.*has 8; the adapter is of another model"),
        (lambda: changed(lora_down__weight=torch.ones(3, 7)), r"is of a layer with weights \(3, 7\).*another model"),
        (lambda: changed(lora_down__weight=torch.full((3, 6), torch.inf)), "infinite or missing numbers in down"),
        (lambda: changed(lora_up__weight=torch.ones(8, 3, dtype=torch.int8)), "up in torch.int8"),
        (lambda: changed(dora_scale=torch.ones(1, 6)), r"dora_scale \(1, 6\).*wd_on_output"),
        (lambda: changed(dora_scale=torch.ones(8, 1)), "is DoRA in 1 layers and LoRA in 1"),
        (
            lambda: {key: it * ("up" not in key) for key, it in kohya().items()},
            "does nothing: B is zero in all of its 2",
        ),
        (lambda: kohya() | {"lora_unet_elsewhere.lora_down.weight": torch.ones(1)}, "1 of its 7 keys.*elsewhere"),
        (lambda: kohya() | {"something": torch.ones(1)}, r"1 of its 7 keys fit no layer .* \(something\)"),
        (lambda: kohya() | forms.dotted_state(adapter(), "unet.", alpha=True), "which the file has under another name"),
        (
            lambda: forms.dotted_state(adapter(), "", alpha=True) | {f"{K}.lora_down.weight": torch.ones(3, 6)},
            "is there twice",
        ),
        (lambda: {"lora_te_text_model_q.lora_down.weight": torch.ones(2, 2)}, "only weights of text encoders"),
        (lambda: {}, "is not a safetensors file"),
    ],
)
def test_file_that_cannot_be_taken_whole_is_refused_by_name(
    state: Callable[[], State], says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        loaded(tmp_path, state())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w1", "LoKr"),
        ("oft_blocks", "OFT"),
        ("oft_R.weight", "OFT"),
        ("boft_R", "BOFT"),
        ("lora_mid.weight", "Tucker"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA"),
        ("diff", "differences"),
        ("diff_b", "differences"),
        ("w_norm", "trained norms"),
        ("up_list.0", "DyLoRA"),
        ("scalar", "trained scalar"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
        ("lora_embedding_A", "embedding"),
        ("lora_B.bias", "lora_bias"),
        ("fourierft_spectrum", "FourierFT"),
        ("hra_u", "HRA"),
    ],
)
def test_other_kinds_are_refused_by_their_name(key: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{kind}.*only LoRA, LoCon and DoRA are: merge it"):
        loaded(tmp_path, kohya() | {f"{KOHYA}.{key}": torch.ones(2)})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "LOHA"}, "PEFT's LOHA"),
        ({"r": 4}, "has rank 3, but the adapter's settings say 4"),
        ({"rank_pattern": {"to_k": 5}}, "to_k has rank 3, but .* say 5"),
        ({"lora_alpha": 0}, "the alpha 0.*above 0"),
        ({"lora_alpha": None}, "the alpha None"),
        ({"init_lora_weights": "pissa"}, "started by pissa, which changes the base weights"),
        ({"use_qalora": True}, "PEFT's use_qalora"),
        ({"alpha_pattern": {"(": 5}}, "alpha_pattern in the adapter's settings is no map"),
        ({"rank_pattern": [3]}, "rank_pattern in the adapter's settings is no map"),
    ],
)
def test_settings_of_peft_that_do_not_fit_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load_adapter(forms.stable_diffusion(), forms.peft_folder(tmp_path / "a", adapter(), **settings))


def test_alpha_that_the_header_contradicts_or_that_was_lost_is_refused(tmp_path: Path) -> None:
    header = {"ss_network_dim": "3", "ss_network_alpha": "2.0"}
    loaded(tmp_path, kohya(), header)
    loaded(tmp_path, kohya(), header | {"ss_network_dim": "64"})  # made smaller afterwards
    with pytest.raises(InputError, match=r"to_k has alpha 2, but the file's header says .* with 1\b"):
        loaded(tmp_path, kohya(), header | {"ss_network_alpha": "1"})
    lost = {key: tensor for key, tensor in kohya().items() if not key.endswith("alpha")}
    with pytest.raises(InputError, match=r"alpha is 2.0, but it has none beside its weights"):
        loaded(tmp_path, lost, header)
    assert set(adapter_scales(loaded(tmp_path, lost)).values()) == {1.0}


def test_what_is_no_adapter_or_no_place_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of an adapter"):
        load_adapter(forms.stable_diffusion(), str(tmp_path))
    with pytest.raises(InputError, match="no weights at"):
        load_adapter(forms.stable_diffusion(), str(tmp_path / "none.safetensors"))
    folder = Path(forms.peft_folder(tmp_path / "peft", adapter()))
    for text in ("{", "[]"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match="no JSON"):
            load_adapter(forms.stable_diffusion(), str(folder))
    network = loaded(tmp_path, kohya())
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapter(network, str(tmp_path / "lora.safetensors"))


def test_weights_that_peft_drops_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("peft.set_peft_model_state_dict", lambda *arguments: None)
    with pytest.raises(InputError, match=r"PEFT did not take the weights of .*to_k as they are in the file"):
        loaded(tmp_path, kohya())


def test_what_peft_refuses_gets_a_sentence(tmp_path: Path) -> None:
    network = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    state = {"conv.lora_A.weight": torch.ones(3, 2, 3, 3), "conv.lora_B.weight": torch.ones(4, 3, 1, 1)}
    with pytest.raises(InputError, match="PEFT can't put the adapter on this network"):
        load_adapter(network, forms.save(tmp_path / "lora.safetensors", state))


# ---------------------------------------------------------------------------------- taken


def test_scales_are_those_of_each_layer(tmp_path: Path) -> None:
    settings = {"alpha_pattern": {"to_k": 6}, "use_rslora": True}
    network = forms.stable_diffusion()
    found = load_adapter(network, forms.peft_folder(tmp_path / "a", adapter(), **settings))
    # rsLoRA: alpha over the square root of the rank.
    wanted = {K: 6 / 3**0.5, V: 2 / 3**0.5}
    assert found.scales == pytest.approx(wanted)
    assert adapter_scales(network) == pytest.approx({f"{name}.default": scale for name, scale in wanted.items()})


def test_layers_of_different_rank_are_those_of_the_formula(tmp_path: Path) -> None:
    network = forms.stable_diffusion()
    names = [name for name in forms.covered(network) if "attn" in name]
    mixed: dict[str, forms.Adapter] = {}
    for number, name in enumerate(names):
        mixed |= forms.random_adapter(network, [name], rank=1 + number % 3, alpha=1.0 + number % 2)
    wanted = forms.outputs(forms.applied(network, mixed))
    load_adapter(network, forms.save(tmp_path / "a.safetensors", forms.kohya_state(mixed)))
    torch.testing.assert_close(forms.outputs(network), wanted, rtol=0, atol=1e-5)


def test_fused_parts_have_no_weights_that_do_nothing(tmp_path: Path) -> None:
    network = forms.flux()
    names = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
    one = forms.random_adapter(network, names)
    joined = forms.fused(one, {"double_blocks.0.img_attn.qkv": names})
    load_adapter(network, forms.save(tmp_path / "a.safetensors", forms.kohya_state(joined)))
    for name in names:
        assert torch.equal(network.get_parameter(f"{name}.lora_A.default.weight").float(), one[name].down)
        assert torch.equal(network.get_parameter(f"{name}.lora_B.default.weight").float(), one[name].up)
    assert set(adapter_scales(network).values()) == {2 / 3}


def test_projection_trained_as_a_convolution_is_a_linear_one_too(tmp_path: Path) -> None:
    state = {key: it[:, :, None, None] if it.ndim == 2 else it for key, it in kohya().items()}
    wanted = forms.outputs(loaded(tmp_path, kohya()))
    assert torch.equal(forms.outputs(loaded(tmp_path, state)), wanted)


def test_keys_of_text_encoders_are_told_apart_and_said(tmp_path: Path) -> None:
    text = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.ones(2, 2)}
    text |= {"text_encoder_2.text_model.a.lora_A.weight": torch.ones(1), "lora_te3_encoder.alpha": torch.ones(1)}
    path = forms.save(tmp_path / "lora.safetensors", kohya() | text)
    network = forms.stable_diffusion()
    with pytest.warns(UserWarning, match="3 weights of text encoders.*text states must be made with them"):
        found = load_adapter(network, path)
    assert set(found.text_encoder_keys) == set(text)
    assert torch.equal(forms.outputs(network), forms.outputs(loaded(tmp_path, kohya())))


def test_what_of_the_training_is_not_followed_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"lora\.safetensors: the adapter was trained with a noise offset of 0\.1"):
        loaded(tmp_path, kohya(), {"ss_noise_offset": "0.1"})


def test_adapter_off_is_the_model_before(tmp_path: Path) -> None:
    before, network = forms.stable_diffusion(), loaded(tmp_path, kohya())
    with_adapter = forms.outputs(network)
    chosen = network.get_parameter(f"{K}.lora_A.default.weight").requires_grad_(True)
    frozen = network.get_parameter(f"{K}.lora_B.default.weight").requires_grad_(False)
    with adapter_off(network) as off:
        # Of the same weights; a product may be summed up in another order.
        torch.testing.assert_close(forms.outputs(off), forms.outputs(before), rtol=0, atol=1e-12)
    assert torch.equal(forms.outputs(network), with_adapter)
    assert chosen.requires_grad
    assert not frozen.requires_grad
    with pytest.raises(RuntimeError, match="stop"), adapter_off(network):
        raise RuntimeError("stop")
    assert torch.equal(forms.outputs(network), with_adapter)
    with pytest.raises(InputError, match="no adapter that could be switched off"), adapter_off(before):
        pass


def test_merged_network_has_the_names_of_one_without_an_adapter(tmp_path: Path) -> None:
    network = loaded(tmp_path, kohya())
    merged = copy.deepcopy(network)
    merge_adapter(merged)
    assert merged.state_dict().keys() == forms.stable_diffusion().state_dict().keys()
    assert has_adapter(network)
    assert not has_adapter(merged)
    torch.testing.assert_close(forms.outputs(merged), forms.outputs(network), rtol=0, atol=1e-12)
    again = forms.stable_diffusion()
    load_adapter(again, str(tmp_path / "lora.safetensors"), merge=True)
    assert torch.equal(forms.outputs(again), forms.outputs(merged))


def test_adapter_is_kept_in_float32_on_a_base_in_half_precision(tmp_path: Path) -> None:
    network = forms.stable_diffusion().bfloat16()
    load_adapter(network, forms.save(tmp_path / "lora.safetensors", kohya()))
    kinds = {"lora" in name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert torch.equal(network.get_parameter(f"{K}.lora_A.default.weight"), adapter()[K].down)


def test_what_diffusers_and_peft_save_is_read(tmp_path: Path) -> None:
    """Written by the libraries themselves, not by hand."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_k", "to_out.0", "conv1"], init_lora_weights=False)
    wrapped = get_peft_model(forms.stable_diffusion(), config)
    wanted = forms.outputs(wrapped.get_base_model())
    wrapped.save_pretrained(tmp_path / "peft")
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(wrapped))
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    about = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "diffusers", state, unet_lora_adapter_metadata=about)
    for folder in ("peft", "diffusers"):
        network = forms.stable_diffusion()
        load_adapter(network, str(tmp_path / folder))
        torch.testing.assert_close(forms.outputs(network), wanted, rtol=0, atol=1e-5)
