"""What the commands that run a Trainer have in common."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_unlearn.errors import InputError

# What a Trainer that a command steers need not have.
BARE = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}


@rank_zero_only
def say(message: str) -> None:
    """Print on the first of all processes.

    Args:
        message: A line.
    """
    print(message, flush=True)


def make_folder(folder: Path) -> None:
    """Make a folder before long work, so that a wrong --output does not show after it.

    Args:
        folder: The folder.

    Raises:
        InputError: If it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made ({error.strerror}); choose another --output.") from None


def many(number: int, one: str, more: str = "") -> str:
    """A number with its noun.

    Args:
        number: Of things.
        one: The noun.
        more: Its plural, if that is not an s more.

    Returns:
        E.g. ``2 queries``.
    """
    return f"{number} {one if number == 1 else more or one + 's'}"
