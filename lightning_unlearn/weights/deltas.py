"""Deltas of all targets, and a network's loss under θ₀ + δ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import Objective

# What a checkpoint says of its deltas.
CHECKPOINT_KEY = "unlearning"


class DeltaStore(nn.Module):
    """The deltas of all targets, stacked: one parameter ``(Q, *weight)`` for each chosen weight.

    Args:
        parameters: The chosen weights by name; deltas have their dtypes and devices, and start at zero.
        targets: Names of the ``Q`` targets.
    """

    def __init__(self, parameters: Mapping[str, Tensor], targets: Sequence[str]) -> None:
        super().__init__()
        self.targets = list(targets)
        self._names = {name: name.replace(".", "/") for name in parameters}  # a parameter's name must not hold dots
        for name, parameter in parameters.items():
            self.register_parameter(
                self._names[name], nn.Parameter(parameter.new_zeros(len(targets), *parameter.shape))
            )

    def named(self) -> dict[str, Tensor]:
        """The stacked deltas.

        Returns:
            Parameter name in the network to ``(Q, *parameter)``.
        """
        return {name: self.get_parameter(stored) for name, stored in self._names.items()}


def target_weights(parameters: Mapping[str, Tensor], deltas: Mapping[str, Tensor], target: int) -> dict[str, Tensor]:
    """The chosen weights under which a target is unlearned, ``θ₀ + δ``; the base weights are not touched.

    Args:
        parameters: The chosen weights by name.
        deltas: Parameter name to ``(Q, *parameter)``.
        target: Number of the target.

    Returns:
        Parameter name to weight.
    """
    return {name: parameters[name].detach() + deltas[name][target].to(parameters[name].dtype) for name in deltas}


class NetworkLoss(nn.Module):
    """A network with its loss, to be called under other weights.

    Args:
        network: The denoiser.
        objective: Its loss.
    """

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        # Looking for tied weights at every call takes about as long as a small network's forward; they don't change.
        self._tied = self._members(remove_duplicate=False) > self._members(remove_duplicate=True)

    def _members(self, *, remove_duplicate: bool) -> int:
        found = (self.named_parameters, self.named_buffers)
        return sum(1 for members in found for _ in members(remove_duplicate=remove_duplicate))

    def forward(self, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view: ``(B,)``; see :meth:`Objective.__call__`."""
        return self.objective(self.network, batch, timesteps, noise)

    def under(self, weights: Mapping[str, Tensor], batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view under other weights.

        Args:
            weights: Parameter name in the network to weight; the others are the network's own.
            batch: ``B`` latents and texts.
            timesteps: ``(B,)``.
            noise: ``(B, C, H, W)``.

        Returns:
            ``(B,)``.
        """
        named = {f"network.{name}": weight for name, weight in weights.items()}
        losses: Tensor = functional_call(self, named, (batch, timesteps, noise), tie_weights=self._tied)
        return losses


def relative_distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """``‖θ - θ'‖ / ‖θ'‖`` over the weights that both have.

    Args:
        ours: Name to weight.
        theirs: Name to weight.

    Returns:
        The distance, 0 if they share none.
    """
    shared = [name for name in ours if name in theirs]
    difference = sum(
        float((ours[name].detach().cpu().double() - theirs[name].double()).square().sum()) for name in shared
    )
    norm = sum(float(theirs[name].double().square().sum()) for name in shared)
    return float(torch.tensor(difference / norm).sqrt()) if norm else 0.0
