"""The oracle of a network family: what its own diffusers pipeline hands the network while it generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class NetworkCall:
    """One call of a network: its arguments and what it gave."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[NetworkCall]]:
    """While it lasts, each call of the network is noted; tensors are copied, since pipelines change them in place."""
    calls: list[NetworkCall] = []

    def note(_: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        calls.append(NetworkCall(_copied(arguments), _copied(keywords), _copied(first)))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part) for part in value)
    return value


def first_middle_last(calls: list[NetworkCall]) -> list[NetworkCall]:
    """Three of a generation's calls."""
    return [calls[0], calls[len(calls) // 2], calls[-1]]


def assert_same_call(ours: NetworkCall, theirs: NetworkCall, rows: slice = slice(None)) -> None:
    """Both calls handed the network the same and got the same; ``rows`` are those of theirs that ours asked for."""
    torch.testing.assert_close(ours.output, theirs.output[rows], rtol=1e-5, atol=1e-5)
