"""What a user's loss was multiplied with before the backward pass."""

from __future__ import annotations

from operator import attrgetter
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_unlearn.errors import InputError


def own_loss_factor(
    trainer: Trainer,
    pl_module: LightningModule,
    rows: int,
    reduction: Literal["mean", "sum"],
    loss_scale: float,
    sample_weights: str | None,
) -> float | Tensor:
    """What a sample's captured gradient is multiplied with to be that of its own loss.

    Args:
        trainer: Whose gradient accumulation and GradScaler are undone.
        pl_module: The user's module.
        rows: Samples in the batch.
        reduction: How the loss joins them.
        loss_scale: A constant factor of the loss.
        sample_weights: Dotted name of the attribute that holds each sample's weight.

    Returns:
        A number, or ``(rows,)``; 0 for samples of weight 0.

    Raises:
        InputError: If there are no such weights, or not one a sample.
    """
    factor = 1.0 / loss_scale
    if reduction == "mean":
        factor *= rows
    factor *= trainer.accumulate_grad_batches  # Lightning lets it be 1 only with manual optimization
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        factor /= float(scaler.get_scale())
    if sample_weights is None:
        return factor
    try:
        weights = torch.as_tensor(attrgetter(sample_weights)(pl_module)).detach()
    except AttributeError:
        raise InputError(
            f"{type(pl_module).__name__} has no {sample_weights!r}; set it to each sample's weight in training_step."
        ) from None
    if weights.shape != (rows,):
        raise InputError(
            f"{sample_weights!r} has shape {tuple(weights.shape)}, but the batch has {rows} samples; "
            "it must hold one weight a sample."
        )
    return torch.where(weights == 0, 0.0, factor / weights)
