"""What an index keeps of some samples, and its vectors in half precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The largest number of a row lies in [2^14, 2^15): float16 ends at 65,504, and is exact to 11 bits down to 2^-14.
TOP_EXPONENT = 15


@dataclass
class Rows:
    """What is known of some samples.

    Attributes:
        keys: ``B`` keys.
        captions: Of each.
        said: What tells the first caption apart from others.
        metadata: Their json.
        vectors: Output function to projected gradients ``(B, p)``, float32 or wider.
        errors: ``(B,)`` float64, the mean root of the loss.
        losses: ``(B,)`` float64, the mean loss.
    """

    keys: list[str]
    captions: list[list[str]]
    said: list[str]
    metadata: list[dict[str, Any]]
    vectors: Mapping[str, Tensor]
    errors: Tensor
    losses: Tensor


def joined(parts: Sequence[Rows], order: Sequence[int]) -> Rows:
    """Batches of one shard together, in another order.

    Args:
        parts: At least one.
        order: Which row comes where.

    Returns:
        All their rows.
    """
    rows = torch.tensor(order, dtype=torch.int64)

    def lists(name: str) -> list[Any]:
        together = [one for part in parts for one in getattr(part, name)]
        return [together[row] for row in order]

    return Rows(
        keys=lists("keys"),
        captions=lists("captions"),
        said=lists("said"),
        metadata=lists("metadata"),
        vectors={name: torch.cat([part.vectors[name] for part in parts])[rows] for name in parts[0].vectors},
        errors=torch.cat([part.errors for part in parts])[rows],
        losses=torch.cat([part.losses for part in parts])[rows],
    )


def halved(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float16, each divided by a power of two that makes the most of it.

    Args:
        values: ``(B, p)``, finite.

    Returns:
        ``(B, p)`` float16 and ``(B,)`` int16 exponents: a row is the one times two to the other.

    Example:
        >>> halves, exponents = halved(torch.tensor([[3e-9, -1e-9], [0.0, 0.0]], dtype=torch.float64))
        >>> torch.allclose(widened(halves, exponents), torch.tensor([[3e-9, -1e-9], [0, 0]]).double(), rtol=1e-3)
        True
    """
    values = values.double()
    most = values.abs().amax(1) if values.numel() else values.new_zeros(len(values))
    exponents = torch.where(most > 0, torch.frexp(most).exponent - TOP_EXPONENT, 0)
    return (values * powers(-exponents)[:, None]).half(), exponents.to(torch.int16)


def widened(halves: Tensor, exponents: Tensor) -> Tensor:
    """Back from :func:`halved`, but for its rounding.

    Args:
        halves: ``(B, p)`` float16.
        exponents: ``(B,)``.

    Returns:
        ``(B, p)`` float64.
    """
    return halves.double() * powers(exponents)[:, None]


def powers(exponents: Tensor) -> Tensor:
    """Two to the power of exponents, exactly.

    Args:
        exponents: ``(B,)`` whole numbers.

    Returns:
        ``(B,)`` float64.
    """
    return torch.exp2(exponents.double())
