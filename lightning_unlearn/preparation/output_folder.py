"""The folder that shards go to, and the smallest numbers that settings may have."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.errors import InputError


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that can't take shards, or has them.

    Args:
        folder: Where shards are to go; made if it is not there.
        overwrite: Whether shards that are there may be replaced.

    Raises:
        InputError: If it is refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made ({error.strerror}); choose another output.") from None
    if (folder / MANIFEST).exists() and not overwrite:
        try:
            shards = json.loads((folder / MANIFEST).read_bytes())["shards"]
            done = f"{sum(shard['samples'] for shard in shards)} samples in {len(shards)} shards"
        except (ValueError, KeyError, TypeError):
            done = "a manifest"
        raise InputError(
            f"{folder} is done already: it holds {done}; use them, choose another output, or set overwrite=true."
        )


def at_least(least: int, **settings: int | None) -> None:
    """Refuse numbers that are too small.

    Args:
        least: The smallest that is allowed.
        **settings: By name; ``None`` where nothing was chosen.

    Raises:
        InputError: If one is smaller.
    """
    for name, value in settings.items():
        if value is not None and value < least:
            raise InputError(f"`{name}` must be at least {least}, but is {value}.")
