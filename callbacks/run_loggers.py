"""Pictures, tables and numbers to the loggers of somebody's Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_unlearn.callbacks.shown_samples import Shown, sheet_of


def log_pictures(trainer: Trainer, tag: str, pictures: Sequence[Shown]) -> None:
    """Show pictures where a logger can: TensorBoard gets a sheet of them and a table of captions, W&B each of them.

    Only the first process calls it.

    Args:
        trainer: Whose loggers these are.
        tag: What they are called there.
        pictures: At least one.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            sheet = np.asarray(sheet_of(pictures))
            logger.experiment.add_image(tag, sheet, step, dataformats="HWC")
            logger.experiment.add_text(tag, _markdown(pictures), step)
        elif isinstance(logger, WandbLogger):
            seen = [one for one in pictures if one.image is not None]
            if seen:
                images: list[Any] = [one.image for one in seen]
                logger.log_image(tag, images, step, caption=[f"{one.name} · {one.caption}" for one in seen])


def log_numbers(trainer: Trainer, numbers: Mapping[str, float]) -> None:
    """Give numbers to every logger, beside the training's own; only the first process calls it.

    Args:
        trainer: Whose loggers these are.
        numbers: By name.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), trainer.global_step)
        logger.save()


def log_table(trainer: Trainer, tag: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Give a table to W&B, which can sort it; others find it as a file.

    Args:
        trainer: Whose loggers these are.
        tag: What it is called there.
        columns: Names.
        rows: Of numbers and texts.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(tag, list(columns), [list(row) for row in rows], step=trainer.global_step)


def _markdown(pictures: Sequence[Shown]) -> str:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = ["| picture | what is said of it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {cell(one.name)} | {cell(one.caption)} |" for one in pictures)])
