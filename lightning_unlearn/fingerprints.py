"""What identifies weights, settings and random streams: blake2b digests of names and bytes, never ``hash()``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def digest(*parts: str | int | float) -> str:
    """Hex digest (128 bits) of a sequence of names and numbers.

    Every part is preceded by its length, so that ``("ab", "c")`` and ``("a", "bc")`` differ.

    Args:
        *parts: What to digest, in order.

    Returns:
        32 hexadecimal characters.

    Example:
        >>> digest("ab", "c") != digest("a", "bc")
        True
    """
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = repr(part).encode()
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return state.hexdigest()


def seed_of(*parts: str | int | float) -> int:
    """A seed in ``[0, 2**63)`` for ``torch.Generator.manual_seed``, the same on every machine.

    Args:
        *parts: The names and numbers that key the stream, e.g. ``("scoring", seed, view)``.

    Returns:
        The seed.
    """
    return int(digest(*parts)[:16], 16) >> 1


def generator_for(*parts: str | int | float) -> torch.Generator:
    """A CPU generator whose state is a pure function of ``parts``.

    Draws are always made on the CPU, so that they agree between a CPU and a GPU.

    Args:
        *parts: The names and numbers that key the stream.

    Returns:
        A seeded CPU generator.
    """
    return torch.Generator("cpu").manual_seed(seed_of(*parts))


def tensors_digest(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named tensors: names, dtypes, shapes and bytes, independent of their order and device.

    Args:
        tensors: Name to tensor, of any shape.

    Returns:
        32 hexadecimal characters.
    """
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(items, key=lambda item: item[0]):
        tensor = tensor.detach().cpu().contiguous()
        state.update(digest(name, str(tensor.dtype), str(tuple(tensor.shape))).encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of JSON-like settings, independent of the order of their keys.

    Args:
        settings: Anything ``json`` can write.

    Returns:
        32 hexadecimal characters.
    """
    return digest(json.dumps(settings, sort_keys=True))


def public_name(dotted: str) -> str:
    """What a class is called in whatever is kept: one of this package by the package's name and its own.

    Modules may move; a run, a Fisher or a study from before is still known.

    Args:
        dotted: A class's dotted name; any other text stays as it is.

    Returns:
        The name that it is kept by.

    Example:
        >>> public_name("lightning_unlearn.diffusion.objective.DenoisingObjective")
        'lightning_unlearn.DenoisingObjective'
    """
    return re.sub(r"^lightning_unlearn\.(?:[a-z_]+\.)*([A-Z]\w*)$", r"lightning_unlearn.\1", dotted)
