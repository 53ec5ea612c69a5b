"""What a network's calls take in memory, found without memory: the call is made on torch's meta device.

A tensor there has a shape and no numbers, so that a network of twelve thousand million weights is called in a second.
Storages live and die as they do anywhere, and their bytes are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class CallMemory:
    """The largest number of bytes that a call of a network holds at a time, besides weights and inputs.

    Attributes:
        fixed: Whatever the number of views.
        each: For each view more.
    """

    fixed: int
    each: int

    def of(self, views: int) -> int:
        """Of so many views in one call.

        Args:
            views: Their number.

        Returns:
            Bytes.
        """
        return self.fixed + views * self.each


def call_memory(call: Callable[[int], Any]) -> CallMemory:
    """Measure a call at two numbers of views.

    Args:
        call: Makes the call for a number of views, on any device; what it returns is held until the end.

    Returns:
        What it takes.
    """
    few, more = (peak_bytes(partial(call, views)) for views in (2, 4))
    each = max(0, (more - few) // 2)
    return CallMemory(max(0, few - 2 * each), each)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The largest number of bytes that a call's own tensors take at a time.

    Args:
        call: What is run; attention is counted as a fused kernel has it, which never holds its products.

    Returns:
        Bytes, of storages that were made while it ran.
    """
    living = _Living()
    with FusedAttention(), living:
        kept = call()
    del kept
    return living.peak


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage_key(tensor) for tensor in _tensors((arguments, keywords or {}))}
        result = function(*arguments, **(keywords or {}))
        for tensor in _tensors(result):
            key = _storage_key(tensor)
            # A view shares its storage with what it is of.
            if key not in given and key not in self._known:
                self._add(tensor.untyped_storage(), key)
        return result

    def _add(self, storage: torch.UntypedStorage, key: int) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(torch.autograd.Function):
    """The shapes of attention, and what a fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = query.new_empty(*query.shape[:-1], value.shape[-1])
        context.save_for_backward(query, key, value, made)
        return made

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class FusedAttention(TorchFunctionMode):
    """While it is on, attention on the meta device holds what a fused kernel holds, not all its products."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        named = keywords or {}
        if function is nn.functional.scaled_dot_product_attention:
            tensors = [*arguments[:3], *(named[name] for name in ("query", "key", "value") if name in named)]
            if all(tensor.is_meta for tensor in tensors):
                return _Attention.apply(*tensors)  # type: ignore[no-untyped-call]
        return function(*arguments, **named)


def recomputed(block: Callable[..., Any], *inputs: Any) -> Any:
    """A block of a network that the backward pass computes once more, in which attention must be counted alike.

    Args:
        block: What is computed.
        *inputs: Of it.

    Returns:
        What it gives.
    """
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors take.

    Args:
        tensors: Any, of any device.

    Returns:
        Bytes.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
