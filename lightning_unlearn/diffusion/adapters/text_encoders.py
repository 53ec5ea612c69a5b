"""An adapter's weights for text encoders, merged into these: its text states are made with them.

A pipeline has up to three encoders. diffusers and PEFT name them as the pipeline does, kohya numbers them, and ComfyUI
calls them by their kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters.adapter_file import AdapterFile, read_adapter_file
from lightning_unlearn.diffusion.adapters.applying import merge_adapter, put_on
from lightning_unlearn.diffusion.adapters.keys import is_text_encoder, refuse_other_kinds
from lightning_unlearn.diffusion.adapters.layer_names import LayerNames
from lightning_unlearn.diffusion.adapters.reading import layers_of
from lightning_unlearn.errors import InputError

# What keys begin with, and the part of a pipeline that it is.
_BEGINNINGS = {
    re.compile(r"lora_te1?_|te1?\.|text_encoder\.|text_encoders\.clip_l\.(?:transformer\.)?"): "text_encoder",
    re.compile(r"lora_te2_|te2\.|text_encoder_2\.|text_encoders\.clip_g\.(?:transformer\.)?"): "text_encoder_2",
    re.compile(r"lora_te3_|te3\.|text_encoder_3\.|text_encoders\.t5xxl\.(?:transformer\.)?"): "text_encoder_3",
    # A folder of PEFT's is of one encoder.
    re.compile(r"(?=text_model\.)"): "text_encoder",
}
_OLD = re.compile(r"\.to_(?:q|k|v|out)_lora\.")
_NEWER = re.compile(r"\.lora_linear_layer\.|text_projection\.lora\.")


class _TextKey(NamedTuple):
    part: str
    name: str
    underscored: bool


def merge_text_adapter(encoders: Mapping[str, nn.Module], path: str) -> dict[str, int]:
    """Merge what an adapter has for text encoders into them, in place.

    Args:
        encoders: The part of a pipeline, e.g. ``"text_encoder_2"``, to the encoder.
        path: A file or folder as diffusers, PEFT, kohya, ComfyUI or ai-toolkit writes it.

    Returns:
        Part to the number of its layers that were changed; empty if the adapter is of the network alone.

    Raises:
        InputError: If there is something for an encoder that is not here, or that does not fit.
    """
    file = read_adapter_file(path)
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        if is_text_encoder(key):
            found = _read(file, key)
            part = _part(file, key, found.part, encoders)
            grouped.setdefault(part, {})[_for_model(found, encoders[part])] = tensor
    if grouped:
        refuse_other_kinds(file.path, [key for key in file.tensors if is_text_encoder(key)])
    changed = {}
    for part, tensors in grouped.items():
        own = replace(file, tensors=tensors, config=file.text_configs.get(part, {}))
        layers = layers_of(own, LayerNames(encoders[part]))
        put_on(encoders[part], file.path, layers)
        merge_adapter(encoders[part])
        changed[part] = len(layers)
    return changed


def _read(file: AdapterFile, key: str) -> _TextKey:
    name = key
    while name.startswith("base_model.model."):
        name = name.removeprefix("base_model.model.")
    if _OLD.search(name) or _NEWER.search(name):
        from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft

        # The forms that diffusers itself has written over the years.
        form = StateDictType.DIFFUSERS_OLD if _OLD.search(name) else StateDictType.DIFFUSERS
        (name,) = convert_state_dict_to_peft({name: None}, form)  # type: ignore[no-untyped-call]
    for beginning, part in _BEGINNINGS.items():
        if found := beginning.match(name):
            return _TextKey(part, name[found.end() :], name.startswith("lora_te"))
    raise InputError(f"{file.path}: {key} is of a text encoder, but of none that is known here; it is not read.")


def _part(file: AdapterFile, key: str, part: str, encoders: Mapping[str, nn.Module]) -> str:
    # kohya and ComfyUI give T5 the third place also where a pipeline has two encoders (FLUX).
    if part == "text_encoder_3" and part not in encoders and "text_encoder_2" in encoders:
        part = "text_encoder_2"
    if part not in encoders:
        raise InputError(
            f"{file.path} has weights of {part} (e.g. {key}), but the pipeline has {', '.join(encoders) or 'none'}; "
            "the adapter is of another model."
        )
    return part


def _for_model(key: _TextKey, encoder: nn.Module) -> str:
    """The key as the network's are; what CLIP's layers lie in has a name in some versions of transformers alone."""
    inside = "text_model_" if key.underscored else "text_model."
    name = key.name
    if name.startswith(inside) and "text_model" not in dict(encoder.named_children()):
        name = name.removeprefix(inside)
    return f"lora_unet_{name}" if key.underscored else name
