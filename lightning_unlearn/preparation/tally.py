"""What was not taken of a data set, counted and named, so that nothing is lost in silence."""

from __future__ import annotations

from typing import Any

SHOWN = 3


class Tally:
    """Counts of things by what befell them, with the first names of each."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Count one.

        Args:
            what: What befell it, in the plural: ``"masks were left out"``.
            name: Its name.
        """
        self._counts[what] = self._counts.get(what, 0) + 1
        names = self._names.setdefault(what, [])
        if len(names) < SHOWN:
            names.append(name.encode(errors="replace").decode())

    def lines(self) -> list[str]:
        """One clause for each kind: how many, what befell them, the first of them."""
        return [
            f"{count} {what}: {', '.join(self._names[what])}{', ...' if count > SHOWN else ''}"
            for what, count in self._counts.items()
        ]

    def as_json(self) -> list[dict[str, Any]]:
        """The counts for a manifest."""
        return [{"what": what, "count": count, "first": self._names[what]} for what, count in self._counts.items()]
