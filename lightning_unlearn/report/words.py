"""Words for the report's numbers and settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from lightning_unlearn.report.figures import power_of_ten
from lightning_unlearn.scores.agreement import MOST_ALIKE


def flatten(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested settings, as a person reads them.

    Args:
        tree: Settings.
        before: What their names begin with.

    Yields:
        A name and its value.
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{before}{name} ")
        else:
            yield before + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def without_folders(tree: Any) -> Any:
    """Settings whose paths of this machine are names of files alone: where they lie is nobody else's concern.

    Args:
        tree: JSON-like.

    Returns:
        The same, in which no text is an absolute path.

    Example:
        >>> without_folders({"file": "/home/someone/last.ckpt"})
        {'file': 'last.ckpt'}
    """
    if isinstance(tree, Mapping):
        return {name: without_folders(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [without_folders(value) for value in tree]
    if isinstance(tree, str) and "\n" not in tree and (PurePosixPath(tree).is_absolute() or tree.startswith("~")):
        return PurePosixPath(tree).name
    return tree


def number(value: float, sign: bool = False) -> str:
    """Three significant digits, and powers of ten where they need them.

    Args:
        value: A number.
        sign: Whether a plus is written.

    Returns:
        E.g. ``1.23 × 10⁻⁵``.
    """
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:{'+' if sign else ''}#.3g}".partition("e")
    power = f"\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{power_of_ten(int(exponent))}" if exponent else ""
    return mantissa.removesuffix(".").replace("-", "−") + power


def share(value: float, sign: bool = False) -> str:
    """A share in per cent.

    Args:
        value: 1 for all.
        sign: Whether a plus is written.

    Returns:
        E.g. ``12.0 %``.
    """
    return f"{number(100 * value, sign)}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """A time in the units that fit it.

    Args:
        seconds: The time.

    Returns:
        E.g. ``1 h 3 min``.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours and not minutes:
        return f"{number(seconds)} s" if seconds < 10 else f"{rest} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def named_methods(names: Iterable[str]) -> str:
    """Methods that were asked together, as people call them.

    Args:
        names: As tables have them.

    Returns:
        E.g. ``DAS, D-TRAK and unlearning``.
    """
    called = [{"das": "DAS", "d_trak": "D-TRAK"}.get(name, name) for name in names]
    return " and ".join(filter(None, (", ".join(called[:-1]), called[-1]))) if called else ""


def sureness(found: Mapping[str, Any]) -> str:
    """How sure an answer is, in a sentence.

    Args:
        found: What ``run.json`` says of a query (:mod:`~lightning_unlearn.scores.agreement`); empty if nothing.

    Returns:
        E.g. ``Methods agree: of their first ten they have 60.0 % in common.``; empty for nothing.
    """
    if not found:
        return ""
    words = str(found["words"]).capitalize()
    text = f"{words}: of their first ten the methods have {share(found['first_ten'])} in common"
    if "correlation" in found:
        text += f", and their scores correlate by {found['correlation']:.2f}"
    if "caption_share" in found:
        text += f"; {share(found['caption_share'])} of what tells images apart is their caption alone"
    if "halves" in found:
        text += f"; unlearning by one half of its views and by the other has {share(found['halves'])} of them in common"
    for name, correlation in found.get("alike", {}).items():
        if correlation > MOST_ALIKE:
            text += f"; similarity of {name} alone says the same (a correlation of {number(correlation)})"
    return text + "."
