"""The file that a Fisher is kept in: safetensors with a header that says what it is, and whether it was altered."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from lightning_unlearn.data.files import reason_of, write_atomically
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest, tensors_digest
from lightning_unlearn.fisher.copies import with_copies, without_copies

# 2 has a digest of header and tensors; 1, from before, has none.
FORMAT = 2
_WITHOUT_DIGEST = 1
_HEADER = "lightning_unlearn"
# What is said of a Fisher, and of what type it is; `stage`, `targets` and `copies` may be missing.
_FIELDS: dict[str, type] = {"kind": str, "count": int, "layers": list, "provenance": dict}
_DAMAGED = (safetensors.SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError, MemoryError)


def write_file(path: str | os.PathLike[str], about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a Fisher's file, whole or not at all.

    Args:
        path: The file; its folder is made.
        about: What it says of itself, JSON-like.
        tensors: On the CPU, contiguous.

    Raises:
        InputError: If it can't be written.
    """
    path = Path(path)
    kept, copies = without_copies(tensors)
    header = json.loads(json.dumps({**about, "format": FORMAT, "copies": copies}))
    header["digest"] = _digest(header, kept)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save(kept, {_HEADER: json.dumps(header)}))
    except OSError as error:
        raise InputError(
            f"The Fisher can't be written to {path} ({error.strerror}); free the disk, or name another place."
        ) from None


def _digest(header: Mapping[str, Any], kept: Mapping[str, Tensor]) -> str:
    rest = {name: value for name, value in header.items() if name != "digest"}
    return settings_digest({"header": rest, "tensors": tensors_digest(kept)})


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a Fisher's file says about itself, without reading its tensors.

    Args:
        path: The file.

    Returns:
        Format, kind, count, targets (but in files from before there was a choice), layers, provenance and, for a
        kind that has several, the stage.

    Raises:
        InputError: If it is missing or not a Fisher.
    """
    if not Path(path).is_file():
        raise InputError(
            f"There is no Fisher at {path}; train with FisherAccumulator, or run `lightning-unlearn fisher`, "
            "to make one."
        )
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = dict(json.loads((file.metadata() or {})[_HEADER]))
    except _DAMAGED as error:
        raise InputError(f"{path} is not a Fisher of this package ({reason_of(error)}); make it again.") from None
    if about.get("format") not in (FORMAT, _WITHOUT_DIGEST):
        raise InputError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; make it again.")
    wrong = [name for name, kind in _FIELDS.items() if type(about.get(name)) is not kind]
    if wrong or about["count"] < 0 or about.get("targets", "data") not in ("data", "model"):
        raise InputError(f"{path} is damaged (its header says no {', '.join(wrong) or 'count'}); make it again.")
    return about


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A Fisher's file, of which it is certain that nobody altered it if it was written with a digest.

    Args:
        path: The file.

    Returns:
        What it says about itself, and its tensors.

    Raises:
        InputError: If it is missing, not a Fisher, or was altered.
    """
    about = read_about(path)
    try:
        kept = safetensors.torch.load_file(path)
        whole = about["format"] == _WITHOUT_DIGEST or about.get("digest") == _digest(about, kept)
        tensors = with_copies(kept, about.get("copies", {}))
    except (*_DAMAGED, AttributeError) as error:
        raise InputError(f"{path} is damaged ({reason_of(error)}); make it again.") from None
    if not whole:
        raise InputError(f"{path} was altered after it was written; make it again.")
    return about, tensors
