"""Slow, obvious float64 versions of what the package computes, from the formulas; they share no code with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


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


def positions(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> list[Tensor]:
    """What a layer multiplies its weight with at each position of one sample, a 1 appended if it has a bias."""
    if isinstance(layer, nn.Linear):
        found = list(inputs.reshape(-1, inputs.shape[-1]))
    else:
        padding, (down, across) = layer.padding, layer.stride
        assert not isinstance(padding, str)
        channels, height, width = inputs.shape
        padded = torch.zeros(channels, height + 2 * padding[0], width + 2 * padding[1], dtype=inputs.dtype)
        padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = inputs
        rows, columns = layer.kernel_size
        found = [
            padded[:, top : top + rows, left : left + columns].flatten()
            for top in range(0, padded.shape[1] - rows + 1, down)
            for left in range(0, padded.shape[2] - columns + 1, across)
        ]
    return [torch.cat([a, torch.ones(1, dtype=a.dtype)]) for a in found] if layer.bias is not None else found


def kronecker_factors(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, output_gradients: Tensor
) -> tuple[Tensor, Tensor, int]:
    """``Σ_s Σ_t a aᵀ`` and ``Σ_s Σ_t g gᵀ`` of all samples, and the number of positions."""
    vectors = [a for sample in inputs for a in positions(layer, sample)]
    if isinstance(layer, nn.Conv2d):
        gradients = [g for sample in output_gradients for g in sample.flatten(1).T]
    else:
        gradients = [g for sample in output_gradients for g in sample.reshape(-1, sample.shape[-1])]
    assert len(vectors) == len(gradients)
    return sum_of([torch.outer(a, a) for a in vectors]), sum_of([torch.outer(g, g) for g in gradients]), len(vectors)


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Their sum."""
    return sum(tensors[1:], tensors[0])


def joined(weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's weight and bias as one vector: the rows of ``(o, i + 1)`` one after the other."""
    rows = weight.reshape(len(weight), -1)
    return (rows if bias is None else torch.cat([rows, bias[:, None]], 1)).flatten()


def dense_fisher(gradients: Tensor) -> Tensor:
    """``(1/n) Σ_s g_s g_sᵀ`` of ``(n, numel)``."""
    return sum_of([torch.outer(g, g) for g in gradients]) / len(gradients)


def kfac_fisher(inputs: Tensor, outputs: Tensor, samples: int, positions: int) -> Tensor:
    """K-FAC (Grosse and Martens, arXiv 1602.01407): the Kronecker product of the two mean factors."""
    return torch.kron(outputs / samples, inputs / positions)


def ekfac_fisher(inputs: Tensor, outputs: Tensor, gradients: Tensor) -> Tensor:
    """``U diag(Λ) Uᵀ`` with ``U = U_S ⊗ U_A`` and ``Λ = (1/n) Σ_s (Uᵀ g_s)²`` (arXiv 1806.03884, Eqs. 10 and 11)."""
    basis = torch.kron(torch.linalg.eigh(outputs).eigenvectors, torch.linalg.eigh(inputs).eigenvectors)
    eigenvalues = sum_of([(basis.T @ g).square() for g in gradients]) / len(gradients)
    return basis @ torch.diag(eigenvalues) @ basis.T


def damped(matrix: Tensor, damping: float) -> Tensor:
    """A layer's matrix with a share of its mean eigenvalue added."""
    return matrix + damping * torch.linalg.eigvalsh(matrix).mean() * torch.eye(len(matrix), dtype=matrix.dtype)


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


def gauss_newton(
    predict: Callable[[Mapping[str, Tensor]], Tensor], parameters: Mapping[str, Tensor], shares: Tensor, weight: float
) -> Tensor:
    """``(2 w / Σ m) Jᵀ diag(m) J`` of one view over all parameters, one after the other (arXiv 1412.1193, Section 9).

    ``predict`` gets the parameters; ``shares`` is m, of the prediction's shape, and ``weight`` the loss's w.
    """
    jacobians = torch.func.jacrev(predict)(dict(parameters))
    rows = torch.cat([jacobians[name].reshape(shares.numel(), -1) for name in parameters], 1)
    return 2 * weight / shares.sum() * rows.T @ torch.diag(shares.flatten()) @ rows
