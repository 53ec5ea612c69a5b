"""The results page: every method on every bench, chosen alike, with intervals, noise floors and costs.

    python benchmarks/results.py            # writes benchmarks/RESULTS.md and its plots; trains nothing

A method's setting is chosen on one half of the queries and of the subset models, and reported on the other half. What
is not trained yet is said, not guessed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import BENCHES, Bench
from methods import METHODS, read, read_costs

from lightning_unlearn.evaluation.judging import (
    Floors,
    Removal,
    Value,
    ceiling,
    datamodelling,
    kept_samples,
    scores_of,
)
from lightning_unlearn.evaluation.plan import Plan
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.evaluation.study import Study, read_settings
from lightning_unlearn.metrics import (
    bootstrap_interval,
    linear_datamodelling_comparison,
    linear_datamodelling_score,
    subset_predictions,
)
from lightning_unlearn.scores import ScoreTable

OURS = "unlearning"
PAGE = BENCHES / "RESULTS.md"
LABELS = {
    "unlearning": "**unlearning, diagonal Fisher (ours)**",
    "gradient_ascent": "gradient ascent (no Fisher)",
    "pixel_similarity": "pixel similarity",
    "text_similarity": "text similarity",
    "gradient_similarity": "gradient similarity (TracIn, ReTrac)",
    "influence": "influence function (diagonal Fisher)",
    "trak": "TRAK",
    "journey_trak": "Journey-TRAK",
    "d_trak": "D-TRAK",
    "das": "DAS",
    "random": "random",
}


@dataclass(frozen=True)
class Row:
    """A method on a bench."""

    method: str
    setting: str
    raw: Value
    by_rank: Value
    behind: tuple[float, float, float] | None
    costs: Mapping[str, float]
    removals: Mapping[int, Removal | str]


@dataclass(frozen=True)
class Page:
    """A bench's part of the page."""

    bench: Bench
    rows: list[Row]
    ceiling: Value | None
    random: Mapping[int, Mapping[str, Value]]
    seeds: Mapping[str, Value]
    facts: Mapping[str, Any]


def halves(plan: Plan, queries: Sequence[str]) -> tuple[list[str], list[Run], list[str], list[Run]]:
    """Queries and subset models that report, and those that choose settings."""
    middle_query, middle = len(queries) // 2, len(plan.subsets) // 2
    return (
        list(queries[:middle_query]),
        list(plan.subsets[middle:]),
        list(queries[middle_query:]),
        list(plan.subsets[:middle]),
    )


def choose(study: Study, plan: Plan, tables: Mapping[str, ScoreTable], queries: Sequence[str]) -> str:
    """A method's setting: the highest linear datamodelling score on the half that chooses."""
    _, _, chosen_queries, runs = halves(plan, queries)
    runs = [run for run in runs if study.is_finished(run)]
    outcomes = torch.from_numpy(study.losses(runs, chosen_queries))
    kept = kept_samples(plan.keys, runs)
    values = {
        setting: float(linear_datamodelling_score(scores_of(table, plan.keys, chosen_queries), kept, outcomes).mean())
        for setting, table in tables.items()
    }
    return max(values, key=values.__getitem__)


def open_study(bench: Bench) -> Study:
    """The bench's study as it is, whatever recipe this machine would make."""
    settings = read_settings(bench.folder / "study")
    assert settings is not None, "run bench.py retrain first"
    return Study(bench.folder / "study", settings)


def judge(bench: Bench) -> Page:
    """Everything that can be said of a bench now."""
    study, plain = open_study(bench), bench.plan()
    queries = [query.key for query in bench.samples("queries")]
    report_queries, report_runs, _, _ = halves(plain, queries)
    report_runs = [run for run in report_runs if study.is_finished(run)]
    there = [method for method in METHODS if (bench.folder / "scores" / f"{method}.parquet").is_file()]
    chosen = {method: choose(study, plain, read(bench, method), queries) for method in there}
    tables = {method: read(bench, method)[setting] for method, setting in chosen.items()}
    plan = bench.plan(tables)
    outcomes = torch.from_numpy(study.losses(report_runs, report_queries))
    kept = kept_samples(plan.keys, report_runs)

    def predicted(method: str) -> torch.Tensor:
        return subset_predictions(scores_of(tables[method], plan.keys, report_queries), kept)

    floors = Floors(study, plan)
    rows = []
    for method in there:
        raw, by_rank = datamodelling(study, plan, tables[method], report_queries, report_runs)
        behind = None
        if method != OURS and OURS in tables:
            compared = linear_datamodelling_comparison(predicted(OURS), predicted(method), outcomes)
            difference = float(
                (linear_datamodelling_score(scores_of(tables[OURS], plan.keys, report_queries), kept, outcomes)).mean()
            )
            behind = (difference - raw.mean, compared.low, compared.high)
        removals: dict[int, Removal | str] = {}
        for size, removed in plan.removals[method].items():
            missing = len(study.missing([*removed, *plan.random[size], *plan.seeds]))
            removals[size] = f"{missing} models missing" if missing else floors.removal(size, removed)
        rows.append(Row(method, chosen[method], raw, by_rank, behind, read_costs(bench, method), removals))
    rows.sort(key=lambda row: -row.raw.mean)
    second = [run for run in plan.second if study.is_finished(run)]
    paired = Plan(plan.keys, [], plan.subsets, second, [], {}, {})
    seeds_done = not study.missing(plan.seeds)
    measured = floors.measured() if seeds_done else []
    return Page(
        bench=bench,
        rows=rows,
        ceiling=ceiling(study, paired, report_queries) if len(second) > 2 else None,
        random={
            size: {measure: _value(floors.random_changes(size, measure)) for measure in measured}
            for size, runs in plan.random.items()
            if not study.missing([*runs, *plan.seeds])
        },
        seeds={measure: _value(floors.seed_changes(measure)) for measure in measured},
        facts={
            "samples": len(plan.keys),
            "report_models": len(report_runs),
            "report_queries": len(report_queries),
            "subset_models": len(plan.subsets) - len(study.missing(plan.subsets)),
            "asked_subset_models": len(plan.subsets),
            "pairs": len(second),
            "removal_queries": len(plan.removal_queries),
            "random_repeats": bench.design.random_repeats,
            "seed_models": len(plan.seeds) - len(study.missing(plan.seeds)),
            "missing": len(study.missing(plan.runs())),
            "all": len(plan.runs()),
            "seconds": study.typical_seconds(),
        },
    )


def _value(values: torch.Tensor) -> Value:
    return Value(float(values.mean()), *bootstrap_interval(values))


def _shown(value: Value, factor: float = 1.0, digits: int = 3) -> str:
    return f"{value.mean * factor:.{digits}f} [{value.low * factor:.{digits}f}, {value.high * factor:.{digits}f}]"


def _bytes(count: float) -> str:
    return "0" if not count else f"{count / 2**20:.1f} MiB"


def text(page: Page) -> str:
    """A bench's part of the page as Markdown."""
    facts, name = page.facts, page.bench.name
    lines = [f"## {page.bench.settings['title']}", "", page.bench.settings["about"].strip(), ""]
    lines += [
        f"{facts['subset_models']} of {facts['asked_subset_models']} subset models are trained; scores are reported on "
        f"{facts['report_queries']} queries and {facts['report_models']} of them, settings were chosen on the others "
        f"(four a method, three where there is no more to choose). One model takes {facts['seconds']:.0f} s on one "
        f"thread of a busy machine. Of all {facts['all']} models that the bench asks for, {facts['missing']} are not "
        "trained yet.",
        "",
        "### Linear datamodelling score",
        "",
        f"![Linear datamodelling scores]({name}/lds.png)",
        "",
        "| method | setting | LDS | by ranks only | ours minus it |",
        "|---|---|---|---|---|",
    ]
    for row in page.rows:
        behind = "–"
        if row.behind is not None:
            mean, low, high = row.behind
            within = " (within noise)" if low <= 0 <= high else ""
            behind = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{within}"
        lines.append(f"| {LABELS[row.method]} | {row.setting} | {_shown(row.raw)} | {_shown(row.by_rank)} | {behind} |")
    if page.ceiling is not None:
        lines += [
            "",
            f"Noise ceiling, what a perfect method would reach against models of one seed, from {facts['pairs']} "
            f"subsets trained twice: {_shown(page.ceiling)}.",
        ]
    lines += ["", "### Leave-K-out", "", f"![Change of the query's loss]({name}/removal.png)", ""]
    sizes = list(page.rows[0].removals)
    head = " | ".join(f"K = {size} ({size / facts['samples']:.0%})" for size in sizes)
    lines += [
        "Change of the query's loss (× 10⁻³) by removing the K samples that a method names and training again; "
        "“inside” is not beyond the floor of random removals.",
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
            cells.append(_shown(removal.changes["loss"], 1e3, 2) + inside)
        lines.append(f"| {LABELS[row.method]} | {' | '.join(cells)} |")
    floor = [_shown(page.random[size]["loss"], 1e3, 2) if size in page.random else "not trained yet" for size in sizes]
    lines.append(f"| floor: random removal, {facts['random_repeats']} repeats | {' | '.join(floor)} |")
    if page.seeds:
        seed = _shown(page.seeds["loss"], 1e3, 2)
        lines.append(f"| floor: another seed, {facts['seed_models']} models | {' | '.join([seed] * len(sizes))} |")
    lines += _pictures(page, sizes)
    lines += [
        "",
        "### Cost",
        "",
        "Processor time on one thread, for all settings of a method together; memory is the peak of its process, "
        "libraries included (about 450 MiB).",
        "",
        "| method | seconds a query | seconds once | kept once | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in page.rows:
        costs = row.costs
        lines.append(
            f"| {LABELS[row.method]} | {costs['seconds_a_query']:.2f} | {costs['seconds_once']:.1f} | "
            f"{_bytes(costs['bytes_once'])} | {_bytes(costs['peak_bytes'])} |"
        )
    return "\n".join(lines) + "\n"


def _pictures(page: Page, sizes: Sequence[int]) -> list[str]:
    """How far pictures moved, for removals that are trained."""
    done = [row for row in page.rows if any(isinstance(row.removals[size], Removal) for size in sizes)]
    if not done:
        return []
    head = " | ".join(f"MSE, K = {size} | SSIM, K = {size}" for size in sizes)
    lines = [
        "",
        "How far the picture from the same seed and prompt moved: mean squared error (in [-1, 1], up is further) and "
        "structural similarity (down is further), as changes against models on all samples.",
        "",
        f"| method | {head} |",
        "|---|" + "---|---|" * len(sizes),
    ]
    for row in done:
        cells = []
        for size in sizes:
            removal = row.removals[size]
            known = isinstance(removal, Removal)
            cells += [_shown(removal.changes[name]) if known else "–" for name in ("mse", "ssim")]  # type: ignore[union-attr]
        lines.append(f"| {LABELS[row.method]} | {' | '.join(cells)} |")
    cells = [
        _shown(page.random[size][name]) if size in page.random else "–" for size in sizes for name in ("mse", "ssim")
    ]
    lines.append(f"| floor: random removal | {' | '.join(cells)} |")
    return lines


def plot(page: Page) -> None:
    """Both plots of a bench."""
    from matplotlib.figure import Figure

    rows = page.rows[::-1]
    names = [LABELS[row.method].replace("**", "") for row in rows]
    colours = ["#c2410c" if row.method == OURS else "#475569" for row in rows]
    figure = Figure(figsize=(7.5, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        for value, offset, style in ((row.raw, 0.12, "o"), (row.by_rank, -0.16, "D")):
            axes.plot([value.low, value.high], [place + offset] * 2, color=colour, linewidth=1.4)
            face = colour if style == "o" else "white"
            axes.plot(value.mean, place + offset, style, color=colour, markersize=5, markerfacecolor=face)
    if page.ceiling is not None:
        axes.axvspan(page.ceiling.low, page.ceiling.high, color="#0f766e", alpha=0.12)
        axes.axvline(page.ceiling.mean, color="#0f766e", linewidth=1, label="noise ceiling")
        axes.legend(loc="lower right", frameon=False)
    axes.axvline(0, color="#94a3b8", linewidth=0.8)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel("linear datamodelling score: as it is (●), by ranks only (◇); 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(page.bench.folder / "lds.png", dpi=130)
    _plot_removals(page)


def _plot_removals(page: Page) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    samples = page.facts["samples"]
    for row in page.rows:
        done = {size: found for size, found in row.removals.items() if isinstance(found, Removal)}
        if not done:
            continue
        means = [found.changes["loss"].mean * 1e3 for found in done.values()]
        shares = [100 * size / samples for size in done]
        width, colour = (2.4, "#c2410c") if row.method == OURS else (1.2, None)
        axes.plot(shares, means, "o-", linewidth=width, color=colour, label=LABELS[row.method].replace("**", ""))
    if page.random:
        shares = [100 * size / samples for size in page.random]
        values = [found["loss"] for found in page.random.values()]
        lows, highs = [value.low * 1e3 for value in values], [value.high * 1e3 for value in values]
        axes.fill_between(shares, lows, highs, color="#94a3b8", alpha=0.35, label="random removal, 95 %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("removed, % of the training images")
    axes.set_ylabel("change of the query's loss, × 10⁻³")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(page.bench.folder / "removal.png", dpi=130)


INTRODUCTION = """\
# Results

Made by `python benchmarks/results.py` from the numbers of finished models and the scores in this folder; see
[README.md](README.md) for how to make those again. Intervals are 95 % bootstrap intervals: over queries and models for
the linear datamodelling score (LDS), over queries (and random repeats) for leave-K-out. With ten queries such intervals
are a little short: they cover some 90 %. Differences whose interval holds 0 are within noise.

LDS is linear in the scores, so that any transform of them changes it, for any method: beside the scores as they are
stands the LDS after all methods were put through one transform (normal scores by rank), where only the order counts.
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
            page = judge(bench)
            plot(page)
            parts.append(text(page))
    arguments.output.write_text(INTRODUCTION + "\n".join(parts))
    print(f"Results: {arguments.output}")


if __name__ == "__main__":
    main()
