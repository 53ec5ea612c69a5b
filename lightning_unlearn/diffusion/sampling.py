"""Generating with a network, so that a query can be made, and made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.fingerprints import generator_for


@dataclass(frozen=True)
class Step:
    """One step of a sampler.

    Attributes:
        timestep: Of the training schedule; it falls from step to step.
        predicted: ``(B, C, H, W)`` the image that the network expects to end at, as seen from here.
        latents: ``(B, C, H, W)`` after the step.
    """

    timestep: int
    predicted: Tensor
    latents: Tensor


@torch.inference_mode()
def generate(
    network: nn.Module,
    objective: DenoisingObjective,
    text: Tensor,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int = 40,
) -> Tensor:
    """Generate latents by DDIM, without noise of its own and without guidance.

    Song et al. (arXiv 2010.02502, Eq. 12 with σ = 0).

    Args:
        network: A network of a known family.
        objective: Whose schedule and prediction type it was trained with.
        text: ``(B, tokens, dim)``.
        shape: ``(C, H, W)``.
        seeds: ``B`` seeds of the starting noise; a picture depends on its own seed and text only.
        steps: Steps of the sampler.

    Returns:
        ``(B, C, H, W)`` latents, not clipped; what they depend on is said by :func:`how_generated`.
    """
    *_, last = trajectory(network, objective, text, shape, seeds, steps)
    return last.latents


@torch.no_grad()
def trajectory(
    network: nn.Module,
    objective: DenoisingObjective,
    text: Tensor,
    shape: Sequence[int],
    seeds: Sequence[int],
    steps: int = 40,
) -> Iterator[Step]:
    """The way on which :func:`generate` comes to its latents.

    Args:
        network: A network of a known family.
        objective: Whose schedule and prediction type it was trained with.
        text: ``(B, tokens, dim)``.
        shape: ``(C, H, W)``.
        seeds: ``B`` seeds of the starting noise.
        steps: Steps of the sampler.

    Yields:
        Its steps; the last one's latents are what is generated.
    """
    from diffusers import DDIMScheduler

    parameter = next(network.parameters())
    scheduler: Any = DDIMScheduler.from_config(objective.scheduler.config)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(steps, device=parameter.device)
    noise = [torch.randn(tuple(shape), generator=generator_for("sampling", seed)) for seed in seeds]
    latents: Tensor = torch.stack(noise).to(parameter) * scheduler.init_noise_sigma
    views = ViewBatch(latents, {"text": text.to(parameter)})
    for timestep in scheduler.timesteps:
        prediction = family_of(network).predict(network, latents, timestep.expand(len(latents)), views)
        made = scheduler.step(prediction, timestep, latents)
        latents = made.prev_sample
        yield Step(int(timestep), made.pred_original_sample, latents)


def how_generated(seed: int, steps: int) -> dict[str, Any]:
    """What a query's json says of how :func:`generate` made it.

    Args:
        seed: Of its noise.
        steps: Of the sampler.

    Returns:
        JSON-like facts.
    """
    return {"seed": seed, "scheduler": "DDIMScheduler", "steps": steps, "guidance": 1.0}
