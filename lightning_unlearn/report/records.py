"""The report for machines: all that its pages show, and in which form an answer can be attached to a picture.

``report.json`` has the ranks, scores and words of the pages. ``assertion.json`` says how the answer was made, in the
form in which C2PA (Coalition for Content Provenance and Authenticity, specification 2.2) writes assertions: a label and
data, with hashes of what it refers to. It is not signed. ``assertion.schema.json`` describes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_unlearn.report.content import Content
from lightning_unlearn.report.groups import Share, counted
from lightning_unlearn.report.kept import Kept
from lightning_unlearn.report.ranking import Ranked
from lightning_unlearn.report.words import without_folders
from lightning_unlearn.scores.table import ScoreTable

LABEL = "org.lightning-unlearn.attribution"
ASSERTION_VERSION = 1
UNSIGNED = (
    "This assertion is not signed: anybody could have written or changed it. Who attaches it to a picture signs for it."
)
NOT_SAID = (
    "Ranks are evidence and no proof: what the model would have made without an image shows only when it is trained "
    "again without it.",
    "No number here is the share of an image or a group in the picture.",
    "Nothing is said about who made or owns an image, or whether anything was copied.",
)
# What `run.json` says that the numbers depend on.
SETTINGS = (
    "rule",
    "flips",
    "views",
    "timesteps",
    "unlearning",
    "method",
    "method_class",
    "parts",
    "objective",
    "network",
    "precision",
    "race",
)


def query_record(content: Content) -> dict[str, Any]:
    """What the report says of a query, for machines.

    Args:
        content: What it says.

    Returns:
        JSON-like.
    """
    target = {name: value for name, value in content.target.items() if name not in ("captions", "members")}
    return {
        "key": content.key,
        "captions": content.captions,
        **({"members": list(content.target["members"])} if "members" in content.target else {}),
        "made": {**content.made, **content.facts},
        "target": target,
        "sure": content.sure,
        "all_images": content.rest,
        **({"own": {"key": content.own, "rank": content.own_rank}} if content.own is not None else {}),
        "most_influential": [_image(image) for image in content.top],
        "least_influential": [_image(image) for image in content.bottom],
        "groups": group_records(content.groups),
    }


def _image(image: Ranked) -> dict[str, Any]:
    record: dict[str, Any] = {
        "rank": image.rank,
        "key": image.key,
        "score": image.score,
        "base_loss": image.base_loss,
        "captions": image.captions,
        "finished": image.finished,
    }
    if image.error is not None:
        record["error"] = image.error
    if image.ranks is not None:
        record["ranks"] = list(image.ranks)
    if image.said:
        record["ranks_by_method"] = dict(image.said)
    if image.permission is not None:
        record["permission"] = asdict(image.permission)
    if image.copies:
        record["near_copies"] = [asdict(copy) for copy in image.copies]
    return record


def group_records(groups: Mapping[str, Sequence[Share]]) -> dict[str, list[dict[str, Any]]]:
    """Groups' shares for machines.

    Args:
        groups: By field.

    Returns:
        JSON-like.
    """
    return {field: [asdict(one) for one in listed] for field, listed in groups.items()}


def report_record(
    table: ScoreTable,
    queries: Sequence[Mapping[str, Any]],
    copies: Mapping[str, tuple[str, ...]],
    looked_at: int,
    over_queries: Mapping[str, Sequence[Share]],
) -> dict[str, Any]:
    """``report.json``.

    Args:
        table: The scores.
        queries: :func:`query_record` of each.
        copies: Of each image that has near-copies, the keys of its group.
        looked_at: Among how many images near-copies were looked for.
        over_queries: Field to groups' shares over all queries.

    Returns:
        JSON-like.
    """
    return {
        "kind": "lightning-unlearn report",
        "version": _version(table),
        "training_images": len(table.keys),
        "shards": {"scored": len(set(table.shards)), "all": len(table.run.get("shards", {}))},
        "fingerprints": table.run.get("fingerprints", {}),
        "settings": _settings(table.run),
        "near_copies": {
            "looked_at": looked_at,
            "groups": [list(group) for group in sorted(set(copies.values()))],
        },
        "groups": {"first": counted(len(table.keys)), "over_queries": group_records(over_queries)},
        "does_not_say": list(NOT_SAID),
        "queries": list(queries),
    }


def assertion(
    table: ScoreTable, queries: Mapping[str, Kept], files: Sequence[Path], recorded: str | None
) -> dict[str, Any]:
    """``assertion.json``: how the answer was made.

    Args:
        table: The scores.
        queries: What is known of queries.
        files: Of the report, which it vouches for by their hashes; they lie beside it.
        recorded: When the run was recorded, in ISO 8601, if that is known.

    Returns:
        JSON-like: a label and data.
    """
    run = table.run
    shards = run.get("shards", {})
    asked = []
    for key in table.queries:
        kept = queries.get(key)
        known = {} if kept is None or kept.sha256 is None else {"alg": "sha256", "hash": kept.sha256}
        asked.append({"key": key, **known})
    return {
        "label": LABEL,
        "kind": "Json",
        "data": {
            "version": ASSERTION_VERSION,
            "signed": False,
            "signed_note": UNSIGNED,
            "made_by": {
                "name": "lightning-unlearn",
                "version": _version(table),
                "packages": run.get("versions", {}),
            },
            **({"recorded": recorded} if recorded else {}),
            "question": "Which training images made these pictures possible?",
            "method": {
                "name": run.get("method_class", run.get("method", {}).get("method")) or "unlearning",
                "settings": _settings(run),
            },
            "fingerprints": {"alg": "blake2b-128", **run.get("fingerprints", {})},
            "training_data": {
                "images": len(table.keys),
                "shards_scored": len(set(table.shards)),
                "shards": [
                    {"name": name, **{of: info[of] for of in ("samples", "bytes", "version") if of in info}}
                    for name, info in shards.items()
                ],
            },
            "queries": asked,
            "files": [
                {"url": path.name, "alg": "sha256", "hash": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in files
            ],
            "does_not_say": list(NOT_SAID),
        },
    }


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = without_folders({name: run[name] for name in SETTINGS if name in run})
    return settings


def _version(table: ScoreTable) -> str:
    """Of the package that scored."""
    version: str = table.run.get("versions", {}).get("lightning-unlearn", "unknown")
    return version
