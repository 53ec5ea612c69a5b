"""When a training's Fisher is worth a file, and what the file says of the training."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.fisher import Fisher


def is_complete(total: Fisher) -> bool:
    """Whether a Fisher can be used after training; a warning says why it can't.

    Args:
        total: Over all ranks.

    Returns:
        Whether it has samples and came to its last stage.
    """
    if total.count == 0:
        rank_zero_warn(
            "FisherAccumulator took no batch: start_step or start_epoch lies past the end of training, or no "
            "gradient was finite. No Fisher is written."
        )
        return False
    if total.stages and total.stage != total.stages[-1]:
        rank_zero_warn(
            f"FisherAccumulator took {total.stage} of {total.count} samples, but training ended before "
            f"{total.stages[-1]}; let them start earlier by eigenvalue_step or eigenvalue_epoch. No Fisher is "
            "written."
        )
        return False
    return True


def facts_of_training(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What a Fisher's file says of the training that it is from.

    Args:
        trainer: Of the training.
        module: That was trained.

    Returns:
        The module's class, whether weights were averaged beside it, and its objective if it has one of this package.
    """
    callbacks = getattr(trainer, "callbacks", [])
    facts: dict[str, Any] = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "averaged_weights_in_run": any(isinstance(callback, WeightAveraging) for callback in callbacks),
    }
    objective = getattr(module, "objective", None)
    if isinstance(objective, Objective):
        facts["objective"] = objective.settings()
    return facts
