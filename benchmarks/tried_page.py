"""What was tried so that nobody has to tune, and how it ended: a part of the results page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benches import BENCHES, Bench
from shown import difference

from lightning_unlearn.evaluation.results import Value
from lightning_unlearn.scores.agreement import AGREE, CAPTION, UNSURE

HOW_SURE = BENCHES / "how_sure.json"
MEASURES = {
    "first_ten": "what the first ten have in common",
    "rank_correlation": "rank correlation of the parts",
    "correlation": "correlation of the parts",
    "caption_share": "share of the scores' variance between captions",
}


def how_sure() -> list[str]:
    """Whether the words on sureness foretell."""
    if not HOW_SURE.is_file():
        return []
    found = json.loads(HOW_SURE.read_text())
    lines = [
        "## Does it know how sure it is?",
        "",
        "By `python benchmarks/how_sure.py`: Spearman's correlation of what several methods say together of a query "
        "with the query's LDS (less its bench's mean), over the queries of all benches, and the mean LDS of the "
        "queries under each of the words that `run.json` and the report print. The bounds of the words were chosen on "
        "these same benches.",
        "",
        "| | correlation with LDS, 95 % |",
        "|---|---|",
    ]
    for name, label in MEASURES.items():
        row = found[name]
        if row is not None:
            lines.append(
                f"| {label} | {row['correlation']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}] |"
            )
    lines += ["", "| words | queries | mean LDS |", "|---|---|---|"]
    for words in (AGREE, UNSURE, CAPTION):
        if words in found:
            row = found[words]
            low, high = row["interval"]
            lines.append(f"| {words} | {row['queries']} | {row['lds']:.3f} [{low:.3f}, {high:.3f}] |")
    return [*lines, ""]


def ridges(benches: Sequence[Bench]) -> list[str]:
    """Whether a ridge by the kernel's leave-one-out error is as good as a tuned one."""
    lines = []
    for bench in benches:
        path = bench.folder / "self_adjusted.json"
        if path.is_file():
            for row in json.loads(path.read_text())["rows"]:
                apart = Value(row["own_lds"] - row["tuned_lds"], *row["own_less_tuned"])
                cells = f"{row['own']:g} | {row['tuned']:g} | {row['own_lds']:.3f} | {difference(apart)}"
                lines.append(f"| {bench.name} | {row['method']} | {cells} |")
    if not lines:
        return []
    return [
        "## A ridge that the model chooses",
        "",
        "By `python benchmarks/self_adjusted.py`: the ridge whose regression best foretells each training picture's "
        "root mean squared error from all others (leave-one-out error in closed form), against the one that is tuned "
        "on the choosing half. LDS on the reporting half. With all weights it takes too small ridges, and with "
        "the loss as output function one that is too large, so no method uses it.",
        "",
        "| bench | method | its own ridge | the tuned one | LDS with its own | less the tuned one's |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def tried(benches: Sequence[Bench]) -> list[str]:
    """Both."""
    return [*how_sure(), *ridges(benches)]
