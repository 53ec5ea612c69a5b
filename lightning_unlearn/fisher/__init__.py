"""Fisher information holds everything else in place while a target is unlearned; one file a kind, one entry here."""

from __future__ import annotations

import os

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.base import Fisher, Targets
from lightning_unlearn.fisher.diagonal import DiagonalFisher
from lightning_unlearn.fisher.ekfac import EKFACFisher
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.fisher.identity import IdentityFisher

FISHERS: dict[str, type[Fisher]] = {kind.kind: kind for kind in (DiagonalFisher, EKFACFisher, IdentityFisher)}

__all__ = ["FISHERS", "DiagonalFisher", "EKFACFisher", "Fisher", "IdentityFisher", "Targets", "load_fisher"]


def load_fisher(path: str | os.PathLike[str]) -> Fisher:
    """Read a Fisher of whatever kind the file holds.

    Args:
        path: A safetensors file that a Fisher's ``save`` wrote.

    Returns:
        The Fisher, on the CPU.

    Raises:
        InputError: If the file is missing, or not a Fisher this version knows.
    """
    kind = read_about(path)["kind"]
    if kind not in FISHERS:
        raise InputError(
            f"{path} holds a Fisher of kind {kind!r}, which this version does not know ({', '.join(FISHERS)}); "
            "make it again."
        )
    return FISHERS[kind].load(path)
