"""What the commands that run a Trainer have in common."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lightning_unlearn.data.files import check_folder
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
    """Make a folder and see that it can be written to, so that a wrong --output shows before long work, not after it.

    Args:
        folder: The folder.
    """
    check_folder(folder, "choose another --output")


def check_top(top: int) -> None:
    """See that the report will have something to show, before long work.

    Args:
        top: How many images it shows for each query.

    Raises:
        InputError: If it has not.
    """
    if top < 1:
        raise InputError(f"--top must be at least 1, since a report shows images, but is {top}.")


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
