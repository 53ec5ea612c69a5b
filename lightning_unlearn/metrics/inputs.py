"""What every measure asks of the tables that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError


def table(name: str, values: Tensor, *dimensions: str) -> Tensor:
    """A table of finite numbers, in float64: ranks of sums must not depend on the order of summing.

    Args:
        name: What the table is, in the plural, for the message.
        values: The table.
        *dimensions: What each of its dimensions counts.

    Returns:
        The same values as float64, without a graph.

    Raises:
        InputError: If it has other dimensions, is empty, or holds a NaN or an infinity.
    """
    if values.ndim != len(dimensions) or values.numel() == 0:
        wanted = " × ".join(dimensions)
        raise InputError(f"The {name} have the shape {tuple(values.shape)}; give a table of {wanted}, none of them 0.")
    if not values.isfinite().all():
        raise InputError(f"The {name} hold a NaN or an infinity; leave out what could not be measured.")
    return values.detach().to(torch.float64)


def same_shape(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Refuse two tables of different shapes.

    Args:
        first_name: What the first table is, in the plural.
        first: Of any shape.
        second_name: What the second table is, in the plural.
        second: Of the same shape.

    Raises:
        InputError: If the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(
            f"The {first_name} have the shape {tuple(first.shape)} and the {second_name} {tuple(second.shape)}; give "
            "both for the same rows and queries."
        )
