"""Every command's options, from its own parser, as a page of the documentation."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from html import escape
from importlib import import_module
from typing import Any
from unittest.mock import patch

from lightning_unlearn.command_line.cli import COMMANDS, HELP
from lightning_unlearn.command_line.usage import OneSentence

INTRODUCTION = """\
# Commands

    lightning-unlearn COMMAND [--config FILE] [--print_config] [options]

An option may stand on the command line or, without the dashes, in the YAML file of `--config`; the command line wins.
`--print_config` prints all settings and ends. Arguments of the classes that a config names are options, too:
`--model.init_args.seed 1`, `--data.init_args.draws 32`. They stand in [Python](python.md).
"""
TRAINER = """
## The Trainer's options {{ #trainer }}

Of {commands}. They are those of Lightning's `Trainer`, whose documentation says more.

"""
# Options of jsonargparse and LightningCLI that are no settings.
_WORDS = ("--help", "--print_config", "--config")


class _Found(Exception):  # noqa: N818
    """Carries a command's parser out of the command."""

    def __init__(self, parser: Any) -> None:
        self.parser = parser


def command_parser(command: str) -> Any:
    """The parser that a command makes.

    Args:
        command: Its name.

    Returns:
        A jsonargparse parser.

    Raises:
        LookupError: If the command parses nothing.
    """

    def found(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _Found(self)

    run = getattr(import_module(f"lightning_unlearn.command_line.{command}_command"), command)
    with patch.object(OneSentence, "parse_args", found):
        try:
            run(["--help"])
        except _Found as carried:
            inner = [action for action in carried.parser._actions if isinstance(action, argparse._SubParsersAction)]
            # Lightning's own commands are parsers within one.
            return inner[0]._name_parser_map[command] if inner else carried.parser
    raise LookupError(f"The command {command} parses nothing.")


def _options(parser: Any) -> Iterator[Any]:
    for action in parser._actions:
        names = action.option_strings
        if names and names[-1] not in _WORDS and not names[0].endswith(".help"):
            yield action


def _type(action: Any) -> str:
    if action.choices:
        return " or ".join(f"`{choice}`" for choice in action.choices)
    kind = getattr(action, "_typehint", None) or action.type
    if kind is None:
        return "`true` or `false`" if action.nargs == 0 else ""
    shown = kind.__name__ if isinstance(kind, type) else str(kind)
    shown = re.sub(r"\b(?:typing|collections\.abc|[\w]+(?:\.[\w]+)+)\.(\w+)", r"\1", shown)
    return f"`{shown.replace('typing.', '')}`"


def _default(action: Any, parser: Any) -> str:
    default = parser.get_default(action.dest) if action.default is not argparse.SUPPRESS else None
    if hasattr(default, "__dict__") and default.__dict__:  # a dataclass; each of its fields is an option of its own
        return ""
    words = {None: "null", True: "true", False: "false"}
    shown = words[default] if default is None or isinstance(default, bool) else str(default)
    return "" if shown == "==SUPPRESS==" else f"`{shown}`" if shown else ""


def _table(actions: list[Any], parser: Any) -> list[str]:
    lines = ["| option | what it is | type | default |", "|---|---|---|---|"]
    for action in actions:
        name = next((name for name in action.option_strings if name.startswith("--")), action.option_strings[0])
        told = " ".join(str(action.help or "").replace("%(default)s", "").split()).replace("``", "`")
        told = escape(re.sub(r"\s*Default: `[^`]*`\.?", "", told), quote=False)
        cells = [f"`{name}`", told, _type(action), _default(action, parser)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


def commands_page() -> str:
    """The page.

    Returns:
        Markdown.
    """
    summaries = dict(re.findall(r"^  (\w+) +(\S.*)$", HELP, re.MULTILINE))
    lines, with_trainer, trainer = [INTRODUCTION], [], []
    for command in COMMANDS:
        parser = command_parser(command)
        mine = [action for action in _options(parser) if not action.dest.startswith("trainer")]
        theirs = [action for action in _options(parser) if action.dest.startswith("trainer.")]
        lines += [f"## {command} {{ #{command} }}", "", f"{summaries[command][0].upper()}{summaries[command][1:]}.", ""]
        lines += [*_table(mine, parser), ""]
        if theirs:
            with_trainer.append(f"`{command}`")
            trainer = trainer or _table(theirs, parser)
            lines += ["And [the Trainer's](#trainer), as `--trainer.NAME`.", ""]
    return "\n".join([*lines, TRAINER.format(commands=", ".join(with_trainer)).strip("\n"), "", *trainer]) + "\n"


if __name__ == "__main__":
    print(commands_page(), end="")
