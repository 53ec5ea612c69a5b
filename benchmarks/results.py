"""The results page: every method on every bench, chosen alike, with intervals, noise floors and costs.

    python benchmarks/results.py            # writes benchmarks/RESULTS.md and its plots; trains nothing

What is not trained yet is said, not guessed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benches import BENCHES, Bench
from customised_page import customised
from judged import Page, Row, judge
from lora_page import adapters
from method_settings import LABELS, plain
from plots import plot
from selections import selections
from settings_page import against_recipe, defaults, swept
from shown import difference, shown
from transfer import all_benches, transfer
from tried_page import tried

from lightning_unlearn.evaluation.results import Removal

PAGE = BENCHES / "RESULTS.md"


def at_an_end(row: Row) -> bool:
    """Whether the least or the greatest number of those tried was chosen: a better one may lie beyond."""
    kinds = list(dict.fromkeys(setting.split(",")[0] for setting in row.settings))
    tuned = len(kinds) > 1 and row.setting.startswith(("ridge", "damping", "rise"))
    return tuned and row.setting.split(",")[0] in (kinds[0], kinds[-1])


def _bytes(count: float) -> str:
    return "0" if not count else f"{count / 2**20:.1f} MiB"


def text(page: Page) -> str:
    """A bench's part of the page as Markdown."""
    facts, name = page.facts, page.bench.name
    lines = [f"## {page.bench.settings['title']}", "", page.bench.settings["about"].strip(), ""]
    lines += [
        f"{facts['subset_models']} of {facts['asked_subset_models']} subset models are trained; scores are reported on "
        f"{facts['report_queries']} queries and {facts['report_models']} of them, settings were chosen on the others "
        "(eight a method and selection of weights, or what there is to choose). "
        f"Of all {facts['all']} models that the bench asks for, {facts['missing']} are not "
        "trained yet.",
        "",
        "### Linear datamodelling score",
        "",
        f"![Linear datamodelling scores]({name}/lds.png)",
        "",
        "“Inside” is not above 0, what scores without any meaning reach.",
        "",
        "| method | setting | LDS | by ranks only | ours less it |",
        "|---|---|---|---|---|",
    ]
    for row in page.rows:
        scores = " | ".join(shown(value) + ("" if value.low > 0 else ", inside") for value in (row.raw, row.by_rank))
        behind = "–" if row.behind is None else difference(row.behind)
        setting = row.setting + " (an end of its grid)" * at_an_end(row)
        lines.append(f"| {LABELS[row.method]} | {setting} | {scores} | {behind} |")
    if page.ceiling is not None:
        lines += [
            "",
            f"Noise ceiling, what a perfect method would reach against models of one seed, from {facts['pairs']} "
            f"subsets trained twice: {shown(page.ceiling)}.",
        ]
    lines += [
        "",
        "Where papers report an order, the difference on this bench:",
        "",
        "| pair | difference of LDS |",
        "|---|---|",
    ]
    for first, second, value in page.reported:
        lines.append(f"| {plain(first)} less {plain(second)} | {difference(value)} |")
    lines += ["", "### Leave-K-out", "", f"![Change of the query's loss]({name}/removal.png)", ""]
    sizes = list(page.rows[0].removals)
    head = " | ".join(f"K = {size} ({size / facts['samples']:.0%})" for size in sizes)
    lines += [
        "Change of the query's loss (× 10⁻³) by removing the K samples that a method names and training again; "
        "“inside” is not beyond the floors of random removals and of another seed; “–” was not asked for.",
        "",
        f"| method | {head} |",
        "|---|" + "---|" * len(sizes),
    ]
    for row in page.rows:
        cells = []
        for size in sizes:
            removal = row.removals[size]
            if isinstance(removal, str):
                cells.append(removal)
                continue
            inside = "" if removal.beyond_floor["loss"] else " inside"
            note = f" ({removal.undecided})" if removal.undecided else inside
            cells.append(shown(removal.changes["loss"], 1e3, 2) + note)
        lines.append(f"| {LABELS[row.method]} | {' | '.join(cells)} |")
    floor = [shown(page.random[size]["loss"], 1e3, 2) if size in page.random else "not trained yet" for size in sizes]
    lines.append(f"| floor: random removal, mean of {facts['random_repeats']} repeats | {' | '.join(floor)} |")
    if page.seeds:
        seed = shown(page.seeds["loss"], 1e3, 2)
        lines.append(f"| floor: another seed, mean of {facts['seed_models']} | {' | '.join([seed] * len(sizes))} |")
    lines += _ours_less(page, sizes)
    lines += _pictures(page, sizes)
    lines += [
        "",
        "### Cost",
        "",
        "Processor time on one thread, to some tenths of a second; once: the Fisher by passes over the data, base "
        "losses, gradients. Memory is the peak of the process, libraries included: what `random` takes is theirs.",
        "",
        "| method | seconds a query | seconds once | kept once | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in page.rows:
        costs = row.costs
        if costs is None:
            lines.append(f"| {LABELS[row.method]} | – | – | – | – |")
            continue
        lines.append(
            f"| {LABELS[row.method]} | {costs['seconds_a_query']:.2f} | {costs['seconds_once']:.1f} | "
            f"{_bytes(costs['bytes_once'])} | {_bytes(costs['peak_bytes'])} |"
        )
    lines += customised(page.bench)
    lines += adapters(page.bench)
    lines += swept(page.bench)
    lines += against_recipe(page.bench, page.ceiling)
    return "\n".join(lines) + "\n"


def _ours_less(page: Page, sizes: Sequence[int]) -> list[str]:
    """How much more the removal of what our default names changes than that of what others name."""
    if not any(row.removals_behind for row in page.rows):
        return []
    head = " | ".join(f"K = {size}" for size in sizes)
    lines = [
        "",
        "What removing the default's samples changes more (× 10⁻³) than removing each method's, on the same queries:",
        "",
        f"| method | {head} |",
        "|---|" + "---|" * len(sizes),
    ]
    for row in page.rows:
        if row.removals_behind:
            found = [row.removals_behind.get(size) for size in sizes]
            cells = ["–" if value is None else difference(value, 1e3, 1) for value in found]
            lines.append(f"| {LABELS[row.method]} | {' | '.join(cells)} |")
    return lines


def _pictures(page: Page, sizes: Sequence[int]) -> list[str]:
    """How far pictures moved, for removals that are trained."""
    done = [row for row in page.rows if any(isinstance(row.removals[size], Removal) for size in sizes)]
    if not done:
        return []
    # Latents whose channels are the pixels of blocks are pictures only after decoding.
    measures = ("mse", "ssim") if "decoder" in page.bench.settings else ("mse",)
    head = " | ".join(f"{measure.upper()}, K = {size}" for size in sizes for measure in measures)
    lines = [
        "",
        "How far the picture from the same seed and prompt moved: mean squared error (in [-1, 1], up is further)"
        f"{' and structural similarity (down is further)' * (len(measures) - 1)}, as changes against models on all "
        "samples.",
        "",
        f"| method | {head} |",
        "|---|" + "---|" * len(measures) * len(sizes),
    ]
    for row in done:
        cells = []
        for removal in (row.removals[size] for size in sizes):
            if isinstance(removal, Removal):
                marks = ["" if removal.beyond_floor[name] else " inside" for name in measures]
                cells += [shown(removal.changes[name]) + mark for name, mark in zip(measures, marks, strict=True)]
            else:
                cells += ["–"] * len(measures)
        lines.append(f"| {LABELS[row.method]} | {' | '.join(cells)} |")
    cells = [shown(page.random[size][name]) if size in page.random else "–" for size in sizes for name in measures]
    lines.append(f"| floor: random removal | {' | '.join(cells)} |")
    if page.seeds:
        cells = [shown(page.seeds[name]) for _ in sizes for name in measures]
        lines.append(f"| floor: another seed | {' | '.join(cells)} |")
    return lines


START = """\
# Results

"""
READING = """\
## How to read it

Made by `python benchmarks/results.py` from the numbers of finished models and the scores in this folder; see
[README.md](README.md) for how to make those again. Intervals are 95 % bootstrap intervals: over queries and models for
the linear datamodelling score (LDS), over queries (and random repeats) for leave-K-out. The floors' intervals are those
of their means, too: a single random removal or seed lies outside more often. Differences whose interval holds 0 are
within noise.

Changes are measured against models on all pictures with other seeds (the model that made the queries, with seed 0,
knows its own pictures too well). The error of that reference is in no interval, but cancels where a method is compared
with random removals. Removals have seed 0.

Rivals see a query on the same views as the training pictures, unlearning on 128 draws of its own.

LDS foretells losses by sums of scores, so that a transform that is not linear changes it, for any method: beside the
scores as they are stands the LDS after all methods were put through one transform (normal scores by rank), where only
the order counts.
Where LDS and leave-K-out disagree, leave-K-out decides: only the order enters it.

"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="(default: %(default)s)")
    arguments = parser.parse_args()
    parts = []
    for path in sorted(BENCHES.glob("*/bench.yaml")):
        bench = Bench(path.parent.name)
        if (bench.folder / "scores").is_dir() and (bench.folder / "study").is_dir():
            started = time.process_time()
            page = judge(bench)
            seconds = time.process_time() - started
            plot(page)
            parts.append(text(page))
            print(f"{bench.name}: {len(page.rows)} methods judged in {seconds:.0f} s of processor time")
    benches = all_benches()
    first = "\n".join(transfer(benches))
    then = "\n".join([*selections(benches), *tried(benches), *defaults(benches)])
    content = START + (first and first + "\n") + READING + (then and then + "\n") + "\n".join(parts)
    arguments.output.write_text(content)
    print(f"Results: {arguments.output}")


if __name__ == "__main__":
    main()
