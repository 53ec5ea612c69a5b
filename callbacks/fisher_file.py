"""When a training's Fisher is worth a file, and what the file says of the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.fisher.early import of_the_product, with_eigenvalues
from lightning_unlearn.fisher.ekfac import EKFACFisher
from lightning_unlearn.weights.parameters import layer_parameters


def completed(total: Fisher, product: Mapping[str, Any] | None) -> Fisher | None:
    """A Fisher that can be used after training; a warning says what it lacks.

    Args:
        total: Over all ranks.
        product: What an EKFAC Fisher is without any sample in its second stage.

    Returns:
        It; for an EKFAC Fisher whose training ended before the eigenvalues, one with those of the Kronecker product;
        nothing without any sample.
    """
    if isinstance(total, EKFACFisher) and total.stage == total.stages[-1] and total.count == 0 and product is not None:
        total = with_eigenvalues(total, product)
        if total.count > 0:
            return _told_of(total, f"came to {total.stage} after {total.stages[0]} of {total.count} samples")
    if total.count == 0:
        rank_zero_warn(
            "FisherAccumulator took no batch: start_step or start_epoch lies past the end of training, no gradient was "
            "finite, or no optimizer step took the chosen weights' gradients. No Fisher is written."
        )
        return None
    if isinstance(total, EKFACFisher) and total.stage != total.stages[-1]:
        return _told_of(of_the_product(total), f"took {total.stage} of {total.count} samples")
    return total


def _told_of(early: EKFACFisher, done: str) -> EKFACFisher:
    """A Fisher of the product, with a warning and a note that it is one."""
    rank_zero_warn(
        f"FisherAccumulator {done}, but training ended before {early.stages[-1]} of any. The Fisher that is written "
        "has the eigenvalues of the Kronecker product (K-FAC), scaled to each layer's mean squared gradient: coarser "
        "than EKFAC. For that, let the eigenvalues start earlier by eigenvalue_step or eigenvalue_epoch, or run "
        "`lightning-unlearn fisher` afterwards."
    )
    early.provenance["eigenvalues"] = "of the Kronecker product of the covariances (K-FAC), to the measured trace"
    return early


def write_fisher(
    total: Fisher,
    layers: Mapping[str, nn.Module],
    trainer: Trainer,
    module: LightningModule,
    path: Path,
    about: Mapping[str, Any],
) -> None:
    """Write the file of a training; every rank must call it.

    Args:
        total: Over all ranks.
        layers: The chosen layers.
        trainer: Of the training.
        module: That was trained.
        path: The file.
        about: What else it says.
    """
    total.weights = {name: _whole(parameter.detach()) for name, parameter in layer_parameters(layers).items()}
    total.provenance |= {**facts_of_training(trainer, module), **about}
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info("fast_dev_run: no Fisher is written, as no checkpoint is.")
        return
    if trainer.is_global_zero:
        total.save(path)
    rank_zero_info(f"Fisher of {total.count} samples written to {path}")


def _whole(weight: Tensor) -> Tensor:
    """A weight that may be sharded over ranks (FSDP2), whole on each."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def facts_of_training(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What a Fisher's file says of the training that it is from.

    Args:
        trainer: Of the training.
        module: That was trained.

    Returns:
        The module's class, whether weights were averaged beside it, and its objective if it has one of this package.
    """
    callbacks = getattr(trainer, "callbacks", [])
    averaging = WeightAveraging | StochasticWeightAveraging
    facts: dict[str, Any] = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "averaged_weights_in_run": any(isinstance(callback, averaging) for callback in callbacks),
    }
    objective = getattr(module, "objective", None)
    if isinstance(objective, Objective):
        facts["objective"] = objective.settings()
    return facts
