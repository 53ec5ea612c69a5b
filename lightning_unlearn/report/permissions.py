"""What a training image's own fields say of its licence, and of whether it may be trained on.

Fields of a sample's json are read as people and standards write them: ``license`` or ``licence`` and the like in plain
text, flags (``noAI: true``, ``robots: noai``), and entries of the Training and Data Mining Assertion of the Creator
Assertions Working Group (``cawg.ai_training: {"use": "notAllowed"}``; C2PA's own of before, ``c2pa.…``). What they say
is shown and never judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["forbids", "restricts", "says"]

# Fields whose text is the licence, their names without case and punctuation.
LICENCES = frozenset(
    {"rights"} | {f"licen{letter}e{part}" for letter in "sc" for part in ("", "type", "name", "url", "uri")}
)
# Fields that say by "true" that it may not be trained on.
FLAGS = frozenset({"noai", "noaitraining", "noimageai", "optout", "optedout", "tdmreservation", "donottrain"})
# Fields whose text says whether it may be.
ENTRIES = re.compile(r"training|datamining|machinelearning|inference|generative|robots|aiuse|tdm")
FORBIDDEN = re.compile(r"not[ _-]?allowed|prohibited|\bno[ _-]?((image[ _-]?)?ai|tdm)\b|disallow|forbid", re.IGNORECASE)
# Words that take a ban back.
NOT_FORBIDDEN = re.compile(
    r"\b(not|n't|never|nothing( is)?|isn['’]?t) +(prohibited|disallowed|forbidden)", re.IGNORECASE
)
# What a licence's ban must name: it may be of something else, as of selling copies.
OF_TRAINING = re.compile(
    r"\b(ai|aiml|tdm|ml)\b|training|data[ _-]?mining|machine[ _-]?learning|artificial intelligence|generative"
    r"|^\W*(not[ _-]?allowed|prohibited|forbidden|disallow(ed)?)\W*$|no(image)?ai\b",
    re.IGNORECASE,
)
# Terms of which some uses are free and others not.
RESTRICTED = re.compile(r"\bconstrained\b|\b(nc|nd)\b|non-?commercial|all rights reserved|no ?deriv", re.IGNORECASE)
LONGEST = 80  # characters of a field that are shown


@dataclass(frozen=True)
class Permission:
    """What an image's fields say.

    Attributes:
        kind: ``forbids`` training, ``restricts`` some uses, or only ``says`` something.
        words: The field and its text.
    """

    kind: Kind
    words: str


def permission_of(metadata: Mapping[str, Any]) -> Permission | None:
    """What a sample's fields say of its licence.

    Args:
        metadata: Its json.

    Returns:
        The strictest that is said; ``None`` if nothing is.

    Example:
        >>> permission_of({"license": "CC-BY-NC-4.0"})
        Permission(kind='restricts', words='license: CC-BY-NC-4.0')
    """
    order: tuple[Kind, ...] = ("forbids", "restricts", "says")
    said = [permission for name, value in _fields(metadata) if (permission := _said(name, value)) is not None]
    return min(said, key=lambda permission: order.index(permission.kind), default=None)


def _fields(tree: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Nested names and what stands there; captions are no fields."""
    for name, value in tree.items():
        place = (*before, str(name))
        if isinstance(value, Mapping):
            yield from _fields(value, place)
        elif isinstance(value, list) and name != "captions":
            for item in value:
                if isinstance(item, Mapping):
                    yield from _fields(item, place)
                else:
                    yield place, item
        elif name != "captions":
            yield place, value


def _said(place: tuple[str, ...], value: Any) -> Permission | None:
    names = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in place]
    text = value if isinstance(value, str) else ""
    # "1" is how TDMRep reserves.
    true = value is True or value == 1 or text.strip().lower() in ("true", "yes", "1")
    shown = re.sub(r"\s+", " ", f"{' '.join(place)}: {value if isinstance(value, str) else str(value).lower()}").strip()
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    if names[-1] in FLAGS and true:
        return Permission("forbids", shown)
    is_licence = names[-1] in LICENCES
    if not text.strip() or not (is_licence or any(ENTRIES.search(name) for name in names)):
        return None
    text = NOT_FORBIDDEN.sub("", text)
    if FORBIDDEN.search(text):
        of_training = not is_licence or OF_TRAINING.search(text) is not None
        return Permission("forbids" if of_training else "restricts", shown)
    if RESTRICTED.search(text):
        return Permission("restricts", shown)
    return Permission("says", shown) if is_licence else None
