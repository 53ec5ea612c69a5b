"""The command that runs Lightning's ``fit``."""

from __future__ import annotations

from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, one_sentence


def fit(arguments: list[str]) -> None:
    """Lightning's own ``fit``.

    Args:
        arguments: Options.
    """
    with quiet(), one_sentence():
        TrainerCLI("fit", arguments, "Unlearn queries, or train a model: Lightning's fit.", run=True)
