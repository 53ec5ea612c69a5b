"""Where functions that start below zero first come to zero, all of them at once, with few evaluations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A function counts as zero within this, in units of its start's distance from zero. What is given back is interpolated
# once more between the last points, without another evaluation, and is nearer by two to four digits: it depends on the
# values as an interpolation does, smoothly, and not on which of them happened to be within the bound. Rounding of the
# values so moves it by about as much as they are rounded by, over the function's slope.
TOLERANCE = 1e-3
# Where rounding doesn't let a function come that near, the search ends when its bracket is this narrow, if the value is
# about right; if it isn't, the function jumps over zero, or turns NaN before it.
NARROW, ABOUT = 1e-6, 5e-3
MAX_EVALUATIONS = 60
# A function that is not above zero after so many enlargements of the first guess won't be.
MAX_GROWTHS = 24


def first_zeros(excess: Callable[[Tensor], Tensor], first: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Places of zeros by bracketing and inverse quadratic interpolation, each function in its own bracket.

    Chandrupatla (1997), "A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function
    without using derivatives": interpolate where three points allow it, halve the bracket where they don't. Whoever is
    done is not evaluated again.

    Args:
        excess: Values ``(Q,)`` at places ``(Q,)``; the places are NaN where nobody asks. Values are negative before the
            zero, -1 at the place 0, and positive or NaN behind it.
        first: ``(Q,)`` where to begin, above 0.
        active: ``(Q,)`` bool, which functions are searched.

    Returns:
        ``(Q,)`` places, and ``(Q,)`` bool whether they are found.

    Example:
        >>> places, found = first_zeros(lambda x: x**2 - 1, torch.tensor([0.1]).double(), torch.tensor([True]))
        >>> torch.testing.assert_close(places, torch.ones(1).double(), atol=1e-5, rtol=0)
    """
    place = first.double()
    low, low_value = torch.zeros_like(place), -torch.ones_like(place)
    high, high_value = torch.full_like(place, torch.inf), torch.full_like(place, torch.nan)
    # The end of the bracket that was moved last.
    third, third_value = torch.full_like(place, torch.nan), torch.full_like(place, torch.nan)
    found, settled = torch.zeros_like(active), ~active
    for number in range(MAX_EVALUATIONS):
        value = excess(place.where(~settled, torch.nan)).double()
        width = high - low
        found = found | ~settled & (value.abs() <= torch.where(width <= NARROW * place, ABOUT, TOLERANCE))
        # What is so far behind that the value is NaN went too far, however little we know of it.
        above, moves = (value > 0) | value.isnan(), ~settled
        third = torch.where(moves, torch.where(above, high, low), third)
        third_value = torch.where(moves, torch.where(above, high_value, low_value), third_value)
        high, high_value = _moved(moves & above, (place, value), (high, high_value))
        low, low_value = _moved(moves & ~above, (place, value), (low, low_value))
        lost = ~found & ((high - low <= NARROW * low) | (high.isinf() & (number >= MAX_GROWTHS)))
        latest, other = _moved(above, (high, low), (low, high))
        latest_value, other_value = _moved(above, (high_value, low_value), (low_value, high_value))
        share = _share((latest, other, third), (latest_value, other_value, third_value), found)
        grown = place * (1.2 / (1 + value).clamp(min=0.1)).clamp(1.2, 2.0)
        # The last place of whoever is found is not evaluated; without an upper end it lies on the line from the start.
        following = torch.where(
            high.isinf(), torch.where(found, place / (1 + value), grown), latest + share * (other - latest)
        )
        place = torch.where(settled | lost, place, following)
        settled = settled | found | lost
        if bool(settled.all()):
            break
    return place, found


def _moved(where: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Each of a pair, the new one where it is to be taken."""
    return torch.where(where, new[0], old[0]), torch.where(where, new[1], old[1])


def _share(places: tuple[Tensor, Tensor, Tensor], values: tuple[Tensor, Tensor, Tensor], last: Tensor) -> Tensor:
    """How far the next place lies from the latest one towards the bracket's other end.

    Args:
        places: The latest, the other end, and the end that was moved last; each ``(Q,)``.
        values: There.
        last: ``(Q,)`` bool, whose next place is the last, which is not evaluated.

    Returns:
        ``(Q,)`` from 0 to 1.
    """
    (x1, x2, x3), (f1, f2, f3) = places, values
    along, rising = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
    # Whether the points lie so that the inverse function can be a parabola (Chandrupatla's criterion).
    smooth = (rising.square() < along) & ((1 - rising).square() < 1 - along)
    curved = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
    # A value far above zero, or NaN, says no more than that it is: taken as it is, it would keep the next place near
    # the lower end.
    g1, g2 = (torch.where(value.isnan(), 1.0, value).clamp(max=1.0) for value in (f1, f2))
    straight = g1 / (g1 - g2)
    share = torch.where(smooth, curved, torch.where(last | ~(x3.isfinite() & f3.isfinite()), straight, 0.5))
    # Not onto an end, from which nothing is learned; the last place may lie there.
    least = torch.where(last, 0.0, 0.02)
    return torch.maximum(torch.minimum(share, 1 - least), least)
