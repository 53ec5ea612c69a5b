"""Generating with a network, so that a query can be made, and made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions, cast_conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.fingerprints import generator_for

SCHEDULERS = ("DDIMScheduler", "FlowMatchEulerDiscreteScheduler")
"""What the samplers are called in a query's json: that of noise schedules, and that of flows."""

Samplable: TypeAlias = DenoisingObjective | FlowMatchingObjective
"""The objectives whose models :func:`generate` knows how to sample from."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        timestep: Of the training schedule, for a flow the nearest one; it falls from step to step.
        predicted: ``(B, C, H, W)`` the image that the network expects to end at, as seen from here.
        latents: ``(B, C, H, W)`` after the step.
    """

    timestep: int
    predicted: Tensor
    latents: Tensor


def has_sampler(objective: Objective) -> TypeGuard[Samplable]:
    """Whether :func:`generate` can sample from a model that was trained with an objective.

    Args:
        objective: Any.

    Returns:
        Whether it is one of noise schedules or of flows.
    """
    return isinstance(objective, DenoisingObjective | FlowMatchingObjective)


@torch.inference_mode()
def generate(
    network: nn.Module,
    objective: Samplable,
    conditions: Conditions,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int = 40,
) -> Tensor:
    """Generate latents without noise of the sampler's own and without classifier-free guidance.

    By DDIM (Song et al., arXiv 2010.02502, Eq. 12 with σ = 0) for a noise schedule; for a flow by Euler's method, in
    even steps of the scheduler's table, shifted as it says, for a picture's size, too. A guidance-distilled network is
    given the objective's guidance, unless ``guidance`` ``(B, 1)`` is among the conditions.

    Args:
        network: A network of a known family.
        objective: Whose schedule and prediction type it was trained with.
        conditions: What it is conditioned on, name to ``(B, …)``.
        shape: ``(C, H, W)``.
        seeds: ``B`` seeds of the starting noise; a picture depends on its own seed and conditions only.
        steps: Steps of the sampler.

    Returns:
        ``(B, C, H, W)`` latents, not clipped; what they depend on is said by :func:`how_generated`.
    """
    *_, last = trajectory(network, objective, conditions, shape, seeds, steps)
    return last.latents


def trajectory(
    network: nn.Module,
    objective: Samplable,
    conditions: Conditions,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int = 40,
) -> Iterator[Step]:
    """The way on which :func:`generate` comes to its latents.

    Args:
        network: A network of a known family.
        objective: Whose schedule and prediction type it was trained with.
        conditions: What it is conditioned on, name to ``(B, …)``.
        shape: ``(C, H, W)``.
        seeds: ``B`` seeds of the starting noise.
        steps: Steps of the sampler.

    Returns:
        Its steps; the last one's latents are what is generated.
    """
    own = next(network.parameters())
    noise = torch.stack([torch.randn(tuple(shape), generator=generator_for("sampling", seed)) for seed in seeds])
    views = ViewBatch(noise.to(own), cast_conditions(conditions, own.device, own.dtype))
    if isinstance(objective, FlowMatchingObjective):
        return _euler(network, objective, objective.with_guidance(views), steps)
    return _ddim(network, objective, views, steps)


@torch.no_grad()
def _ddim(network: nn.Module, objective: DenoisingObjective, views: ViewBatch, steps: int) -> Iterator[Step]:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(objective.scheduler.config)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(steps, device=views.latents.device)
    latents = views.latents * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = _predict(network, latents, timestep, views)
        made = scheduler.step(prediction, timestep, latents)
        latents = made.prev_sample
        yield Step(int(timestep), made.pred_original_sample, latents)


@torch.no_grad()
def _euler(network: nn.Module, objective: FlowMatchingObjective, views: ViewBatch, steps: int) -> Iterator[Step]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    latents, config = views.latents, objective.scheduler.config
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)  # type: ignore[no-untyped-call]
    family, dynamic = family_of(network), config.use_dynamic_shifting
    shift = family.size_shift(network, config, latents, steps) if dynamic else None
    scheduler.set_timesteps(steps, device=latents.device, mu=shift)
    for number, timestep in enumerate(scheduler.timesteps):
        sigma, following = scheduler.sigmas[number], scheduler.sigmas[number + 1]
        prediction = _predict(network, latents, timestep, views)
        nearest = int((objective.sigmas - float(sigma)).abs().argmin())
        predicted = latents - sigma.to(latents) * prediction
        latents = latents + (following - sigma).to(latents) * prediction
        yield Step(nearest, predicted, latents)


def _predict(network: nn.Module, latents: Tensor, timestep: Tensor, views: ViewBatch) -> Tensor:
    return family_of(network).predict(network, latents, timestep.expand(len(latents)), views)


def how_generated(objective: Samplable, seed: int, steps: int) -> dict[str, Any]:
    """What a query's json says of how :func:`generate` made it.

    Args:
        objective: As given to it.
        seed: Of its noise.
        steps: Of the sampler.

    Returns:
        JSON-like facts.
    """
    name = SCHEDULERS[isinstance(objective, FlowMatchingObjective)]
    return {"seed": seed, "scheduler": name, "steps": steps, "guidance": 1.0}
