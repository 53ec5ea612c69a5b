"""Who was scored in full, by a race or after an index's answer, and what that promises: in words."""

from __future__ import annotations

from typing import Any


def outcome(race: dict[str, Any], one: str = "query") -> str:
    """What a race found and what it promises, in words; or what was scored exactly after an index's answer.

    Args:
        race: The entry of that name in ``run.json``; with ``index`` where an index chose who was finished.
        one: What is unlearned: a query or a set.

    Returns:
        Some sentences.
    """
    return _of_index(race, one) if "index" in race else _of_race(race, one)


def _of_race(race: dict[str, Any], one: str) -> str:
    said = (
        f"A race: all {race['samples']:,} images were scored on {race['views']} of {race['all_views']} draws, and "
        f"{race['finished']:,} of them on all; only these ranks are final."
    )
    best = f"the {race['top']} best of each {one} by all draws"
    missing = race.get("missing", 0)  # not in older tables
    if missing:
        said += f" {missing:,} more should have been, but got no finite score there."
    if race["left_in_reach"] is None:
        return f"{said} So few draws do not tell how far scores scatter: nothing is promised of {best}."
    if race["left_in_reach"] > missing:
        return (
            f"{said} {race['left_in_reach'] - missing:,} more could be among {best}, but were beyond the cap "
            f"of {race['share']:.0%}: nothing is promised; raise the share or the number of views."
        )
    if missing:
        return f"{said} What is missing could be among {best}: nothing is promised; check the samples and the model."
    if race["beyond"] > 1 - race["confidence"]:
        return (
            f"{said} But {race['beyond']:.1%} of the finished scores lie beyond the upper end that the few draws gave "
            f"them, which was to hold for all but {(1 - race['confidence']) / race['top']:.2%}: what the promise "
            "assumes is broken; race with more views."
        )
    return (
        f"{said} For each {one}, the {race['top']} best by all draws are among them with a probability of at least "
        f"{race['confidence']:.0%}, if the draws of an image scatter like independent ones of a normal distribution."
    )


def _of_index(race: dict[str, Any], one: str) -> str:
    return (
        f"By an index: what is kept of all {race['samples']:,} images says which {race['top']:,} of each {one} come"
        f" first, and those ({race['finished']:,} together) were scored exactly; their ranks among each other are "
        "those of the exact scores. The others keep the index's scores, on the same scale, and come after them."
    )
