"""Write INDEX.md: what index_recall.py and index_speed.py have measured.

First `python benchmarks/index_recall.py BENCH --json > benchmarks/BENCH/index.json` of each bench, and
`python benchmarks/index_speed.py --json > benchmarks/index_speed.json`; then `python benchmarks/index_page.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER / "INDEX.md"
HEAD = """\
# What an index keeps

Made by `python benchmarks/index_page.py` from what `python benchmarks/index_recall.py` and
`python benchmarks/index_speed.py` have measured; their first lines say how. The full answer is
`attribute --method Consensus` with all weights (DAS, D-TRAK and unlearning); the index's own is DAS and D-TRAK of
projected gradients.
"""


def benches() -> dict[str, dict[str, Any]]:
    """What index_recall.py has measured, by bench."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/index.json"))}
    return {name: facts[name] for name, facts in found.items()}


def recall_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The shortlists."""
    lines = [
        "## Shortlists",
        "",
        "Of the first 1, 3 and 10 by the full answer, how many are in the shortlist of the index; means over queries. "
        "The marked row has 5 % of the samples (1 % from 5,000 on), at least 10.",
        "",
        "| bench | samples | shortlist | first 1 | first 3 | first 10 |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in found.items():
        for size, at in facts["recall"].items():
            mark = " (marked)" if int(size) == facts["shortlist"] else ""
            cells = " | ".join(f"{100 * at[first]:.1f} %" for first in ("1", "3", "10"))
            lines.append(f"| {name} | {facts['samples']:,} | {size}{mark} | {cells} |")
    return lines


def lds_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """The index alone."""
    lines = [
        "## The index alone",
        "",
        "Linear datamodelling score on the choosing and the reporting half of the evidence.",
        "",
        "| bench | the index | DAS and D-TRAK of whole gradients | the full answer | bytes a sample | numbers each |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in found.items():
        halves = facts["lds"].values()
        cells = " | ".join(
            " / ".join(f"{half[kind]:.3f}" for half in halves) for kind in ("index", "whole_gradients", "full")
        )
        numbers = next(iter(facts["numbers"].values()))
        lines.append(f"| {name} | {cells} | {facts['bytes_a_sample']:,} | {numbers:,} |")
    return lines


def cost_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    """Calls and seconds."""
    lines = [
        "## Calls",
        "",
        "Passes of one view through the network, a backward pass counting as two; the shortlist is the marked one. The "
        "paper's recipe has 200 views a sample and no other cost counted than its 128 draws. Seconds are of "
        "processor time.",
        "",
        "| bench | the index, once | a query with index and shortlist | without an index | the paper's recipe, times "
        "the query's with an index | seconds once | seconds a query by the index alone, gradients included |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, facts in found.items():
        counted = facts["calls"]
        lines.append(
            f"| {name} | {counted['once']:,} | {counted['with_index']:,} | {counted['full']:,} | "
            f"{counted['recipe_over_with_index']} | {facts['seconds_once'] or '–'} | {facts['seconds_a_query']} |"
        )
    return lines


def speed_lines() -> list[str]:
    """How long and how much memory."""
    found = json.loads((FOLDER / "index_speed.json").read_text())
    small, large, about = found["sample"], found["large"], found["about"]
    before, after = large["memory_before"], large["memory_after"]
    return [
        "## Time and memory",
        "",
        f"On {about['cores']} cores without a GPU, torch {about['torch']}, {about['date']}.",
        "",
        "| | samples | numbers of each kind | a query | with its gradients | kernels, once |",
        "|---|---|---|---|---|---|",
        f"| sample model, all weights | {small['samples']:,} | {small['numbers']:,} | {small['seconds']} s | "
        f"{small['seconds_with_gradients']} s | {small['seconds_first_opened']} s |",
        f"| random numbers | {large['samples']:,} | {large['numbers']:,} | {large['seconds']} s | – | "
        f"{large['seconds_first_opened']} s |",
        "",
        f"Memory of the larger one's process in MB, after the first query and after five more: {before['own']} and "
        f"{after['own']} of its own, {before['resident']} and {after['resident']} with pages of files.",
    ]


def main() -> None:
    """Write the page."""
    found = benches()
    parts = [recall_lines(found), lds_lines(found), cost_lines(found)]
    if (FOLDER / "index_speed.json").is_file():
        parts.append(speed_lines())
    PAGE.write_text(HEAD + "\n" + "\n\n".join("\n".join(part) for part in parts) + "\n")
    print(f"Page: {PAGE}")


if __name__ == "__main__":
    main()
