"""Tensors that are stored once although they stand in a file under several names.

All layers that read the text have the same inputs, and so the same basis: in Stable Diffusion 1 it would fill 75 of an
EKFAC Fisher's 90 MB of keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_unlearn.fingerprints import tensors_digest


def without_copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each content once.

    Args:
        tensors: By name.

    Returns:
        The first tensor of each content, and the names of all others with that of the first.

    Example:
        >>> import torch
        >>> kept, copies = without_copies({"a": torch.ones(2), "b": torch.zeros(2), "c": torch.ones(2)})
        >>> list(kept), copies
        (['a', 'b'], {'c': 'a'})
    """
    first: dict[str, str] = {}
    kept: dict[str, Tensor] = {}
    copies: dict[str, str] = {}
    for name, tensor in tensors.items():
        content = tensors_digest({"": tensor})
        if content in first:
            copies[name] = first[content]
        else:
            first[content], kept[name] = name, tensor
    return kept, copies


def with_copies(kept: Mapping[str, Tensor], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """What :func:`without_copies` left out, put back, in memory of its own: sums are added to in place.

    Args:
        kept: By name.
        copies: Name to the name of a tensor in ``kept``.

    Returns:
        All tensors.
    """
    return {**kept, **{name: kept[first].clone() for name, first in copies.items() if first in kept}}
