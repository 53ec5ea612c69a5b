"""The grammar of an adapter's keys: which layer, and which tensor of it; what is not LoRA is refused by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from lightning_unlearn.errors import InputError

Role = Literal["down", "up", "alpha", "dora_scale", "magnitude"]

# PEFT in memory has its adapter's name between lora_A and weight.
_ROLES: Mapping[Role, re.Pattern[str]] = {
    "down": re.compile(r"(.+)\.(?:lora_A(?:\.\w+)?|lora_down)\.weight"),
    "up": re.compile(r"(.+)\.(?:lora_B(?:\.\w+)?|lora_up)\.weight"),
    "alpha": re.compile(r"(.+)\.alpha"),
    "dora_scale": re.compile(r"(.+)\.dora_scale"),
    "magnitude": re.compile(r"(.+)\.lora_magnitude_vector(?:\.\w+)*"),
}
_TEXT = re.compile(r"(?:base_model\.model\.)*(?:lora_te\d?_|te\d?\.|text_encoders?(?:_\d)?\.|text_model\.)")
_OTHERS: Mapping[str, str] = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.boft_": "BOFT",
    r"\.lora_mid\.": "LoCon with a Tucker core (lora_mid)",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.(?:ia3_l|on_input)": "(IA)³",
    r"\.(?:diff|diff_b|diff_m)$": "differences of whole weights (diff)",
    r"\.(?:w_norm|b_norm)$": "trained norms",
    r"\.(?:up_list|down_list)\.": "DyLoRA",
    r"\.scalar$": "LyCORIS with a trained scalar",
    r"\.vera_lambda": "VeRA",
    r"\.lora_(?:E|ranknum)\b": "AdaLoRA",
    r"\.lora_embedding_[AB]": "LoRA of an embedding",
    r"\.lora_B(?:\.\w+)?\.bias$": "LoRA with biases (lora_bias)",
    r"fourierft_": "FourierFT",
    r"\.hra_": "HRA",
    r"^bundle_emb\.": "OneTrainer's embeddings within a LoRA file (bundle_emb)",
    r"lora_controlnet": "Control-LoRA",
}
_DIFFUSERS = re.compile(r"[._]lora\.(?:down|up)\.|\.processor\.|\.to_out\.lora_magnitude_vector")


class Key(NamedTuple):
    """What a key says.

    Attributes:
        layer: The layer's name in the file, with the file's prefixes.
        role: Which of its tensors.
    """

    layer: str
    role: Role


def is_text_encoder(key: str) -> bool:
    """Whether a key is of a text encoder, not of the network.

    Args:
        key: Of the file.

    Returns:
        Whether it is.
    """
    return _TEXT.match(key) is not None


def parse_key(key: str) -> Key | None:
    """Read a key.

    Args:
        key: As diffusers, PEFT, kohya or ai-toolkit write it.

    Returns:
        What it says, or ``None`` if it is none of LoRA.

    Example:
        >>> parse_key("lora_unet_mid_block_proj.lora_down.weight")
        Key(layer='lora_unet_mid_block_proj', role='down')
        >>> parse_key("unet.attn1.processor.to_out_lora.up.weight") == parse_key("unet.attn1.to_out.0.lora_B.weight")
        True
    """
    if _DIFFUSERS.search(key):
        from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

        # The forms that diffusers itself has written over the years.
        (key,) = convert_unet_state_dict_to_peft({key: None})  # type: ignore[no-untyped-call]
    for role, pattern in _ROLES.items():
        if found := pattern.fullmatch(key):
            return Key(found[1], role)
    return None


def refuse_other_kinds(path: str, keys: list[str]) -> None:
    """Refuse adapters that are no LoRA, by their name.

    Args:
        path: The file.
        keys: Its keys.

    Raises:
        InputError: If one is of another kind.
    """
    for pattern, kind in _OTHERS.items():
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise InputError(
                f"{path} holds {kind} ({len(found)} of its {len(keys)} keys, e.g. {found[0]}), which is not read here; "
                "only LoRA, LoCon and DoRA are: merge it into the network with the program that made it, and give the "
                "merged weights."
            )
