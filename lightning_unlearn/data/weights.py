"""How often training saw a sample, and each of its captions, as the sample's json says it.

``weight``
    A number above 0: a folder that kohya's trainer repeats ten times beside one that it repeats once has ten times the
    weight. Only ratios count.
``caption_weights``
    A list of numbers, one a caption: a caption that is dropped for the empty one in a tenth of the steps has 0.9, and
    the empty one 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_unlearn.errors import InputError

WEIGHT = "weight"
CAPTION_WEIGHTS = "caption_weights"


def weight_of(metadata: Mapping[str, Any], where: str) -> float:
    """A sample's weight.

    Args:
        metadata: Its json.
        where: Whose it is, for messages.

    Returns:
        The weight, 1 if nothing is said.

    Raises:
        InputError: If it is no number above 0.
    """
    weight = metadata.get(WEIGHT, 1)
    if not _is_number(weight) or weight <= 0:
        raise InputError(
            f"{where} has {repr(weight)[:60]} as {WEIGHT!r} in its json, which says how often training repeats it; "
            "write a number above 0, or leave it out."
        )
    return float(weight)


def caption_weights_of(metadata: Mapping[str, Any], captions: int, where: str) -> list[float] | None:
    """The shares of a sample's captions.

    Args:
        metadata: Its json.
        captions: How many it has.
        where: Whose it is, for messages.

    Returns:
        One a caption, which add up to 1; ``None`` if nothing is said, or all are alike.

    Raises:
        InputError: If these are no such numbers.
    """
    said = metadata.get(CAPTION_WEIGHTS)
    if said is None:
        return None
    right = isinstance(said, list) and len(said) == captions and all(_is_number(share) for share in said)
    if not right or min(said) < 0 or sum(said) <= 0:
        raise InputError(
            f"{where} has {repr(said)[:60]} as {CAPTION_WEIGHTS!r} in its json for {captions} captions; write a number "
            "from 0 on for each, not all 0, or leave them out."
        )
    if len(set(said)) == 1:
        return None
    total = math.fsum(said)
    return [share / total for share in said]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
