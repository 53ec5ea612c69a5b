"""What in a training leaves no gradient that is one sample's own."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import LBFGS, Optimizer

from lightning_unlearn.errors import InputError


def holds(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether an optimizer steps any of some parameters.

    Args:
        optimizer: Any.
        parameters: Some.

    Returns:
        Whether it does.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(parameter) in held for parameter in parameters)


def refuse_repeated_closures(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Refuse optimizers that take several backward passes of the same samples, at other weights, for one step.

    Args:
        optimizers: Of the training.
        parameters: The chosen ones.

    Raises:
        InputError: If there is one.
    """
    parameters = list(parameters)
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS) and holds(optimizer, parameters):
            raise InputError(
                "LBFGS runs several backward passes a step, at weights that it only tries, so they count for nothing; "
                "train with another optimizer, or run `lightning-unlearn fisher` afterwards."
            )


def refuse_batch_norm(network: nn.Module, target: str) -> None:
    """Refuse a network in which a sample's loss depends on the others in its batch.

    Args:
        network: Of which gradients are captured.
        target: Its dotted name, for messages.

    Raises:
        InputError: If it has a BatchNorm in training mode.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            raise InputError(
                f"{type(module).__name__} {name} of {target!r} is in training mode, so a sample's loss depends on the "
                "others in its batch and has no gradient of its own; set it to eval mode, use GroupNorm, or run "
                "`lightning-unlearn fisher` afterwards, which has the network in eval mode."
            )


def trains_nothing(optimizers: Iterable[Optimizer], module: LightningModule) -> bool:
    """Whether a fit has no optimizer for any parameter, and so is a pass for its gradients alone.

    Args:
        optimizers: Of the Trainer.
        module: That it fits.

    Returns:
        Whether that is so.
    """
    return not any(holds(optimizer, module.parameters()) for optimizer in optimizers)
