"""Weights under the names that a network's first code gave them, as single-file models have (LDM, SGM, FLUX, …).

diffusers' own converter brings them under its names, by the config of the network that is there: nothing is looked up
or fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_unlearn.errors import InputError

# Where the networks lie in single-file models; diffusers' converters look for it.
PREFIX = "model.diffusion_model."

# A weight that every network of the class has, by its original name.
_MARKS = {
    "UNet2DConditionModel": "input_blocks.0.0.weight",
    "SD3Transformer2DModel": "joint_blocks.0.x_block.attn.qkv.weight",
    "FluxTransformer2DModel": "double_blocks.0.img_attn.qkv.weight",
    "ChromaTransformer2DModel": "double_blocks.0.img_attn.qkv.weight",
}


def original_mark(network: nn.Module) -> str | None:
    """A name by which weights in the original form of a network are known.

    Args:
        network: The denoiser.

    Returns:
        The name, without what stands before it; ``None`` for a class without one.
    """
    return next((_MARKS[kind.__name__] for kind in type(network).__mro__ if kind.__name__ in _MARKS), None)


def converted(path: str, network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights under diffusers' names.

    Args:
        path: The file, for messages.
        network: The denoiser, with its config.
        state: Original name, without what stands before it, to tensor.

    Returns:
        Name in the network to tensor.

    Raises:
        InputError: If they are of another model.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    kind = next(kind.__name__ for kind in type(network).__mro__ if kind.__name__ in _MARKS)
    classes: Mapping[str, Any] = SINGLE_FILE_LOADABLE_CLASSES
    convert: Callable[..., dict[str, Tensor]] = classes[kind]["checkpoint_mapping_fn"]
    config: Any = network.config
    try:
        found = convert(config=dict(config), checkpoint={f"{PREFIX}{name}": tensor for name, tensor in state.items()})
    except Exception as error:  # a converter of diffusers raises nearly anything at another model
        raise InputError(
            f"{path} has the original names of a {kind}, but diffusers can't bring them under this network's "
            f"({type(error).__name__}: {str(error)[:100]}); the network's config is of another model."
        ) from None
    # Some converters put nothing where a weight is missing.
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
