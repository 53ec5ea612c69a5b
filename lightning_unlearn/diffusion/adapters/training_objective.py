"""The loss that an adapter's file says it was trained with, beside the one that is measured."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_unlearn.diffusion.adapters.flow_training import flow_settings
from lightning_unlearn.diffusion.adapters.kohya_header import TrainingRecord
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.flow_schedule import is_flow
from lightning_unlearn.diffusion.noise_schedule import scheduler_config
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError


def objective_of_training(
    scheduler: str | None, training: TrainingRecord, network: nn.Module | None = None
) -> DenoisingObjective | FlowMatchingObjective:
    """The objective of a network whose adapter says how it was trained.

    Args:
        scheduler: The folder of the pipeline; ``None`` for the default schedule.
        training: What the adapter's file says.
        network: The network, which may show that the default schedule can't be meant.

    Returns:
        The objective, with the file's weighting of timesteps, or its density and shift of a flow.

    Raises:
        InputError: If the pipeline and the file say different things of what was predicted, or a training by flow
            matching can't be followed.
    """
    if scheduler is None:
        objective_of(None, network)  # refuses a network of a flow, of which nothing here says the table
    elif is_flow(scheduler_config(scheduler)[0]):
        return FlowMatchingObjective(scheduler, **flow_settings(training, network))
    objective = DenoisingObjective(scheduler, snr_gamma=training.min_snr_gamma)
    if training.prediction_type not in {None, objective.prediction_type}:
        raise InputError(
            f"The adapter's header says that it was trained with {training.prediction_type}, but the scheduler of "
            f"{scheduler or 'the default objective'} says {objective.prediction_type}; give the objective that is "
            "right, with its prediction_type."
        )
    return objective


def warn_of_other_loss(objective: Objective, training: TrainingRecord) -> None:
    """Say where an objective that was given is not the training's.

    Args:
        objective: What is measured.
        training: What the adapter's file says.
    """
    if isinstance(objective, FlowMatchingObjective):
        _warn_of_other_flow(objective, training)
    if not isinstance(objective, DenoisingObjective):
        return
    for name, ours, theirs in (
        ("prediction_type", objective.prediction_type, training.prediction_type),
        ("snr_gamma", objective.snr_gamma, training.min_snr_gamma),
    ):
        # What was predicted may not be said; no weighting is said by leaving it out.
        if ours != theirs and not (name == "prediction_type" and theirs is None):
            warnings.warn(
                f"The adapter's header says that it was trained with {name} = {theirs}, but the objective has {ours}; "
                "scores are of the objective's loss."
            )


def _warn_of_other_flow(objective: FlowMatchingObjective, training: TrainingRecord) -> None:
    try:
        theirs = flow_settings(training)
    except InputError:
        return  # what can't be followed has been asked for
    ours = objective.settings()
    ours |= {"density": ours["timestep_density"], **ours["density_numbers"]}
    for name, value in theirs.items():
        # A network that takes no guidance was trained without one, whatever the header says; and numbers of another
        # density can't be compared.
        if ours.get(name) not in {None, value}:
            warnings.warn(
                f"The adapter's header says that it was trained with {name} = {value}, but the objective has "
                f"{ours[name]}; scores are of the objective's loss."
            )
