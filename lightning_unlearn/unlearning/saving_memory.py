"""What lets a large network be unlearned on one accelerator: weights in half the bytes, layers computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.deltas import NetworkLoss

WeightsType = Literal["float32", "bfloat16"]
# ``None`` leaves a network as its files have it.
DTYPES: dict[WeightsType, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


def checkpoint(loss: NetworkLoss, by: Callable[..., Any] | None = None) -> None:
    """Let a network compute its blocks again in the backward pass, in place of keeping what they gave.

    Args:
        loss: Of the network.
        by: What computes a block, now and again in the backward pass; torch's checkpointing by default.

    Raises:
        InputError: If it can't.
    """
    enable = getattr(loss.network, "enable_gradient_checkpointing", None)
    name = type(loss.network).__name__
    if enable is None:
        raise InputError(
            f"{name} has no enable_gradient_checkpointing, as diffusers' networks have; leave checkpointing out."
        )
    try:
        enable() if by is None else enable(by)
    except ValueError as error:  # diffusers
        raise InputError(f"{name} can't be checkpointed; leave checkpointing out.") from error
    loss.checkpointed = True
