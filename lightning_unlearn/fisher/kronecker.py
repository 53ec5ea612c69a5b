"""A layer's weight and bias as one matrix, and the Kronecker factors of its Fisher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.diagonal import sum_of_squares
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec

# The two factors of a layer, in float32, must fit in this: sides up to some 16,000. Their eigendecompositions, in
# float64, take several times as much for a while.
FACTOR_BYTES = 2**30


def matrix_shape(spec: LayerSpec) -> tuple[int, int]:
    """The shape of weight and bias as one matrix, the bias a further column.

    Args:
        spec: The layer.

    Returns:
        ``(o, i)``, with a bias ``(o, i + 1)``.
    """
    return spec.weight_shape[0], math.prod(spec.weight_shape[1:]) + spec.has_bias


def refuse_what_does_not_fit(spec: LayerSpec) -> None:
    """Refuse a layer whose factors would be too large.

    Args:
        spec: The layer.

    Raises:
        InputError: If the factors do not fit in ``FACTOR_BYTES``.
    """
    outputs, inputs = matrix_shape(spec)
    size = 4 * (outputs**2 + inputs**2)
    if size > FACTOR_BYTES:
        raise InputError(
            f"The EKFAC factors of layer {spec.name} are {inputs} × {inputs} and {outputs} × {outputs}, "
            f"{size / 2**30:.2f} GiB in float32, above the limit of {FACTOR_BYTES / 2**30:.2f} GiB a layer; leave the "
            "layer out by patterns, or use the diagonal Fisher."
        )


def with_ones(spec: LayerSpec, inputs: Tensor) -> Tensor:
    """A layer's inputs with a 1 appended to each if it has a bias.

    Args:
        spec: The layer.
        inputs: ``(B, T, i)``.

    Returns:
        ``(B, T, i + 1)``, without a bias the inputs.
    """
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2) if spec.has_bias else inputs


def outer_products(vectors: Tensor) -> Tensor:
    """``Σ v vᵀ`` over samples and positions.

    Args:
        vectors: ``(B, T, d)``.

    Returns:
        ``(d, d)``.
    """
    rows = vectors.flatten(0, 1)
    return rows.mT @ rows


def squared_norm(layer: CapturedLayer) -> Tensor:
    """``Σ_s |G_s|²``, the squared norms of samples' gradients ``G_s = Σ_t g_t a_tᵀ``, added up.

    Args:
        layer: Inputs ``(B, T, i)`` and output gradients ``(B, T, o)``.

    Returns:
        A scalar.
    """
    inputs, gradients = layer.inputs, layer.output_gradients
    positions, outputs = gradients.shape[1:]
    width = inputs.shape[2]
    if positions > 1 and positions * (outputs + width) >= outputs * width:
        return sum_of_squares(layer).sum()
    # Σ_t Σ_u (g_t · g_u)(a_t · a_u): smaller than the gradients themselves. Where positions cancel, rounding may leave
    # less than nothing.
    return (torch.bmm(gradients, gradients.mT) * torch.bmm(inputs, inputs.mT)).sum((1, 2)).clamp(min=0).sum()


def eigenvectors(covariance: Tensor, what: str) -> Tensor:
    """A covariance's eigenvectors, in float64 on the CPU; where there are none, the basis as it is, with a warning.

    Args:
        covariance: ``(d, d)``.
        what: Whose, for the warning.

    Returns:
        ``(d, d)``, an eigenvector a column, where the covariance is and in its type.
    """
    # On the CPU, so that a training on a GPU can't run out of memory by it.
    wide = covariance.cpu().double()
    try:
        # Symmetric but for the rounding of a product; eigh would read one triangle only.
        found: Tensor = torch.linalg.eigh((wide + wide.mT) / 2).eigenvectors
        reason = "" if found.isfinite().all() else "they are not finite"
    except RuntimeError as error:  # torch's LinAlgError is one
        reason = str(error)
    if reason:
        warnings.warn(f"No eigenvectors for {what} ({reason}): that side keeps the basis of its weights.")
        found = torch.eye(len(wide), dtype=wide.dtype)
    # Row by row, as a file has it: a product with columns would differ from one after a resume in the last bit.
    return found.to(covariance.device, covariance.dtype).contiguous()


def joined(spec: LayerSpec, tensors: Mapping[str, Tensor]) -> Tensor:
    """A layer's weight and bias as one matrix.

    Args:
        spec: The layer.
        tensors: Parameter name to ``(*, *parameter)``.

    Returns:
        ``(*, o, i)``, with a bias ``(*, o, i + 1)``.
    """
    weight = tensors[f"{spec.name}.weight"].flatten(-len(spec.weight_shape) + 1)
    return torch.cat([weight, tensors[f"{spec.name}.bias"][..., None]], -1) if spec.has_bias else weight


def parted(spec: LayerSpec, matrix: Tensor) -> dict[str, Tensor]:
    """Back from :func:`joined`.

    Args:
        spec: The layer.
        matrix: As that gave it.

    Returns:
        Parameter name to ``(*, *parameter)``.
    """
    leading = matrix.shape[:-2]
    if not spec.has_bias:
        return {f"{spec.name}.weight": matrix.reshape(*leading, *spec.weight_shape)}
    return {
        f"{spec.name}.weight": matrix[..., :-1].reshape(*leading, *spec.weight_shape),
        f"{spec.name}.bias": matrix[..., -1],
    }
