"""Where in a checkpoint weights lie: its groups of tensors, and which of these are averages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# As words of a name, so that "schema" and "remaining" are none.
_AVERAGED = re.compile(r"(?<![A-Za-z])ema(?![a-z])|EMA|(?<=[a-z])Ema|(?<![A-Za-z])Ema|[Aa]verag|[Ss]hadow|(?i:\bswa\b)")
_NOT_AVERAGED = re.compile(r"(?i)non[_-]?ema")
# Deeper than any trainer puts weights; a damaged file may be deeper.
_DEPTH = 6
# What PyTorch and SimpleTuner call the numbered averages of diffusers' and torch-ema's states.
_NUMBERED = re.compile(r"shadow_params\.(\d+)")


@dataclass(frozen=True)
class Group:
    """Tensors that lie beside each other.

    Attributes:
        place: Keys that lead there, joined by dots; empty for the top of the file.
        tensors: Name to tensor.
        averaged: Whether they are averages, by where they lie.
        nameless: Whether they have no names but numbers, in the network's order.
    """

    place: str
    tensors: Mapping[str, Tensor]
    averaged: bool
    nameless: bool = False


def says_averaged(name: str) -> bool:
    """Whether a name is one of averaged weights.

    Args:
        name: A key, a prefix or a folder's name.

    Returns:
        Whether it is.

    Example:
        >>> [says_averaged(name) for name in ("unet_ema", "model_ema.", "EMACallback", "shadow_params", "swa_model")]
        [True, True, True, True, True]
        >>> [says_averaged(name) for name in ("state_dict", "schema.", "non_ema", "remaining")]
        [False, False, False, False]
    """
    words = _NOT_AVERAGED.sub("", name).replace("_", " ")
    return _AVERAGED.search(words) is not None


def groups_in(content: Mapping[Any, Any]) -> list[Group]:
    """All groups of tensors in a checkpoint.

    Args:
        content: As it was loaded.

    Returns:
        The groups, those of the top first.
    """
    # Lightning's WeightAveraging keeps the averages where a state dict is looked for, and the trained ones apart.
    swapped = "current_model_state" in content and "state_dict" in content
    return [
        Group(group.place, group.tensors, group.averaged or (swapped and group.place == "state_dict"), group.nameless)
        for group in _groups(content, "", False, _DEPTH)
    ]


def _groups(content: Mapping[Any, Any], place: str, averaged: bool, depth: int) -> Iterator[Group]:
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    numbered = {int(found[1]): tensor for name, tensor in tensors.items() if (found := _NUMBERED.fullmatch(name))}
    named = {name: tensor for name, tensor in tensors.items() if not _NUMBERED.fullmatch(name)}
    if named:
        yield Group(place, named, averaged)
    if numbered:
        in_order = {str(number): numbered[number] for number in sorted(numbered)}
        yield Group(_join(place, "shadow_params"), in_order, True, nameless=True)
    for key, value in content.items():
        here = _join(place, str(key))
        if isinstance(value, Mapping) and depth:
            yield from _groups(value, here, averaged or says_averaged(str(key)), depth - 1)
        elif key == "shadow_params" and isinstance(value, list) and value and all(isinstance(v, Tensor) for v in value):
            yield Group(here, {str(number): tensor for number, tensor in enumerate(value)}, True, nameless=True)


def _join(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key
