"""Checkpoints that hold more than tensors and plain types: the rest becomes placeholders, and nothing is run.

A Lightning checkpoint keeps the hyper-parameters of a training beside its weights, and these may be anything: settings
of OmegaConf, paths, functions with some of their arguments. Only the tensors are wanted. PyTorch's own restricted
unpickler is told that each foreign name in the file stands for a class that keeps what it is given and does nothing;
what the name stands for elsewhere is never imported, looked up or called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class Placeholder:
    """Stands for an object of a class that is not known here; takes everything and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> Placeholder:
        """Make one, whatever the class was called with."""
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Keep nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


class _Attribute(Placeholder):
    """Stands for ``getattr``, by which methods are named: what it gives is called, so it gives a class."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return Placeholder


def load_inert(path: str) -> Any:
    """Load a checkpoint with placeholders for what is no tensor and no plain type.

    Args:
        path: An archive as ``torch.save`` writes it.

    Returns:
        Its content.

    Raises:
        Exception: What PyTorch raises where it can't be read so, too.
    """
    # One class a name: PyTorch compares classes to know which it was told of.
    placeholders: list[Any] = [(Placeholder, f"{Placeholder.__module__}.{Placeholder.__name__}")]
    for name in get_unsafe_globals_in_checkpoint(path):
        base = _Attribute if name == "builtins.getattr" else Placeholder
        placeholders.append((type(name, (base,), {}), name))
    with safe_globals(placeholders):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
