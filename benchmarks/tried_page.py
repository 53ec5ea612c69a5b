"""What was tried so that nobody has to tune, and how it ended: a part of the results page."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benches import BENCHES, Bench
from method_settings import LABELS
from shown import difference, shown

from lightning_unlearn.evaluation.results import Value
from lightning_unlearn.scores.agreement import AGREE, CAPTION, UNSURE

HOW_SURE = BENCHES / "how_sure.json"
WITHIN, CONSENSUS_TRIED = BENCHES / "within_caption.json", BENCHES / "consensus_tried.json"
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
    benches = [
        f"{name}: " + ", ".join(f"{words} {count} ({lds:.3f})" for words, (count, lds) in sorted(under.items()))
        for name, under in found.get("benches", {}).items()
    ]
    lines += ["", f"How many on each bench, and their mean LDS: {'; '.join(benches)}."] * bool(benches)
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


def within_captions() -> list[str]:
    """What methods know beyond the caption."""
    if not WITHIN.is_file():
        return []
    found = json.loads(WITHIN.read_text())
    lines = [
        "## More than the caption",
        "",
        "By `python benchmarks/within_caption.py`: the LDS of scores from which each caption's mean was taken, so that "
        "only what tells the pictures of a caption apart is left, on the benches that have several pictures a caption. "
        "Settings are those that were chosen on the other benches, as in the first table; reported on the reporting "
        "half.",
        "",
    ]
    of = found["within"]
    for name, bench in of.items():
        low, high = bench["ours_less_share_of_best"]
        lines.append(
            f"- {name}: `Consensus` has {bench['ours']:.3f}; the best method, whose setting was chosen for this on the "
            f"bench itself, {bench['best_within']:.3f} ({LABELS[bench['best'][0]].replace('**', '')}, "
            f"{bench['best'][1]}); `Consensus` less nine tenths of it: [{low:+.3f}, {high:+.3f}]."
        )
    for name, above in found["above"].items():
        text, pixels = (difference(Value(*above[method])) for method in ("text_similarity", "pixel_similarity"))
        lines.append(f"- {name}: as they are, `Consensus` less text similarity {text}, less pixel similarity {pixels}.")
    lines += ["", f"| method | {' | '.join(of)} |", "|---|" + "---|" * len(of)]
    rows = {name: {row["method"]: row for row in bench["rows"]} for name, bench in of.items()}
    for method in next(iter(rows.values())):
        cells = [shown(Value(*there[method]["within"])) if method in there else "–" for there in rows.values()]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    return [*lines, ""]


def consensus_tried() -> list[str]:
    """What asking several methods together could do otherwise."""
    if not CONSENSUS_TRIED.is_file():
        return []
    found = json.loads(CONSENSUS_TRIED.read_text())
    names, base = found["benches"], found["rows"][0]
    lines = [
        "## Several asked together: what was tried",
        "",
        "By `python benchmarks/consensus_tried.py`: one thing changed at a time from what `Consensus` asks (DAS with a "
        "ridge of 0.001, D-TRAK with 0.01, unlearning with a rise of 30 % and the difference; all weights). LDS on the "
        "half that chooses and on the half that reports, there with the interval of the difference from the first row; "
        "**bold** where it is beyond noise. “linear 70%” is a step that ends where the real rise is 70 % of the "
        "first-order one.",
        "",
    ]
    for name, taken in found["taken"].items():
        apart = difference(Value(*taken["gain"]))
        lines.append(f"- The other benches' choosing halves take “{taken['trial']}” for {name}: {apart} there.")
    lines += ["", f"| tried | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row in found["rows"]:
        cells = []
        columns = zip(row["chosen_on"], row["reported_on"], row["less_as_it_is"], strict=True)
        for chose, reported, (low, high) in columns:
            bold = "**" * (low * high > 0)
            apart = "" if row is base else f" {bold}[{low:+.3f}, {high:+.3f}]{bold}"
            cells.append(f"{chose:.3f}, {reported:.3f}{apart}")
        lines.append(f"| {row['trial']} | {' | '.join(cells)} |")
    return [*lines, ""]


def cheap(benches: Sequence[Bench]) -> list[str]:
    """How cheap an answer can be that still holds."""
    found = {}
    for bench in benches:
        path = bench.folder / "cheap.json"
        if path.is_file():
            found[bench.name] = json.loads(path.read_text())
    if not found:
        return []
    lines = [
        "## The cheap end",
        "",
        "By `python benchmarks/cheap.py`: few views, nothing unlearned. Calls a query with the samples' gradients "
        "spread over 20 queries, as base losses are in the paper's recipe; LDS on the reporting half, and the interval "
        "of its difference from nine tenths of the LDS of `Consensus` ("
        + ", ".join(f"{name} {of['default']:.3f}" for name, of in found.items())
        + ").",
        "",
        f"| asked | weights | views | {' | '.join(f'calls, {name} | LDS, {name}' for name in found)} |",
        "|---|---|---|" + "---|---|" * len(found),
    ]
    columns = [of["rows"] for of in found.values()]
    for rows in zip(*columns, strict=True):
        first = rows[0]
        cells = []
        for row in rows:
            low, high = row["less_share_of_default"]
            cells += [f"{row['calls']:,.0f}", f"{row['reported_on'][0]:.3f} [{low:+.3f}, {high:+.3f}]"]
        lines.append(f"| {first['asked']} | {first['weights']} | {first['views']} | {' | '.join(cells)} |")
    return [*lines, ""]


def tried(benches: Sequence[Bench]) -> list[str]:
    """All of it."""
    return [*within_captions(), *how_sure(), *consensus_tried(), *cheap(benches), *ridges(benches)]
