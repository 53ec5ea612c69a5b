"""The parts of the page that are ours, as HTML: everything that comes from people or shards is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lightning_unlearn.report.pictures import Picture
from lightning_unlearn.report.words import flatten, number, share, sureness
from lightning_unlearn.serving.contract import GroupRow
from lightning_unlearn.serving.desk import Asked, Desk, Helped, rank_of
from lightning_unlearn.serving.pictures import Shown, picture_of

SHOWN = 12
GROUPS_SHOWN = 12


@dataclass(frozen=True)
class Source:
    """A training picture in an answer.

    Attributes:
        row: In the index.
        rank: 1 for the most influential.
        score: Its score.
        shown: The picture.
        said: Its rank by each method.
    """

    row: int
    rank: int
    score: float
    shown: Shown
    said: dict[str, int] = field(default_factory=dict)


def sources(desk: Desk, asked: Asked, most: int) -> list[Source]:
    """The first training pictures of an answer.

    Args:
        desk: Where it was given.
        asked: The answer.
        most: How many.

    Returns:
        By rank.
    """
    rows = [int(row) for row in asked.order[:most]]
    return [
        Source(
            row,
            place,
            float(asked.answer.scores[row]),
            shown,
            {name: rank_of(values, row) for name, values in asked.answer.parts.items()},
        )
        for place, (row, shown) in enumerate(zip(rows, desk.pictures.shown(rows), strict=True), 1)
    ]


def answer(desk: Desk, asked: Asked, most: int = SHOWN) -> str:
    """An answer: the query, how sure it is, and its sources.

    Args:
        desk: Where it was given.
        asked: The answer.
        most: How many sources are shown.

    Returns:
        HTML.
    """
    facts = {name: value for name, value in asked.query.metadata.items() if name != "captions"}
    return _render(
        "answer",
        asked=asked,
        picture=query_picture(asked),
        facts=dict(flatten(facts)),
        sure=sureness(asked.answer.sure) if asked.answer.sure else "",
        agree=asked.answer.sure.get("words") == "methods agree",
        sources=sources(desk, asked, most),
        images=len(asked.order),
        provenance=desk.provenance,
    )


def groups(asked: Asked, name: str, rows: Sequence[GroupRow]) -> str:
    """The groups that the sources come from.

    Args:
        asked: The answer.
        name: Of the field.
        rows: Highest first.

    Returns:
        HTML.
    """
    shown = list(rows[:GROUPS_SHOWN])
    finite = [value for row in shown for value in (row.low, row.high, row.mean, 0.0) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (min(max(value, low), high) - low) / span, 2)

    return _render("groups", asked=asked, name=name, rows=shown, more=len(rows) - len(shown), place=place)


def found(words: str, rows: Sequence[int], shown: Sequence[Shown], total: int) -> str:
    """What a search in the captions found.

    Args:
        words: What was looked for.
        rows: Of the pictures that are shown.
        shown: They.
        total: How many there are in all.

    Returns:
        HTML.
    """
    return _render("found", words=words, pictures=list(zip(rows, shown, strict=True)), total=total)


def picture(row: int, shown: Shown, helped: Sequence[Helped], images: int) -> str:
    """One training picture, and which of the pictures that were asked about it helped.

    Args:
        row: In the index.
        shown: The picture.
        helped: By its rank.
        images: How many training pictures there are.

    Returns:
        HTML.
    """
    asked = [(one, query_picture(one.asked)) for one in helped]
    return _render(
        "picture",
        row=row,
        shown=shown,
        facts={"key": shown.key} | dict(flatten(shown.facts)),
        helped=asked,
        images=images,
    )


def notice(sentence: str) -> str:
    """A sentence for whoever asked for what can't be done.

    Args:
        sentence: Plain text.

    Returns:
        HTML.
    """
    return _render("notice", sentence=sentence)


def heading(title: str, images: int, provenance: Any) -> str:
    """The head of the page.

    Args:
        title: What is asked here.
        images: How many training pictures there are.
        provenance: How answers are made.

    Returns:
        HTML.
    """
    return _render("heading", title=title, images=images, provenance=provenance)


def query_picture(asked: Asked) -> Picture | None:
    """The picture that was asked about.

    Args:
        asked: The answer.

    Returns:
        The picture, if there is one to see.
    """
    return picture_of(asked.query)


def _render(macro: str, **values: Any) -> str:
    return str(getattr(_templates(), macro)(**values)).strip()


@cache
def _templates() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "share": share}
    source = Path(__file__).with_name("fragments.html.jinja").read_text("utf-8")
    return environment.from_string(source).module
