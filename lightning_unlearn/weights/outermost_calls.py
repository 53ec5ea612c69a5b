"""Which uses of layers belong to one call of their network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class OutermostCalls:
    """Numbers the calls of a network, or of a part of it where that is called by itself.

    A block that is used several times within one call of its network does not begin a new one; a network that is called
    twice in one loss does.

    Args:
        network: Whose calls are numbered; without one, each use of a layer is a call of its own.
        names: Of the layers in it whose surroundings are watched.
    """

    def __init__(self, network: nn.Module | None, names: Iterable[str]) -> None:
        self._around = _ancestors(network, set(names)) if network is not None else []
        self._number = 0
        self._open: list[bool] = []  # the calls going on: whether each is one of the network's own
        self._silent: dict[str, set[int]] = {}  # layer to the calls in which it was used without a gradient

    def attach(self) -> list[RemovableHandle]:
        """Put the hooks on.

        Returns:
            Their handles.
        """
        handles: list[RemovableHandle] = []
        for module in self._around:
            handles.append(module.register_forward_pre_hook(self._enter))
            # Also when a forward pass is broken off, as checkpointing does when it has what it needs.
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        # Lightning sends a whole training step through forward so that DistributedDataParallel sees it.
        own = "_ForwardRedirection" not in getattr(vars(module).get("forward"), "__qualname__", "")
        self._number += own and not any(self._open)
        self._open.append(own)

    def _leave(self, *arguments: Any) -> None:
        if self._open:
            self._open.pop()

    def of_a_use(self, layer: str, *, differentiable: bool) -> int:
        """The call that a layer's use belongs to.

        Args:
            layer: Its name.
            differentiable: Whether a gradient will come to the use. One that gets none may be run again during
                backward by checkpointing: if all of them were in one call, so are those.

        Returns:
            The call's number.
        """
        silent = self._silent.setdefault(layer, set())
        if differentiable and torch._C._current_graph_task_id() != -1 and len(silent) == 1:  # during backward
            return next(iter(silent))
        self._number += not any(self._open)
        if not differentiable:
            silent.add(self._number)
        return self._number

    def clear(self) -> None:
        """Start to count anew; no call may be going on."""
        self._number = 0
        self._open.clear()
        self._silent.clear()


def _ancestors(network: nn.Module, layers: set[str]) -> list[nn.Module]:
    """The modules around the layers, and the network."""
    names = {""}
    for name in layers:
        parts = name.split(".")
        names |= {".".join(parts[:length]) for length in range(1, len(parts))}
    return [network.get_submodule(name) for name in sorted(names - layers)]
