"""The parser of commands that take no LightningModule; it imports nothing heavy."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from lightning_unlearn.command_line.usage import OneSentence


class _PlainParser(OneSentence, ArgumentParser):
    """Jsonargparse's parser, with one sentence for wrong options."""


def plain_parser(command: str, description: str) -> Any:
    """The parser of a command that takes no LightningModule.

    Args:
        command: Its name.
        description: What it does, for ``--help``.

    Returns:
        A jsonargparse parser.
    """
    parser = _PlainParser(prog=f"lightning-unlearn {command}", description=description, parser_mode="omegaconf")
    parser.add_argument("-c", "--config", action="config", help="A YAML file of options.")
    return parser
