"""What lies on the disk: an adapter's tensors, the header of its file, and PEFT's configuration where there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lightning_unlearn.diffusion.checkpoints import read_state
from lightning_unlearn.errors import InputError

_CONFIG = "adapter_config.json"
_IN_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
# diffusers keeps PEFT's configuration here, each setting behind the part of the pipeline that it is for.
_DIFFUSERS_HEADER = "lora_adapter_metadata"
_NETWORKS = ("unet.", "transformer.")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was saved.

    Attributes:
        path: The file.
        tensors: Key to tensor.
        header: What a safetensors file says of itself.
        config: PEFT's settings of the network's adapter, empty where there are none.
        text_configs: The same of each text encoder's, by the part of the pipeline.
    """

    path: str
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    text_configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_adapter_file(path: str) -> AdapterFile:
    """Read an adapter, without pickle.

    Args:
        path: A safetensors file, a PyTorch state dict, or the folder that PEFT or diffusers saved one in.

    Returns:
        Its content.

    Raises:
        InputError: If there is none, or it can't be read.
    """
    place = Path(path)
    config: dict[str, Any] = {}
    if place.is_dir():
        names = [name for name in _IN_FOLDER if (place / name).is_file()]
        if len(names) != 1:
            raise InputError(
                f"{path} is no folder of an adapter (it needs one of {' and '.join(_IN_FOLDER)}); name the file."
            )
        if (place / _CONFIG).is_file():
            config = _json(place / _CONFIG, (place / _CONFIG).read_bytes())
        place = place / names[0]
    tensors = read_state(str(place))
    header: dict[str, str] = {}
    if place.suffix == ".safetensors":
        with safe_open(place, "pt") as file:
            header = dict(file.metadata() or {})
    # A folder of PEFT is of one model, whichever it is.
    text_configs: dict[str, Mapping[str, Any]] = {part: config for part in TEXT_ENCODERS if config}
    if not config and _DIFFUSERS_HEADER in header:
        settings = _json(place, header[_DIFFUSERS_HEADER])
        config = {
            name.removeprefix(prefix): value
            for name, value in settings.items()
            for prefix in _NETWORKS
            if name.startswith(prefix)
        }
        for part in TEXT_ENCODERS:
            own = {name.removeprefix(f"{part}."): it for name, it in settings.items() if name.startswith(f"{part}.")}
            text_configs |= {part: own} if own else {}
    return AdapterFile(str(place), tensors, header, config, text_configs)


def _json(place: Path, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"The settings of the adapter at {place} are no JSON ({error}); save it again.") from None
    if not isinstance(found, dict):
        raise InputError(f"The settings of the adapter at {place} are no JSON object; save it again.")
    return found
