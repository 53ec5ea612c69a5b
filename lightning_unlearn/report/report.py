"""The report of a run: pages for a person, files for machines. The same run gives the same files, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_unlearn.data.files import json_with_digest, write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.report.content import MEMBERS, Content, content_of, shown_queries
from lightning_unlearn.report.groups import Membership, Share, counted, draw, pool_of
from lightning_unlearn.report.groups_over_queries import over_queries
from lightning_unlearn.report.kept import keep_queries, keep_samples
from lightning_unlearn.report.near_copies import near_copies
from lightning_unlearn.report.pages import MOST_ON_ONE, Pages
from lightning_unlearn.report.pictures import InFiles, InPage, remove_pictures
from lightning_unlearn.report.ranking import Ranking, depth, ends_of, fetched, looked_at
from lightning_unlearn.report.records import assertion, query_record, report_record
from lightning_unlearn.report.words import flatten, named_methods, without_folders
from lightning_unlearn.scores.finished_words import outcome
from lightning_unlearn.scores.table import ScoreTable

__all__ = ["MEMBERS", "shown_queries", "write_report"]


def write_report(
    path: str | Path,
    table: ScoreTable,
    queries: Iterable[Sample],
    samples: Callable[[frozenset[str]], Iterable[Sample]],
    top: int = 12,
    bottom: int = 6,
    groups: Sequence[str] = (),
    recorded: str | None = None,
) -> Path:
    """Write the report of a run, each file whole or not at all, the first page after the others.

    ``report.json`` and ``assertion.json`` lie beside the page. With more than 50 queries the page only leads to others,
    which lie with their pictures in a folder of its name.

    Args:
        path: The HTML file; its folder is made if it is not there.
        table: The scores of all queries.
        queries: The queries' samples (:func:`shown_queries`), in any order; of one that is missing, what ``run.json``
            knows is shown.
        samples: Gives training samples by their keys, one after the other; called once, and may leave some out.
        top: How many rows a query's most influential images have.
        bottom: How many of its least influential ones.
        groups: Fields of the samples' json, whose values' shares of the ranked evidence are told.
        recorded: When the run was recorded, in ISO 8601, if that is known.

    Returns:
        The path.

    Raises:
        InputError: If there is nothing to show, scores are not finite, no sample has a field to group by, or a file
            can't be written.
    """
    _check(table, top, bottom)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, table, queries, samples, top, bottom, groups, recorded)
    except OSError as error:
        raise InputError(
            f"The report can't be written to {path} ({error.strerror}); free the disk, or name another place."
        ) from None
    return path


def _check(table: ScoreTable, top: int, bottom: int) -> None:
    if top < 1 or bottom < 0:
        raise InputError(
            f"A report shows at least one image a query, but top is {top} and bottom {bottom}; raise them."
        )
    if not table.keys or not table.queries:
        raise InputError("There is nothing to report: the table has no samples or no queries; score some first.")
    known = [table.scores, table.base_losses, *([] if table.errors is None else [table.errors])]
    if not all(np.isfinite(values).all() for values in known):
        raise InputError("The score table holds NaN or infinity; score again into another folder.")


def _write(
    path: Path,
    table: ScoreTable,
    queries: Iterable[Sample],
    samples: Callable[[frozenset[str]], Iterable[Sample]],
    top: int,
    bottom: int,
    groups: Sequence[str],
    recorded: str | None,
) -> None:
    first = max(depth(top, len(table.queries)), pool_of(len(table.keys), table.errors is not None) if groups else 0)
    ends = [ends_of(table, query, first, bottom) for query in table.queries]
    looked = frozenset(table.keys[row] for row in looked_at(ends, len(table.keys)))
    shown_rows = np.unique(np.concatenate([np.concatenate([one.first[: fetched(top)], one.last]) for one in ends]))
    shown = frozenset(table.keys[row] for row in shown_rows)
    memberships = [Membership(field, table.keys) for field in dict.fromkeys(groups)]
    folder = path.with_suffix("")
    album = InFiles(folder) if len(table.queries) > MOST_ON_ONE else InPage()

    wanted = frozenset(table.keys) if groups else shown | looked
    kept, codes = keep_samples(samples(wanted), shown, looked, memberships, album)
    for membership in memberships:
        membership.check()
    asked = keep_queries(queries, album)
    copies = near_copies(codes)
    ranking = Ranking(table, kept, copies)
    draws = draw(len(table.keys), table.errors is not None) if memberships else None

    records: list[dict[str, Any]] = []
    found: dict[str, list[Sequence[Share]]] = {membership.field: [] for membership in memberships}
    over: dict[str, list[Share]] = {}

    def contents() -> Iterator[Content]:
        for column, of_query in enumerate(ends):
            content = content_of(ranking, column, asked, of_query, top, memberships, draws)
            records.append(query_record(content))
            for field, listed in content.groups.items():
                found[field].append(listed)
            yield content
        over.update({field: listed for field, of_all in found.items() if (listed := over_queries(of_all))})

    pages = Pages(path, table, _common(table, copies, len(codes), len(looked), bool(groups), recorded))
    pages.write(contents(), over)
    remove_pictures(folder, pages.shown)
    machine = path.with_suffix(".json")
    write_atomically(machine, json_with_digest(report_record(table, records, copies, len(codes), over)))
    said = assertion(table, asked, [path, machine], recorded)
    write_atomically(path.with_name("assertion.json"), json_with_digest(said))


def _common(
    table: ScoreTable,
    copies: Mapping[str, tuple[str, ...]],
    coded: int,
    looked: int,
    fields: bool,
    recorded: str | None,
) -> dict[str, Any]:
    """What all pages say, by the names that the templates have for it."""
    run = without_folders(table.run)
    views = dict(run.get("views", {}))
    if views.get("captions", 0) is None:
        views["captions"] = "all"
    unlearning = run.get("unlearning", {})
    one = "set" if any("members" in target for target in run.get("targets", {}).values()) else "query"
    return {
        "one": one,
        "many": "sets" if one == "set" else "queries",
        "images": len(table.keys),
        "shards": len(set(table.shards)),
        "all_shards": len(run.get("shards", {})),
        "rule": run.get("rule"),
        "errors": table.errors is not None,
        "shared": views.get("noise") == "shared",
        # As a person named it; earlier runs only say what tables call it.
        "together": named_methods(table.parts),
        "method": run.get("method_class", run.get("method", {}).get("method")),
        "by_index": "index" in run.get("race", {}),
        "race": outcome(run["race"], one) if "race" in run else None,
        "run": run,
        "version": run.get("versions", {}).get("lightning-unlearn"),
        "recorded": recorded,
        "fields": fields,
        "counted": counted(len(table.keys)),
        "looked": _looked(len(table.keys), coded, looked, len(set(copies.values()))),
        "settings": {
            "Unlearning": dict(flatten({name: unlearning[name] for name in unlearning if name != "objective"})),
            "Method": dict(flatten(run.get("method", {}))),
            "Network": dict(flatten(run.get("network", {}))),
            "Objective": dict(flatten(unlearning.get("objective", run.get("objective", {})))),
            "Views": dict(flatten(views)),
            "Versions": dict(flatten(run.get("versions", {}))),
        },
    }


def _looked(images: int, coded: int, looked: int, groups: int) -> str:
    """Among which images near-copies were looked for."""
    if not coded:
        return "Near-copies among the training images were not looked for: there are no pictures of them."
    among = "all training images" if looked == images else f"the {looked:,} that rank highest for any of the pictures"
    if coded < looked:
        among += f", of which {coded:,} have a picture"
    found = f"{groups:,} group{'' if groups == 1 else 's'}"
    return (
        f"Near-copies share their influence, and stand in one row. They were looked for by their pixels among {among} "
        f"({found} found); pictures that were cropped or mirrored are not found."
    )
