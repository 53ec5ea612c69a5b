"""Weights that lie in half precision, and are computed with in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HALF = (torch.bfloat16, torch.float16)


def half_type(network: nn.Module) -> torch.dtype | None:
    """The half precision that some of a network's weights are kept in.

    Args:
        network: The network.

    Returns:
        The type, ``None`` if all are wider.
    """
    return next((weight.dtype for weight in network.parameters() if weight.dtype in HALF), None)


class WidenedWeights:
    """While it lasts, a network whose weights are half precision computes in float32.

    Each module's own weights are widened for its own call only, so that one layer at a time is held in both. What is
    rounded so are the weights, once, which moves a loss but leaves its changes what they are; arithmetic in half
    precision would drown them, as a training image's loss rises by some 1e-4 of itself.

    Args:
        network: The network; its weights stay what they are.
    """

    def __init__(self, network: nn.Module) -> None:
        self._rounded: dict[int, dict[str, nn.Parameter | None]] = {}
        self._handles: list[RemovableHandle] = []
        for module in network.modules():
            if any(weight.dtype in HALF for weight in module.parameters(recurse=False)):
                self._handles.append(module.register_forward_pre_hook(self._widen, prepend=True, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._round_again, always_call=True))

    def remove(self) -> None:
        """Let the network compute in its own precision again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _widen(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        own = dict(module._parameters)
        self._rounded[id(module)] = own
        for name, weight in own.items():
            if weight is not None and weight.dtype in HALF:
                # Not detached: a weight that is chosen has a gradient.
                module._parameters[name] = weight.float()  # type: ignore[assignment]
        # Networks cast what they make of timesteps to the type that their weights have.
        return tuple(map(_wide, arguments)), {name: _wide(value) for name, value in named.items()}

    def _round_again(self, module: nn.Module, arguments: Any, output: Any) -> None:
        module._parameters.update(self._rounded.pop(id(module), {}))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
