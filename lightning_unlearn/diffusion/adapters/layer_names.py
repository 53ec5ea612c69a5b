"""Under which names files speak of a network's layers.

Its own, those of the code it was first published with, and both with underscores for dots, as kohya writes them. A name
is looked up in the network itself, never made by rules of replacing text: what is not found is not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_unlearn.diffusion.adapters.flux_names import flux_names
from lightning_unlearn.diffusion.adapters.stable_diffusion_3_names import stable_diffusion_3_names
from lightning_unlearn.diffusion.adapters.stable_diffusion_names import stable_diffusion_names

# Original name of a layer to the layers of ours that it is, in the order of their rows.
OriginalNames = Mapping[str, Sequence[str]]

# By the network's class. A class that is not here is still known by its own layer names.
ORIGINAL_NAMES: Mapping[str, Callable[[nn.Module], OriginalNames]] = {
    "UNet2DConditionModel": stable_diffusion_names,
    "FluxTransformer2DModel": flux_names,
    "SD3Transformer2DModel": stable_diffusion_3_names,
}

_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "module.")


@dataclass(frozen=True)
class Part:
    """A layer of the network, as the whole or a part of one that a file names.

    Attributes:
        layer: Its dotted name in the network.
        swapped: Whether the file's rows are (shift, scale) where the network's are (scale, shift).
    """

    layer: str
    swapped: bool = False


class LayerNames:
    """The names of a network's Linear and Conv2d layers.

    Args:
        network: The denoiser, without an adapter.

    Example:
        >>> names = LayerNames(nn.ModuleDict({"a": nn.ModuleDict({"to_k": nn.Linear(2, 3)})}))
        >>> names.find("unet.a.to_k") == names.find("lora_unet_a_to_k") == (Part("a.to_k"),)
        True
        >>> names.find("lora_unet_a_to_q") is None
        True
    """

    def __init__(self, network: nn.Module) -> None:
        modules = dict(network.named_modules())
        self.layers = {name: layer for name, layer in modules.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
        # diffusers' AdaLayerNormContinuous has (scale, shift) where the original code has (shift, scale).
        continuous = [name for name, module in modules.items() if type(module).__name__ == "AdaLayerNormContinuous"]
        swapped = {f"{name}.linear" for name in continuous}
        parts = {name: (Part(name),) for name in self.layers}
        originals: dict[str, tuple[Part, ...]] = {}
        for cls in type(network).__mro__:
            if cls.__name__ in ORIGINAL_NAMES:
                for original, ours in ORIGINAL_NAMES[cls.__name__](network).items():
                    if all(name in self.layers for name in ours):
                        originals[original] = tuple(Part(name, name in swapped) for name in ours)
        self._dotted = {**parts, **originals}
        self._underscored = _unique(
            (name.replace(".", "_"), found) for names in (parts, originals) for name, found in names.items()
        )

    def find(self, name: str) -> tuple[Part, ...] | None:
        """The layer that a file means.

        Args:
            name: As the file has it, with the file's prefixes.

        Returns:
            The layers of the network that it is, in the order of its rows, or ``None`` if there is no such layer.
        """
        for prefix in _UNDERSCORED:
            if name.startswith(prefix):
                return self._underscored.get(name.removeprefix(prefix))
        while name not in self._dotted:
            prefix = next((prefix for prefix in _DOTTED if name.startswith(prefix)), "")
            if not prefix:
                return None
            name = name.removeprefix(prefix)
        return self._dotted[name]


def _unique(names: Iterable[tuple[str, tuple[Part, ...]]]) -> dict[str, tuple[Part, ...]]:
    # A name that could mean two layers means none.
    found: dict[str, tuple[Part, ...] | None] = {}
    for name, parts in names:
        found[name] = parts if found.get(name, parts) == parts else None
    return {name: parts for name, parts in found.items() if parts is not None}
