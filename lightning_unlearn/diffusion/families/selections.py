"""Names of selections of weights, and what they mean in a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_unlearn.diffusion.families.base import Family
from lightning_unlearn.errors import InputError

BROAD = ("linear", "all")
"""Selections that every network has."""

BLOCK_SELECTIONS: Mapping[str, Sequence[str]] = {
    "text_kv": (r".*\.attn2\.to_[kv]",),
    "cross_attention": (r".*\.attn2\.(to_[qkv]|to_out\.0)",),
    "attention": (r".*\.attn[12]\.(to_[qkv]|to_out\.0)",),
    "feed_forward": (r".*\.ff\.net\.(0\.proj|2)",),
}
"""Of diffusers' transformer blocks with cross-attention, whatever network they are in."""


AUTOMATIC = (*reversed(BROAD), "attention", "cross_attention", "text_kv")
"""What ``auto`` means: the first of these that is not too large."""


def automatic(family: Family | None) -> Sequence[str]:
    """The selections that ``auto`` may mean in a family, from the broadest to the narrowest.

    Args:
        family: The network's; ``None`` where no family knows it.

    Returns:
        At least two names.
    """
    there = {*BROAD, *(family.selections if family is not None else ())}
    if "cross_attention" not in there:
        # Where text and picture attend to each other in one stream, text passes through far more than its keys.
        there.discard("text_kv")
    return [name for name in AUTOMATIC if name in there]


def checked(family: Family, selection: str) -> str:
    """A selection that means something in a family.

    Args:
        family: The network's.
        selection: Its name.

    Returns:
        The same.

    Raises:
        InputError: If it means nothing there.
    """
    there = [*family.selections, *BROAD]
    if selection not in there:
        raise InputError(f"{family.title} has no weights that {selection!r} means; choose one of {', '.join(there)}.")
    return selection
