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


def resolved(family: Family, selection: str) -> Sequence[str]:
    """The selections that a named one means in a family.

    Args:
        family: The network's.
        selection: Its name; ``"auto"`` for what the family says.

    Returns:
        Names of the family's selections, or of :data:`BROAD` ones.

    Raises:
        InputError: If the selection means nothing there.
    """
    there = [*family.selections, *BROAD]
    if selection == "auto":
        usual = "text_kv" if "text_kv" in family.selections else "attention, feed_forward"
        return [name for name in (family.auto or usual).split(", ") if name in there]
    if selection not in there:
        raise InputError(f"{family.title} has no weights that {selection!r} means; choose one of {', '.join(there)}.")
    return [selection]
