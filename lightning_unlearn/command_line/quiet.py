"""What a person need not read: hints of the libraries below that do not apply here."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WARNINGS = (
    r"Found \d+ module\(s\) in eval mode",  # on purpose
    r"The '\w+' does not have many workers",  # nothing waits for the reading of shards
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 with torch 2.13
    # What is logged so is the same on every process.
    r"It is recommended to use `self\.log\('"
    r"(loss_before|loss_after|rise|penalty|length|linear|evaluations|others_before|others_after)/",
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",  # Lightning's own default logger, not the user's choice
)
_HINTS = re.compile("💡 Tip:|TPU available:")
# Of a Trainer that a command steers; the command itself says what it does.
_STEPS = re.compile(
    r"(\[rank: \d+\] )?Seed set to|GPU available:|`Trainer.fit` stopped:|Restoring states from|Loaded model weights"
    r"|\d+ of \d+ shards are scored already|\d+ samples scored into"
)


def _said(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    # Where in the code it was said helps nobody who typed a command.
    return f"Warning: {message}\n"


@contextmanager
def quiet(*warned: str, steps: bool = False) -> Iterator[None]:
    """While it lasts, known hints are not printed; all other warnings and messages are, without lines of code.

    Args:
        *warned: How other warnings that don't apply begin, as regular expressions.
        steps: Whether what a Trainer says of its own steps is left out too.

    Yields:
        Nothing.
    """

    def wanted(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (_HINTS.match(message) or (steps and _STEPS.match(message)))

    # What Lightning says on the first rank goes through one of these, depending on which was imported last.
    trees = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    loggers = [logging.getLogger(f"{tree}.utilities.{name}") for tree in trees for name in ("rank_zero", "seed")]
    for logger in loggers:
        logger.addFilter(wanted)
    usual = warnings.formatwarning
    try:
        with warnings.catch_warnings():
            warnings.formatwarning = _said
            for message in (*_WARNINGS, *warned):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        warnings.formatwarning = usual
        for logger in loggers:
            logger.removeFilter(wanted)


@contextmanager
def each_warning_once() -> Iterator[None]:
    """While it lasts, what several commands in turn would warn of is said by the first of them.

    Yields:
        Nothing.
    """
    said: set[str] = set()
    usual, form = warnings.showwarning, warnings.formatwarning

    def show(message: Warning | str, *about: Any, **more: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            usual(message, *about, **more)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.formatwarning = _said
        try:
            yield
        finally:
            warnings.formatwarning = form
