"""The command that runs Lightning's ``predict``."""

from __future__ import annotations

from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, one_sentence


def predict(arguments: list[str]) -> None:
    """Lightning's own ``predict``.

    Args:
        arguments: Options.
    """
    # Predict writes no checkpoint, but has Lightning's callback for them.
    with quiet("The dirpath has changed from"), one_sentence():
        TrainerCLI("predict", arguments, "Score under the deltas of a checkpoint: Lightning's predict.", run=True)
