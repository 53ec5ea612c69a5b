"""The page a person looks at: one HTML file that needs neither a network nor a script.

What comes out of a shard or a run is text to be escaped, or a picture to be decoded and encoded again; a
Content-Security-Policy forbids the page scripts and requests. The same run gives the same page, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.report.figures import Floats, Picture, histogram, picture_of, power_of_ten
from lightning_unlearn.report.words import duration, flatten, named_methods, number, share, sureness
from lightning_unlearn.scores.race_folder import outcome
from lightning_unlearn.scores.step_reasons import WORDS
from lightning_unlearn.scores.table import ScoreTable

Rows = NDArray[np.intp]

# How a query was made: these of its facts come first.
MADE = ("kind", "of", "seed", "scheduler", "steps", "num_inference_steps", "guidance", "guidance_scale")


# So many of a set's queries are shown.
MEMBERS = 6


@dataclass(frozen=True)
class Member:
    """A query of a set.

    Attributes:
        key: The query's.
        captions: Empty if the query was not found.
        picture: ``None`` if there is nothing to see.
    """

    key: str
    captions: list[str]
    picture: Picture | None


@dataclass(frozen=True)
class Ranked:
    """A training image and its place among all for one query.

    Attributes:
        rank: 1 for the most influential.
        key: Of the sample.
        score: Its score.
        base_loss: Its mean loss before unlearning.
        captions: Empty if the sample was not found.
        picture: ``None`` if there is nothing to see.
        error: Half the width of the score's 95 % interval; ``None`` if the table has none.
        ranks: The lowest and the highest rank that the intervals leave open; ``None`` without them.
        finished: Whether it was scored by all views; after a race, others were not.
        said: Its rank by each method, where several were asked together.
    """

    rank: int
    key: str
    score: float
    base_loss: float
    captions: list[str]
    picture: Picture | None
    error: float | None = None
    ranks: tuple[int, int] | None = None
    finished: bool = True
    said: Mapping[str, int] = field(default_factory=dict)


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


def write_report(
    path: str | Path,
    table: ScoreTable,
    queries: Sequence[Sample],
    pictures: Callable[[Sequence[str]], Mapping[str, Sample]],
    top: int = 12,
    bottom: int = 6,
) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        path: The HTML file; its folder is made if it is not there.
        table: The scores of all queries.
        queries: The queries' samples (:func:`shown_queries`), in any order; of one that is missing, what ``run.json``
            knows is shown.
        pictures: Fetches training samples by key; called once with all that are shown, and may leave some out.
        top: How many of a query's most influential images are shown.
        bottom: How many of its least influential ones.

    Returns:
        The path.

    Raises:
        InputError: If there is nothing to show, scores are not finite, or the file can't be written.
    """
    if top < 1 or bottom < 0:
        raise InputError(
            f"A report shows at least one image a query, but top is {top} and bottom {bottom}; raise them."
        )
    if not table.keys or not table.queries:
        raise InputError("There is nothing to report: the table has no samples or no queries; score some first.")
    known = [table.scores, table.base_losses, *([] if table.errors is None else [table.errors])]
    if not all(np.isfinite(values).all() for values in known):
        raise InputError("The score table holds NaN or infinity; score again into another folder.")
    path = Path(path)
    page = _render(table, {query.key: query for query in queries}, pictures, top, bottom)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A caption may hold half a surrogate pair, which JSON can write and UTF-8 can't.
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(
            f"The report can't be written to {path} ({error.strerror}); free the disk, or name another place."
        ) from None
    return path


# ---------------------------------------------------------------------- what the page says


def _render(
    table: ScoreTable,
    queries: Mapping[str, Sample],
    pictures: Callable[[Sequence[str]], Mapping[str, Sample]],
    top: int,
    bottom: int,
) -> str:
    from jinja2 import Environment, StrictUndefined

    ends: list[tuple[Rows, Rows]] = []
    for query in table.queries:
        order = table.order(query)
        ends.append((order[:top].copy(), order[max(top, len(order) - bottom) :].copy()))
    samples = pictures(sorted({table.keys[row] for rows in ends for row in np.concatenate(rows)}))
    run = table.run
    views = dict(run.get("views", {}))
    if views.get("captions", 0) is None:
        views["captions"] = "all"
    unlearning = run.get("unlearning", {})
    sets = any("members" in target for target in run.get("targets", {}).values())
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "share": share, "duration": duration}
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text("utf-8"))
    return template.render(
        queries=[_query(table, column, queries, *rows, samples) for column, rows in enumerate(ends)],
        one="set" if sets else "query",
        many="sets" if sets else "queries",
        images=len(table.keys),
        shards=len(set(table.shards)),
        all_shards=len(run.get("shards", {})),
        rule=run.get("rule"),
        errors=table.errors is not None,
        shared=views.get("noise") == "shared",
        # As a person named it; earlier runs only say what tables call it.
        together=named_methods(table.parts),
        method=run.get("method_class", run.get("method", {}).get("method")),
        race=outcome(run["race"], "set" if sets else "query") if "race" in run else None,
        run=run,
        settings={
            "Unlearning": dict(flatten({name: unlearning[name] for name in unlearning if name != "objective"})),
            "Method": dict(flatten(run.get("method", {}))),
            "Network": dict(flatten(run.get("network", {}))),
            "Objective": dict(flatten(unlearning.get("objective", run.get("objective", {})))),
            "Views": dict(flatten(views)),
            "Versions": dict(flatten(run.get("versions", {}))),
        },
    )


def _query(
    table: ScoreTable,
    column: int,
    queries: Mapping[str, Sample],
    highest: Rows,
    lowest: Rows,
    samples: Mapping[str, Sample],
) -> dict[str, Any]:
    from markupsafe import Markup

    key = table.queries[column]
    target = table.run.get("targets", {}).get(key, {})
    in_set = "members" in target
    sample = None if in_set else queries.get(key)
    members = [_member(name, queries.get(name)) for name in shown_queries(table, key)] if in_set else []
    captions = sample.captions if sample else target.get("captions") or []
    metadata = sample.metadata if sample else {}
    facts = dict(flatten({name: value for name, value in metadata.items() if name != "captions"}))
    # A query that is a training picture says which; a key alone may be the same by chance.
    own = metadata.get("of") if metadata.get("of") in table.keys else None
    scores = table.scores[:, column].astype(np.float64)
    ranges = None if table.errors is None else 1 + table.rank_ranges(key)
    largest = float(np.abs(scores).max())
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    unit, unit_name = 10.0**exponent, power_of_ten(exponent) if exponent else ""
    return {
        "number": column + 1,
        "key": key,
        "prompt": captions[0] if captions else key,
        "captions": captions,
        "picture": members[0].picture if members else picture_of(sample),
        "members": members,
        "made": _named(key, target) | {name: facts.pop(name) for name in MADE if name in facts},
        "facts": facts,
        "target": target,
        # A run of another version may know reasons that this one doesn't.
        "out_of_range": [WORDS.get(reason, reason) for reason in target.get("out_of_range", [])],
        "sure": sureness(target.get("sure", {})),
        "own": own,
        "own_rank": table.rank(key, own) + 1 if own is not None else None,
        "top": _ranked(table, column, highest, 1, ranges, samples),
        "bottom": _ranked(table, column, lowest, len(scores) - len(lowest) + 1, ranges, samples),
        "unit": unit,
        "unit_name": unit_name,
        "plot": Markup(histogram(scores / unit, scores[highest] / unit, unit_name, f"plot{column + 1}-")),
        "rest": _rest(scores, table.base_losses.astype(np.float64), table.run.get("rule")),
    }


def _member(key: str, sample: Sample | None) -> Member:
    return Member(key, sample.captions if sample else [], picture_of(sample))


def _named(key: str, target: Mapping[str, Any]) -> dict[str, str]:
    """What a target is called, and what of it is unlearned."""
    if "members" in target:
        return {"name": key, "queries": f"{len(target['members']):,}"}
    return {"key": key} | ({"region": f"{share(target['region'])} of it"} if "region" in target else {})


def _ranked(
    table: ScoreTable, column: int, rows: Rows, first: int, ranges: Rows | None, samples: Mapping[str, Sample]
) -> list[Ranked]:
    ranked = []
    for rank, row in enumerate(rows, first):
        sample = samples.get(table.keys[row])
        ranked.append(
            Ranked(
                rank,
                table.keys[row],
                float(table.scores[row, column]),
                float(table.base_losses[row]),
                sample.captions if sample else [],
                picture_of(sample),
                None if table.errors is None else float(table.errors[row, column]),
                None if ranges is None else (int(ranges[row, 0]), int(ranges[row, 1])),
                table.finished is None or bool(table.finished[row]),
                {name: 1 + int((part[:, column] > part[row, column]).sum()) for name, part in table.parts.items()},
            )
        )
    return ranked


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
