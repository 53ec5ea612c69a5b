"""The model that an adapter was trained on, beside the one that it is put on, by the hashes that kohya's trainer keeps.

It keeps the SHA-256 of the base model's file, and, as AUTOMATIC1111's web UI once did, of 64 KiB of it alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_OFFSET, _LENGTH = 0x100000, 0x10000


def said_of_base(name: str | None, sha256: str | None, short: str | None, file: str | None) -> str | None:
    """What is to be said of an adapter's base model.

    Args:
        name: Of the file that the adapter was trained on, if it is known.
        sha256: Of that file.
        short: Of a part of that file, its first eight digits.
        file: The file that the network's weights are of; ``None`` if they are of a folder, or given.

    Returns:
        A sentence where the two differ, or where they can't be compared; ``None`` where they are the same, or nothing
        is known of the base model.
    """
    if not (name or sha256 or short):
        return None
    shown = name or "a file"
    if file is not None and Path(file).is_file() and (sha256 or short):
        theirs, ours = (sha256, _sha256(file)) if sha256 else (short, _short(file))
        assert theirs is not None
        if theirs.lower() == ours:
            return None
        return (
            f"it was trained on {shown} (hash {theirs[:12]}), but the network's weights are of {file} (hash "
            f"{ours[:12]}), which is another model or another file of the same."
        )
    mark = f" (sha256 {sha256[:12]}…)" if sha256 else ""
    return f"it was trained on {shown}{mark}; see that the network is that one, it is not compared."


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(path: str) -> str:
    with Path(path).open("rb") as file:
        file.seek(_OFFSET)
        return hashlib.sha256(file.read(_LENGTH)).hexdigest()[:8]
