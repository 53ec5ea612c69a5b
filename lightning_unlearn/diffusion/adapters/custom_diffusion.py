"""Custom Diffusion: keys and values of cross-attention as a whole, which take the place of the base model's.

Kumari et al. (arXiv 2212.04488). diffusers' training script saves them under the names of attention processors, which
diffusers itself no longer puts back (its issue 9320); they compute what the layers of standard names do, so that is
where they go. The paper's own code saves them under standard names beside the learned tokens, and the customised models
that attribution is judged by (Wang et al., arXiv 2306.09345) have standard names and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.checkpoints import read_content
from lightning_unlearn.errors import InputError, some_of

_FILES = tuple(f"pytorch_custom_diffusion_weights.{suffix}" for suffix in ("safetensors", "bin", "pt"))
_PROCESSOR = re.compile(r"(?:unet\.)?(.+)\.processor\.to_([kvq]|out)_custom_diffusion\.(.+)")
# A state dict of a network's attention to the text, whole matrices, is of nothing else.
_STANDARD = re.compile(r".+\.attn2\.to_(?:[kvq]|out\.0)\.(?:weight|bias)")
_OTHER_NAMES = ("modifier_token", "modifier_tokens", "text_encoder")


def custom_diffusion_weights(path: str) -> dict[str, Tensor] | None:
    """The weights of a file or folder of Custom Diffusion.

    Args:
        path: A file, or a folder as diffusers' script leaves it.

    Returns:
        Name in the network to tensor, or ``None`` if it is of something else.
    """
    place = Path(path)
    if place.is_dir():
        found = [place / name for name in _FILES if (place / name).is_file()]
        if not found:
            return None
        place = found[0]
    if not place.is_file():
        return None
    content = read_content(str(place))
    inner = content.get("unet")
    if isinstance(inner, Mapping) and any(name in content for name in _OTHER_NAMES):
        return {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if any(_PROCESSOR.fullmatch(str(name)) for name in content):
        return {_standard(str(name)): value for name, value in content.items() if isinstance(value, Tensor)}
    if place.name in _FILES or (content and all(_STANDARD.fullmatch(str(name)) for name in content)):
        return {str(name).removeprefix("unet."): value for name, value in content.items() if isinstance(value, Tensor)}
    return None


def _standard(name: str) -> str:
    parsed = _PROCESSOR.fullmatch(name)
    return f"{parsed[1]}.to_{parsed[2]}.{parsed[3]}" if parsed else name


def apply_custom_diffusion(network: nn.Module, path: str, weights: Mapping[str, Tensor]) -> None:
    """Put weights of Custom Diffusion in the place of a network's, in place; all of them or none.

    Args:
        network: The base model's denoiser.
        path: Where they are from, for messages.
        weights: Name in the network to tensor.

    Raises:
        InputError: If one has no place in the network, or nothing would change.
    """
    own = dict(network.named_parameters())
    strange = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    if strange:
        raise InputError(
            f"{path} has {len(strange)} of {len(weights)} weights of Custom Diffusion that fit no layer of the network "
            f"({some_of(strange)}); they are of another model."
        )
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise InputError(f"{path} has infinite or missing numbers; its training failed.")
    # A network without weights, of which only shapes are asked, has nothing to compare with.
    known = not any(own[name].is_meta for name in weights)
    if known and all(
        torch.equal(own[name].detach().cpu(), tensor.to(own[name].dtype)) for name, tensor in weights.items()
    ):
        raise InputError(f"{path} does nothing: its weights are those that the network has; give the base model.")
    for name, tensor in weights.items():
        own[name].data.copy_(tensor)
