"""Slow, obvious versions of the rival methods, from their papers' formulas; they share no code with the package.

One backward pass a view, dense ``(P, P)`` matrices, a loop over samples and queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneView:
    """One view of one sample, unbatched."""

    latent: Tensor
    text: Tensor
    timestep: int
    noise: Tensor


Look = Callable[[OneView], tuple[Tensor, Tensor]]  # a view's loss, a scalar, and prediction (C, H, W)


def value_of(loss: Tensor, prediction: Tensor, output: str) -> Tensor:
    """The output function of one view."""
    entries = prediction.numel()
    return {"loss": loss, "square": (prediction**2).sum() / entries, "mean": prediction.sum() / entries}[output]


def view_gradient(look: Look, view: OneView, parameters: Mapping[str, Tensor], output: str) -> Tensor:
    """The gradient of one view as one vector."""
    loss, prediction = look(view)
    value = value_of(loss, prediction, output)
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(weight) if gradient is None else gradient).flatten()
            for gradient, weight in zip(found, parameters.values(), strict=True)
        ]
    )


def feature(
    look: Look, views: Sequence[OneView], parameters: Mapping[str, Tensor], output: str, *, normalised: bool = False
) -> Tensor:
    """The mean over views of a sample's gradient; with ``normalised`` each view's is divided by its length first."""
    total = torch.zeros(sum(weight.numel() for weight in parameters.values()), dtype=torch.float64)
    for view in views:
        gradient = view_gradient(look, view, parameters, output)
        total = total + (gradient / gradient.norm() if normalised else gradient)
    return total / len(views)


def residual(look: Look, views: Sequence[OneView]) -> float:
    """The mean over views of the root of the loss."""
    return sum(float(look(view)[0].detach()) ** 0.5 for view in views) / len(views)


def second_moments(training: Tensor, ridge: float) -> Tensor:
    """``Σ_i φ_i φ_iᵀ + ridge · mean_i ‖φ_i‖² · 1``, ``(P, P)``."""
    matrix = torch.zeros(training.shape[1], training.shape[1], dtype=torch.float64)
    for row in training:
        matrix += torch.outer(row, row)
    mean = sum(float(row @ row) for row in training) / len(training)
    return matrix + ridge * mean * torch.eye(len(matrix), dtype=torch.float64)


def trak(training: Tensor, queries: Tensor, ridge: float) -> Tensor:
    """``φ(ẑ)ᵀ A⁻¹ φ(z_i)`` for each sample and query."""
    inverse = torch.linalg.inv(second_moments(training, ridge))
    return torch.stack([torch.stack([query @ inverse @ row for query in queries]) for row in training])


def das(
    training: Tensor, queries: Tensor, residuals: Sequence[float], ridge: float, *, leverage: bool, squared: bool
) -> Tensor:
    """``(φ(ẑ)ᵀ A⁻¹ φ(z_i) r_i / (1 - φ(z_i)ᵀ A⁻¹ φ(z_i)))²`` for each sample and query."""
    inverse = torch.linalg.inv(second_moments(training, ridge))
    scores = []
    for row, error in zip(training, residuals, strict=True):
        denominator = 1 - row @ inverse @ row if leverage else torch.ones((), dtype=torch.float64)
        changes = torch.stack([query @ inverse @ row * error / denominator for query in queries])
        scores.append(changes**2 if squared else changes)
    return torch.stack(scores)


def influence(training: Tensor, queries: Tensor, fisher: Tensor) -> Tensor:
    """``g_zᵀ F⁻¹ g_ẑ`` with a dense ``F``."""
    return torch.stack(
        [torch.stack([row @ torch.linalg.solve(fisher, query) for query in queries]) for row in training]
    )


def cosine(ours: Tensor, theirs: Tensor) -> float:
    """Of two vectors or pictures."""
    ours, theirs = ours.double().flatten(), theirs.double().flatten()
    return float((ours * theirs).sum() / ((ours**2).sum() * (theirs**2).sum()) ** 0.5)


def late_interaction(sample: Tensor, query: Tensor) -> float:
    """The mean over the query's tokens of the largest cosine with one of the sample's."""
    return sum(max(cosine(token, other) for other in sample) for token in query) / len(query)
