"""What each family's tests ask: the same call as the pipeline's, rows that don't mind each other, the right loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pipeline_oracle import NetworkCall
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.objective import DenoisingObjective


def repeated(numbers: dict[str, list[Any]], count: int) -> Conditions:
    """Numbers of a sample's json as conditions of ``count`` views."""
    return {name: torch.tensor([listed] * count) for name, listed in numbers.items()}


@torch.no_grad()
def assert_same_prediction(
    network: nn.Module, conditions: Conditions, call: NetworkCall, latents: Tensor, timestep: Any, rows: slice
) -> None:
    """Ours, of the same latents and timestep, is the pipeline's; in a batch and alone."""
    family = family_of(network)
    noisy = latents[rows]
    timesteps = torch.as_tensor(timestep).flatten()[:1].expand(len(noisy))
    theirs = call.output[rows][:, : noisy.shape[1]]
    ours = family.predict(network, noisy, timesteps, ViewBatch(noisy, conditions))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for row in range(len(noisy)):
        one = {name: array[row : row + 1] for name, array in conditions.items()}
        alone = family.predict(network, noisy[row : row + 1], timesteps[:1], ViewBatch(noisy[row : row + 1], one))
        torch.testing.assert_close(alone[0], theirs[row], rtol=1e-5, atol=1e-5)


def assert_training_loss(
    network: nn.Module, conditions: Conditions, config: dict[str, Any], predict: Any, shape: Sequence[int]
) -> None:
    """The loss in float64 is that of the training script, written out row by row: the mean squared error of ε or v.

    ``predict`` calls the network as the script does, with one row of the conditions.
    """
    network = network.double()
    count = len(next(iter(conditions.values()))) if conditions else 2
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(count, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    timesteps = torch.tensor([17, 900, 400])[:count]
    given = {name: array.double() if array.is_floating_point() else array for name, array in conditions.items()}
    objective = DenoisingObjective(config)
    with torch.no_grad():
        found = objective(network, ViewBatch(latents, given), timesteps, noise)
        for row, timestep in enumerate(timesteps.tolist()):
            bar = objective.scheduler.alphas_cumprod.double()[timestep]
            noisy = bar.sqrt() * latents[row] + (1 - bar).sqrt() * noise[row]
            target = noise[row]
            if config.get("prediction_type") == "v_prediction":
                target = bar.sqrt() * noise[row] - (1 - bar).sqrt() * latents[row]
            one = {name: array[row : row + 1] for name, array in given.items()}
            prediction = predict(network, noisy[None], timesteps[row : row + 1], one)[0, : shape[0]]
            # The schedule is diffusers', which takes its roots in float32.
            torch.testing.assert_close(found[row], (prediction - target).square().mean(), rtol=1e-5, atol=1e-6)
    network.float()
