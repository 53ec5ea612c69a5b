"""Sums over samples, in place."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(sums: dict[str, Tensor], name: str, addend: Tensor) -> None:
    """Add to a sum, in place where it lies where the addend does and in a type that holds both; else it goes there.

    Args:
        sums: Name to tensor; the one may be replaced.
        name: Which.
        addend: Of its shape.
    """
    total = sums[name]
    wide = torch.promote_types(total.dtype, addend.dtype)
    if total.device != addend.device or total.dtype != wide:
        total = sums[name] = total.to(addend.device, wide)
    total += addend
