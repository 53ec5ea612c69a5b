"""How often the training of a flow drew each of its timesteps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError

Density = Literal["uniform", "logit_normal", "mode"]
DENSITIES = ("uniform", "logit_normal", "mode")
# Up to here the mode density's map of [0, 1] onto itself falls everywhere (Esser et al., Section 3.1).
LARGEST_MODE_SCALE = 2 / (math.pi - 2)
# Halvings of [0, 1] after which float64 can't tell the two ends apart.
_HALVINGS = 60


def timestep_probabilities(
    density: Density, length: int, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor | None:
    r"""The share of training draws that fell on each timestep, counted from data to noise.

    Esser et al. (arXiv 2403.03206, Section 3.1) draw a number in [0, 1]: as the logistic function of a normal one, or
    as :math:`f(u) = 1 - u - s\,(\cos^2(π u / 2) - 1 + u)` of a uniform u. diffusers' training scripts take the table
    of timesteps, which runs from noise to data, at this share of its length; so the last timestep here has the
    probability that the number lies in :math:`[0, 1/n)`.

    Args:
        density: Which one.
        length: n, how many timesteps there are.
        logit_mean: Mean of the normal number of ``logit_normal``.
        logit_std: Its standard deviation.
        mode_scale: s of ``mode``.

    Returns:
        ``(length,)`` float64 that sum up to 1; ``None`` for ``uniform``.

    Raises:
        InputError: If there is no such density, or a number is out of range.

    Example:
        >>> timestep_probabilities("logit_normal", 4)
        tensor([0.1360, 0.3640, 0.3640, 0.1360], dtype=torch.float64)
        >>> timestep_probabilities("mode", 2, mode_scale=0.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if density not in DENSITIES:
        raise InputError(f"There is no density of timesteps {density!r}; choose one of {', '.join(DENSITIES)}.")
    if not math.isfinite(logit_mean) or not 0 < logit_std < math.inf:
        raise InputError(f"logit_mean is a number and logit_std one above 0, not {logit_mean!r} and {logit_std!r}.")
    if not -1 <= mode_scale <= LARGEST_MODE_SCALE:
        raise InputError(f"mode_scale is a number within -1 and {LARGEST_MODE_SCALE:.4g}, not {mode_scale!r}.")
    if density == "uniform":
        return None
    edges = torch.linspace(0, 1, length + 1, dtype=torch.float64)
    if density == "logit_normal":
        normal = (torch.logit(edges) - logit_mean) / logit_std
        low, high = normal[:-1], normal[1:]
        # Of the two tails that which is small keeps its digits.
        shares = torch.where(
            low > 0,
            torch.special.ndtr(-low) - torch.special.ndtr(-high),
            torch.special.ndtr(high) - torch.special.ndtr(low),
        )
    else:
        shares = _mode_places(edges, mode_scale).diff().neg()
    return (shares / shares.sum()).flip(0)


def _mode_places(values: Tensor, scale: float) -> Tensor:
    """Where the falling map of the mode density has these values, by bisection."""
    low, high = torch.zeros_like(values), torch.ones_like(values)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = 1 - middle - scale * (torch.cos(math.pi / 2 * middle) ** 2 - 1 + middle) > values
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2
