"""The objective of a model whose files say with which it was trained."""

from __future__ import annotations

from torch import nn

from lightning_unlearn.diffusion.families import FAMILIES
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.flow_schedule import is_flow
from lightning_unlearn.diffusion.noise_schedule import scheduler_config
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError


def objective_of(folder: str | None, network: nn.Module | None = None) -> DenoisingObjective | FlowMatchingObjective:
    """The objective that a pipeline's scheduler stands for.

    Args:
        folder: A pipeline's, or that of a saved scheduler; ``None`` for the schedule of Ho et al. (arXiv 2006.11239).
        network: The denoiser, which may show that this schedule can't be meant.

    Returns:
        Flow matching or a noise schedule.

    Raises:
        InputError: If the scheduler can't be read or is not known, or there is none and the network is of a family of
            flows.
    """
    if folder is not None:
        return FlowMatchingObjective(folder) if is_flow(scheduler_config(folder)[0]) else DenoisingObjective(folder)
    for family in FAMILIES:
        if network is not None and family.flow is not None and family.knows(network):
            raise InputError(
                f"{family.title} is trained by flow matching, and nothing here says with which table of sigmas; give "
                "the pipeline's folder as the network, or a FlowMatchingObjective."
            )
    return DenoisingObjective()
