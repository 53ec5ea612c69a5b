"""Errors of a view's elements joined to its loss, and the same with targets drawn from the model."""

from __future__ import annotations

import math

from torch import Tensor


def mean_error(errors: Tensor, mask: Tensor | None) -> Tensor:
    r"""Mean of each view's errors, over its region: :math:`\sum m ℓ / \sum m`.

    Args:
        errors: ``(B, C, H, W)``, a loss of each element; ``(B, C, F, H, W)`` of videos.
        mask: ``(B, H, W)``, how much of each place is in the region, the same in all frames; ``None`` for all of it.

    Returns:
        ``(B,)``.

    Example:
        >>> import torch
        >>> errors = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])
        >>> mean_error(errors, None), mean_error(errors, torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]))
        (tensor([3.]), tensor([4.]))
    """
    if mask is None:
        return errors.flatten(1).mean(1)
    shares = _shares(mask, errors)
    return (errors * shares).flatten(1).sum(1) / shares.flatten(1).sum(1)


def drawn_error(predictions: Tensor, normal: Tensor, mask: Tensor | None) -> Tensor:
    r"""What has the gradient of :func:`mean_error` of squares, with targets drawn from the model.

    With :math:`r = f - y` and :math:`D = \sum_j m_j`, :math:`\frac{1}{D} \sum_j m_j r_j^2` is :math:`-\log p(y|x)`, up
    to a constant, of :math:`y_j \sim N(f_j, D / 2 m_j)`. With y drawn from it, :math:`r_j = \sqrt{D / 2 m_j}\, n_j` of
    a standard normal n, and the gradient is that of

    .. math:: \sqrt{2 / D}\, \sum_j \sqrt{m_j}\, n_j f_j

    The mean of its outer product over n is :math:`\frac{2}{D} J^⊤ \mathrm{diag}(m) J`, the generalised Gauss-Newton
    matrix of the loss: Martens (arXiv 1412.1193, Section 9). The empirical Fisher, with the data's targets, is another
    matrix: Kunstner et al. (arXiv 1905.12558). Multiply by :math:`\sqrt{w}` where the loss is weighted by w.

    Args:
        predictions: f, ``(B, C, H, W)``, or ``(B, C, F, H, W)``.
        normal: n, of the same shape.
        mask: m, ``(B, H, W)``, how much of each place is in the region; ``None`` for all of it.

    Returns:
        ``(B,)``.

    Example:
        >>> import torch
        >>> f = torch.tensor([[[[3.0, 5.0]]]], requires_grad=True)
        >>> drawn_error(f, torch.tensor([[[[1.0, -2.0]]]]), None).backward()
        >>> f.grad  # as that of the mean of (f - y)² with y = f - n: 2 r / D
        tensor([[[[ 1., -2.]]]])
    """
    if mask is None:
        return (predictions * normal).flatten(1).sum(1) * math.sqrt(2 / predictions[0].numel())
    shares = _shares(mask, predictions)
    sums = (predictions * normal * shares.sqrt()).flatten(1).sum(1)
    return sums * (2 / shares.flatten(1).sum(1)).sqrt()


def _shares(mask: Tensor, like: Tensor) -> Tensor:
    """``(B, C, H, W)`` or ``(B, C, F, H, W)``: a mask over channels and frames."""
    batch, *sides = mask.shape
    return mask.to(like).reshape(batch, *[1] * (like.ndim - mask.ndim), *sides).expand_as(like)
