"""What the names of a sample's files must be, before any of them is decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_unlearn.errors import InputError


def check_fields(fields: Mapping[str, Any], where: str) -> None:
    """Refuse a sample that lacks files, or whose name is none.

    Args:
        fields: Field name to bytes, with ``__key__``, and ``__dotted__`` where a name has too many dots.
        where: Whose they are, for messages.

    Raises:
        InputError: If it is refused.
    """
    key = fields["__key__"]
    if not is_text(key):
        raise InputError(f"{where} has a name that is not UTF-8; pack the shard again with names in UTF-8.")
    dotted = fields.get("__dotted__")
    if dotted is not None:
        raise InputError(
            f"{where}: its file {key + '.' + dotted!r} gives the key {key!r} and the field {dotted!r}, since a key "
            "ends at the first dot; pack the shard again with underscores for dots."
        )
    missing = [name for name in ("latent.npy", "json") if name not in fields]
    check_present(missing, where)


def check_present(missing: Sequence[str], where: str) -> None:
    """Refuse a sample that lacks files.

    Args:
        missing: The fields that it lacks, none if it is whole.
        where: Whose they are, for messages.

    Raises:
        InputError: If there are any.
    """
    if missing:
        raise InputError(
            f"{where} lacks {', '.join(missing)} among the files that lie side by side; a sample's files must follow "
            "each other in the shard, as `lightning-unlearn prepare` and `tar --sort=name` pack them."
        )


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    # JSON can write half a surrogate pair, and tarfile gives names that are not UTF-8 so.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
