"""What a user's loss was multiplied with before the backward pass."""

from __future__ import annotations

from operator import attrgetter
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_unlearn.errors import InputError


def trainers_factor(trainer: Trainer) -> float:
    """What undoes what the Trainer multiplied the loss of a backward pass with, while that is still known.

    Args:
        trainer: Whose gradient accumulation and GradScaler are undone.

    Returns:
        A number.
    """
    factor = float(trainer.accumulate_grad_batches)  # Lightning lets it be 1 only with manual optimization
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return factor if scaler is None else factor / float(scaler.get_scale())


def weights_of_samples(pl_module: LightningModule, name: str | None) -> Tensor | None:
    """What the last loss weighted its samples with.

    Args:
        pl_module: The user's module.
        name: Dotted name of the attribute that holds the weights.

    Returns:
        ``(B,)``, a copy; ``None`` without a name.

    Raises:
        InputError: If there are none.
    """
    if name is None:
        return None
    try:
        return torch.as_tensor(attrgetter(name)(pl_module)).detach().clone()
    except AttributeError:
        raise InputError(
            f"{type(pl_module).__name__} has no {name!r}; set it to each sample's weight in training_step."
        ) from None


def own_loss_factor(
    samples: int,
    joined: float,
    reduction: Literal["mean", "sum"],
    loss_scale: float,
    weights: Tensor | None,
    name: str | None,
) -> float | Tensor:
    """What a sample's captured gradient is multiplied with to be that of its own loss.

    Args:
        samples: In the step.
        joined: How many of them a mean joins.
        reduction: How the loss joins them.
        loss_scale: A constant factor of the loss.
        weights: Each sample's weight, if they have any.
        name: The name of the attribute that holds them, for messages.

    Returns:
        A number, or ``(samples,)``; 0 for samples of weight 0.

    Raises:
        InputError: If there is not one weight a sample.
    """
    factor = 1.0 / loss_scale
    if reduction == "mean":
        factor *= joined
    if weights is None:
        return factor
    if weights.shape != (samples,):
        raise InputError(
            f"{name!r} has shape {tuple(weights.shape)}, but the batch has {samples} samples; "
            "it must hold one weight a sample."
        )
    return torch.where(weights == 0, 0.0, factor / weights)
