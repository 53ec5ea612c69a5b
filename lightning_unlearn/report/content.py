"""What a report says of one query, before it becomes a page or a record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_unlearn.report.figures import Floats, power_of_ten
from lightning_unlearn.report.groups import Draws, Membership, Share, pool_of, shares
from lightning_unlearn.report.kept import Kept
from lightning_unlearn.report.ranking import Ends, Ranked, Ranking
from lightning_unlearn.report.words import flatten, share, sureness
from lightning_unlearn.scores.step_reasons import WORDS
from lightning_unlearn.scores.table import ScoreTable

# How a query was made: these of its facts come first.
MADE = ("kind", "of", "seed", "scheduler", "steps", "num_inference_steps", "guidance", "guidance_scale")
# So many of a set's queries are shown.
MEMBERS = 6


@dataclass(frozen=True)
class Content:
    """What a report says of a query.

    Attributes:
        number: 1 for the first query.
        key: Its key, or a set's name.
        captions: Its prompts.
        member: What is known of it, ``None`` of a set and of a query that was not found.
        members: What is known of the first queries of a set.
        made: How it was made.
        facts: What else its json says.
        target: What ``run.json`` says of it.
        out_of_range: Why its step was stopped, in words.
        sure: How sure the answer is, in a sentence.
        own: The training image that it is, if it is one.
        own_rank: That one's rank.
        top: The most influential images.
        bottom: The least influential ones.
        unit: What scores are divided by to be read.
        unit_name: What that is called.
        rest: What became of all training images.
        groups: Field to its groups' shares of the ranked evidence.
    """

    number: int
    key: str
    captions: list[str]
    member: Kept | None
    members: list[Kept]
    made: dict[str, str]
    facts: dict[str, str]
    target: Mapping[str, Any]
    out_of_range: list[str]
    sure: str
    own: str | None
    own_rank: int | None
    top: list[Ranked]
    bottom: list[Ranked]
    unit: float
    unit_name: str
    rest: dict[str, float]
    groups: dict[str, list[Share]]

    @property
    def prompt(self) -> str:
        """Its first prompt, or its key where it has none."""
        return self.captions[0] if self.captions else self.key

    @property
    def picture(self) -> Any:
        """The picture of it, or of the first query of a set."""
        first = self.members[0] if self.members else self.member
        return None if first is None else first.picture

    @property
    def forbidding(self) -> int:
        """How many of the images at the top say that they may not be trained on."""
        return sum(image.permission is not None and image.permission.kind == "forbids" for image in self.top)


def shown_queries(table: ScoreTable, target: str) -> list[str]:
    """The queries that the report shows of a target.

    Args:
        table: The scores.
        target: Its name in the table.

    Returns:
        Their keys: the query itself, or the first ones of a set.
    """
    members: list[str] = table.run.get("targets", {}).get(target, {}).get("members", [target])
    return members[:MEMBERS]


def content_of(
    ranking: Ranking,
    column: int,
    queries: Mapping[str, Kept],
    ends: Ends,
    top: int,
    memberships: Sequence[Membership],
    draws: Draws | None,
) -> Content:
    """What the report says of a query.

    Args:
        ranking: Of the table.
        column: The query's in the table.
        queries: What is known of queries.
        ends: Of its ranking.
        top: How many rows it has.
        memberships: Of the fields by which images are grouped.
        draws: For intervals of groups' shares; ``None`` without groups.

    Returns:
        The content.
    """
    table = ranking.table
    key = table.queries[column]
    target = table.run.get("targets", {}).get(key, {})
    in_set = "members" in target
    member = None if in_set else queries.get(key)
    metadata = member.metadata if member else {}
    facts = dict(flatten({name: value for name, value in metadata.items() if name != "captions"}))
    # A query that is a training picture says which; a key alone may be the same by chance.
    own = metadata.get("of") if metadata.get("of") in table.keys else None
    scores = table.scores[:, column].astype(np.float64)
    errors = None if table.errors is None else table.errors[:, column].astype(np.float64)
    largest = float(np.abs(scores).max())
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    rows = ranking.top(key, ends, top)
    pool = ends.first[: pool_of(len(scores), errors is not None)]
    best = 0 if table.finished is None else table.run["race"]["top"]
    return Content(
        number=column + 1,
        key=key,
        captions=member.captions if member else target.get("captions") or [],
        member=member,
        members=[queries.get(name, Kept(name, [], None)) for name in shown_queries(table, key)] if in_set else [],
        made=_named(key, target) | {name: facts.pop(name) for name in MADE if name in facts},
        facts=facts,
        target=target,
        # A run of another version may know reasons that this one doesn't.
        out_of_range=[WORDS.get(reason, reason) for reason in target.get("out_of_range", [])],
        sure=sureness(target.get("sure", {})),
        own=own,
        own_rank=table.rank(key, own) + 1 if own is not None else None,
        top=rows,
        bottom=ranking.bottom(key, ends, rows[-1].rank),
        unit=10.0**exponent,
        unit_name=power_of_ten(exponent) if exponent else "",
        rest=_rest(scores, table.base_losses.astype(np.float64), table.run.get("rule")),
        groups={}
        if draws is None
        else {one.field: shares(one, pool, scores, errors, draws, table.finished, best) for one in memberships},
    )


def _named(key: str, target: Mapping[str, Any]) -> dict[str, str]:
    """What a target is called, and what of it is unlearned."""
    if "members" in target:
        return {"name": key, "queries": f"{len(target['members']):,}"}
    return {"key": key} | ({"region": f"{share(target['region'])} of it"} if "region" in target else {})


def _rest(scores: Floats, base_losses: Floats, rule: str | None) -> dict[str, float]:
    """What unlearning did to all training images: how many losses rose, and by which shares of themselves."""
    rest = {"rose": float((scores > 0).mean()), "fell": float((scores < 0).mean())}
    if rule == "difference":
        known = base_losses > 0
        changes = scores[known] / base_losses[known]
    elif rule == "ratio":  # r = (u - b) / (u + b), so u / b - 1 = 2 r / (1 - r)
        known = np.abs(scores) < 1
        changes = 2 * scores[known] / (1 - scores[known])
    else:  # of another rule's scores nobody knows what they say of the loss
        return rest
    if len(changes):
        low, median, high = np.quantile(changes, (0.05, 0.5, 0.95)).tolist()
        rest |= {"low": low, "median": median, "high": high}
    return rest
