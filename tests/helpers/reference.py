"""Slow, obvious float64 versions of what the package computes, from the formulas; they share no code with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def per_sample_gradients(
    loss_of: Callable[[int], Tensor], parameters: Mapping[str, Tensor], samples: int
) -> dict[str, Tensor]:
    """Each sample's gradient of its own loss, one backward pass a sample: name to ``(samples, *parameter)``."""
    rows = []
    for sample in range(samples):
        found = torch.autograd.grad(loss_of(sample), list(parameters.values()), allow_unused=True)
        rows.append(
            [
                torch.zeros_like(parameter) if gradient is None else gradient
                for gradient, parameter in zip(found, parameters.values(), strict=True)
            ]
        )
    return {name: torch.stack([row[column] for row in rows]) for column, name in enumerate(parameters)}


def sums_of_squares(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Σ_s g_s²`` of ``(samples, *parameter)``."""
    return {
        name: sum((row.square() for row in gradient), torch.zeros_like(gradient[0]))
        for name, gradient in gradients.items()
    }


def diagonal_fisher(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``F_jj = (1/n) Σ_s g_sj²``."""
    return {name: total / len(gradients[name]) for name, total in sums_of_squares(gradients).items()}


def damped_matrix(fisher: Mapping[str, Tensor], damping: float) -> Tensor:
    """The dense matrix ``F + damping · mean(F of the layer) · 1`` over all parameters, one after the other."""
    layers: dict[str, list[Tensor]] = {}
    for name, diagonal in fisher.items():
        layers.setdefault(name.rpartition(".")[0], []).append(diagonal.flatten())
    means = {layer: torch.cat(parts).mean() for layer, parts in layers.items()}
    entries = [diagonal.flatten() + damping * means[name.rpartition(".")[0]] for name, diagonal in fisher.items()]
    return torch.diag(torch.cat(entries))


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector, in their order."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def natural_gradient(gradient: Mapping[str, Tensor], fisher: Mapping[str, Tensor], damping: float) -> Tensor:
    """``(F + damping)⁻¹ g`` as one vector, by solving the dense system."""
    return torch.linalg.solve(damped_matrix(fisher, damping), flat(gradient))


def quadratic(delta: Mapping[str, Tensor], fisher: Mapping[str, Tensor], damping: float) -> Tensor:
    """``δᵀ (F + damping) δ`` with the dense matrix."""
    vector = flat(delta)
    return vector @ damped_matrix(fisher, damping) @ vector


def denoising_loss(
    predict: Callable[[Tensor], Tensor],
    image: Tensor,
    noise: Tensor,
    alpha_bar: float,
    prediction_type: str,
    snr_gamma: float | None = None,
) -> Tensor:
    """One view's loss: ``predict`` gets the noisy image; ``alpha_bar`` is ``alphas_cumprod`` at its timestep."""
    noisy = alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * noise
    target = {
        "epsilon": noise,
        "v_prediction": alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * image,
        "sample": image,
    }[prediction_type]
    loss = ((predict(noisy) - target) ** 2).mean()
    return loss if snr_gamma is None else loss * min_snr_weight(alpha_bar, snr_gamma, prediction_type)


def min_snr_weight(alpha_bar: float, gamma: float, prediction_type: str) -> float:
    """Min-SNR-γ (Hang et al., arXiv 2303.09556, Section 3.4) for one timestep with a signal-to-noise ratio above 0."""
    snr = alpha_bar / (1 - alpha_bar)
    weight = min(snr, gamma)
    return {"epsilon": weight / snr, "v_prediction": weight / (snr + 1), "sample": weight}[prediction_type]
