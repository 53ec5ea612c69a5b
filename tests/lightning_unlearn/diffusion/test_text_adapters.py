"""An adapter's weights for text encoders, in the forms that people have them, and learned tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_forms as forms
import pytest
import torch
from adapter_forms import Adapter
from prepare_toys import TEXT_DIM, tiny_text_encoder, tiny_tokenizer
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters.learned_tokens import add_learned_tokens, read_learned_tokens, spread_words
from lightning_unlearn.diffusion.adapters.text_encoders import merge_text_adapter
from lightning_unlearn.errors import InputError

LAYER = "encoder.layers.{}.{}"
NAMES = [
    LAYER.format(number, name)
    for number in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
]


def clip() -> nn.Module:
    torch.manual_seed(1)
    encoder: nn.Module = tiny_text_encoder()
    return encoder


def clip_with_projection() -> nn.Module:
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(2)
    config = tiny_text_encoder().config
    config.projection_dim = 5
    return CLIPTextModelWithProjection(config).eval()


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    settings: dict[str, Any] = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**settings)).eval()


def ours(encoder: nn.Module, name: str) -> str:
    """CLIP's layers lie in a ``text_model`` in some versions and classes, and in files always."""
    return f"text_model.{name}" if "text_model" in dict(encoder.named_children()) else name


def states(encoder: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = encoder(torch.arange(2, 10)[None])[0]
    return found


def clip_adapter(encoder: nn.Module, **settings: Any) -> dict[str, Adapter]:
    """By the names in files, which have ``text_model`` always."""
    adapter = forms.random_adapter(encoder, [ours(encoder, name) for name in NAMES], **settings)
    return {f"text_model.{name}": adapter[ours(encoder, name)] for name in NAMES}


def wanted(encoder: nn.Module, adapter: dict[str, Adapter]) -> Tensor:
    inside = "text_model."
    own = {
        ours(encoder, name.removeprefix(inside)) if name.startswith(inside) else name: one
        for name, one in adapter.items()
    }
    return states(forms.applied(encoder, own))


def kohya(adapter: dict[str, Adapter], prefix: str) -> dict[str, Tensor]:
    return {key.replace("lora_unet_", prefix): value for key, value in forms.kohya_state(adapter).items()}


def old_diffusers(adapter: dict[str, Adapter]) -> dict[str, Tensor]:
    """As diffusers wrote text encoders before PEFT: names of its own for attention, others for the rest."""
    state = {}
    for name, one in adapter.items():
        head, _, last = name.rpartition(".")
        for kind, tensor in (("down", one.down), ("up", one.up)):
            if last in ("fc1", "fc2"):
                state[f"text_encoder.{name}.lora_linear_layer.{kind}.weight"] = tensor
            else:
                state[f"text_encoder.{head}.to_{last.removesuffix('_proj')}_lora.{kind}.weight"] = tensor
    return state


def new_diffusers(adapter: dict[str, Adapter]) -> dict[str, Tensor]:
    return {
        f"text_encoder.{name}.lora_linear_layer.{kind}.weight": tensor
        for name, one in adapter.items()
        for kind, tensor in (("down", one.down), ("up", one.up))
    }


# alpha is 2 of rank 3 where a form can say it, and the rank where it can't.
FORMS: dict[str, tuple[Callable[[dict[str, Adapter]], dict[str, Tensor]], float]] = {
    "kohya": (lambda adapter: kohya(adapter, "lora_te_"), 2.0),
    "kohya's first of two": (lambda adapter: kohya(adapter, "lora_te1_"), 2.0),
    "diffusers": (lambda adapter: forms.dotted_state(adapter, "text_encoder.", alpha=True), 2.0),
    "diffusers before": (new_diffusers, 3.0),
    "diffusers long before": (old_diffusers, 3.0),
    "PEFT": (lambda adapter: forms.dotted_state(adapter, "base_model.model.", alpha=True), 2.0),
    "ComfyUI": (lambda adapter: forms.dotted_state(adapter, "text_encoders.clip_l.transformer.", alpha=True), 2.0),
}


# diffusers wrote no DoRA when it wrote no alpha.
PAIRS = [*((form, False) for form in FORMS), *((form, True) for form, (_, alpha) in FORMS.items() if alpha < 3)]


@pytest.mark.parametrize(("form", "dora"), PAIRS)
def test_one_adapter_in_every_form_gives_the_same_text_states(tmp_path: Path, form: str, dora: bool) -> None:
    write, alpha = FORMS[form]
    encoder = clip()
    adapter = clip_adapter(encoder, alpha=alpha, dora=dora)
    expected = wanted(encoder, adapter)
    assert not torch.allclose(expected, states(encoder), atol=1e-2)
    network = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 2)}
    path = forms.save(tmp_path / "a.safetensors", write(adapter) | network)
    names = set(encoder.state_dict())
    assert merge_text_adapter({"text_encoder": encoder}, path) == {"text_encoder": len(NAMES)}
    assert set(encoder.state_dict()) == names
    torch.testing.assert_close(states(encoder), expected, rtol=0, atol=1e-5)


def test_the_alpha_of_diffusers_lies_in_the_header(tmp_path: Path) -> None:
    encoder = clip()
    adapter = clip_adapter(encoder, alpha=2.0)
    expected = wanted(encoder, adapter)
    settings = {"text_encoder.r": 3, "text_encoder.lora_alpha": 2.0, "unet.r": 5, "unet.lora_alpha": 1.0}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    path = forms.save(tmp_path / "a.safetensors", forms.dotted_state(adapter, "text_encoder.", alpha=False), header)
    merge_text_adapter({"text_encoder": encoder}, path)
    torch.testing.assert_close(states(encoder), expected, rtol=0, atol=1e-5)


def test_the_alpha_of_peft_lies_beside_its_file(tmp_path: Path) -> None:
    encoder = clip()
    adapter = clip_adapter(encoder, alpha=2.0)
    expected = wanted(encoder, adapter)
    merge_text_adapter({"text_encoder": encoder}, forms.peft_folder(tmp_path / "text_encoder", adapter))
    torch.testing.assert_close(states(encoder), expected, rtol=0, atol=1e-5)


def test_two_encoders_each_get_their_own(tmp_path: Path) -> None:
    encoders = {"text_encoder": clip(), "text_encoder_2": clip_with_projection()}
    adapters = {part: clip_adapter(encoder) for part, encoder in encoders.items()}
    second = encoders["text_encoder_2"]
    projection = forms.random_adapter(second, ["text_projection"])
    adapters["text_encoder_2"] |= projection
    expected = {part: wanted(encoder, adapters[part]) for part, encoder in encoders.items()}
    for form in ("kohya", "diffusers"):
        changed = copy.deepcopy(encoders)
        if form == "kohya":
            state = kohya(adapters["text_encoder"], "lora_te1_") | kohya(adapters["text_encoder_2"], "lora_te2_")
        else:
            state = {}
            for part, adapter in adapters.items():
                state |= forms.dotted_state(adapter, f"{part}.", alpha=True)
        merge_text_adapter(changed, forms.save(tmp_path / f"{form}.safetensors", state))
        for part, encoder in changed.items():
            torch.testing.assert_close(states(encoder), expected[part], rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [("text_encoder", "text_encoder_2"), ("text_encoder", "_2", "text_encoder_3")])
def test_kohyas_third_encoder_is_t5_wherever_a_pipeline_has_it(tmp_path: Path, parts: tuple[str, ...]) -> None:
    encoders = {part: t5() if part == parts[-1] else clip() for part in parts}
    last = encoders[parts[-1]]
    adapter = forms.random_adapter(last, list(forms.covered(last)))
    expected = states(forms.applied(last, adapter))
    path = forms.save(tmp_path / "a.safetensors", kohya(adapter, "lora_te3_"))
    assert list(merge_text_adapter(encoders, path)) == [parts[-1]]
    torch.testing.assert_close(states(last), expected, rtol=0, atol=1e-5)


def test_what_fits_no_encoder_is_refused(tmp_path: Path) -> None:
    adapter = clip_adapter(clip())

    def refusal(state: dict[str, Tensor]) -> str:
        with pytest.raises(InputError) as error:
            merge_text_adapter({"text_encoder": clip()}, forms.save(tmp_path / "a.safetensors", state))
        return str(error.value)

    assert "has weights of text_encoder_2" in refusal(kohya(adapter, "lora_te2_"))
    other = {name.replace("layers.1", "layers.7"): one for name, one in adapter.items()}
    assert "fit no layer" in refusal(kohya(other, "lora_te_"))
    dead = {name: one._replace(up=torch.zeros_like(one.up)) for name, one in adapter.items()}
    assert "does nothing" in refusal(kohya(dead, "lora_te_"))
    assert "LoKr" in refusal({"lora_te_text_model_encoder_layers_0_mlp_fc1.lokr_w1": torch.ones(2, 2)})


def test_an_adapter_of_the_network_alone_changes_no_encoder(tmp_path: Path) -> None:
    path = forms.save(tmp_path / "a.safetensors", {"unet.a.lora_A.weight": torch.ones(2, 2)})
    assert merge_text_adapter({"text_encoder": clip()}, path) == {}


# --- learned tokens

VECTORS = torch.arange(3.0 * TEXT_DIM).reshape(3, TEXT_DIM) / 50


TOKEN_FILES = ["learned_embeds.safetensors", "several.safetensors", "<new1>.bin", "<new1>.pt", "<new1>.safetensors"]


def token_files(folder: Path) -> dict[str, tuple[Path, int]]:
    """File to the number of its vectors; the word is ``<new1>`` in all."""
    files: dict[str, tuple[Any, int]] = {
        "learned_embeds.safetensors": ({"<new1>": VECTORS[0]}, 1),
        "several.safetensors": ({"<new1>": VECTORS}, 3),
        # Custom Diffusion's script.
        "<new1>.bin": ({"<new1>": VECTORS[0]}, 1),
        "<new1>.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "<new1>"}, 3),
        "<new1>.safetensors": ({"emb_params": VECTORS}, 3),
    }
    for name, (content, _) in files.items():
        if name.endswith(".safetensors"):
            forms.save(folder / name, content)
        else:
            torch.save(content, folder / name)
    return {name: (folder / name, count) for name, (_, count) in files.items()}


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_learned_tokens_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    path, count = token_files(tmp_path)[name]
    encoder, tokenizer = clip(), tiny_tokenizer()
    assert add_learned_tokens({"text_encoder": encoder}, {"text_encoder": tokenizer}, str(path)) == ["<new1>"]
    # As diffusers takes a state dict.
    theirs, their_tokenizer = clip(), tiny_tokenizer()
    holder = TextualInversionLoaderMixin()
    holder.components, holder.hf_device_map = {}, {}  # type: ignore[attr-defined]
    given = {"<new1>": VECTORS[:count] if count > 1 else VECTORS[0]}
    holder.load_textual_inversion(given, token="<new1>", tokenizer=their_tokenizer, text_encoder=theirs)
    caption = "a photo of <new1> dog"
    ids = tokenizer(spread_words([caption], tokenizer), return_tensors="pt").input_ids
    same = their_tokenizer(holder.maybe_convert_prompt(caption, their_tokenizer), return_tensors="pt").input_ids
    assert torch.equal(ids, same)
    assert (ids >= 54).sum() == count
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids)[0], theirs(ids)[0], rtol=0, atol=1e-6)
    assert spread_words(["a dog"], tokenizer) == ["a dog"]


def test_words_of_two_encoders(tmp_path: Path) -> None:
    encoders, tokenizers = {"text_encoder": clip(), "text_encoder_2": clip()}, {}
    for part in encoders:
        tokenizers[part] = tiny_tokenizer()
    path = forms.save(tmp_path / "style.safetensors", {"clip_l": VECTORS[:1], "clip_g": VECTORS[1:2]})
    assert add_learned_tokens(encoders, tokenizers, path) == ["style"]
    for number, (part, encoder) in enumerate(encoders.items()):
        row = tokenizers[part].convert_tokens_to_ids("style")
        embeddings: Any = encoder.get_input_embeddings()  # type: ignore[operator]
        assert torch.equal(embeddings.weight[row], VECTORS[number])


def test_learned_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def refusal(content: dict[str, Any], tokenizer: Any = None) -> str:
        torch.save(content, tmp_path / "a.bin")
        tokenizers = {"text_encoder": tokenizer or tiny_tokenizer()}
        with pytest.raises(InputError) as error:
            add_learned_tokens({"text_encoder": clip()}, tokenizers, str(tmp_path / "a.bin"))
        return str(error.value)

    assert "have 7 numbers, but text_encoder takes 12" in refusal({"<new1>": torch.ones(7)})
    assert "no file of learned tokens" in refusal({"conv.weight": torch.ones(2, 3, 3, 3)})
    assert "no file of learned tokens" in refusal({})
    assert "has already" in refusal({"a</w>": torch.ones(TEXT_DIM)})


def test_learned_tokens_never_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "made",)

    torch.save({"<new1>": VECTORS[0], "evil": Evil()}, tmp_path / "a.bin")
    assert [token.word for token in read_learned_tokens(str(tmp_path / "a.bin"))] == ["<new1>"]
    assert not (tmp_path / "made").exists()
