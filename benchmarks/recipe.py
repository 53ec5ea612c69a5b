"""Unlearning as it is by default here, against the paper's own recipe: how much better it is, and how much cheaper.

    python benchmarks/recipe.py digits    # writes digits/recipe.json and digits/recipe.png; what is finished is kept
    python benchmarks/results.py          # puts them on the page

The recipe (Wang et al., arXiv 2406.09408, Appendix B): a diagonal Fisher, keys and values of the attention to the
text, 20 timesteps, noise of each sample's own, the difference of losses. Its damping and step are tuned on the half of
the evidence that chooses. Captions and flips: the benches' pictures have one caption and were never mirrored in
training, so that there is one view of each timestep to score, in the recipe as in ours.

A call is one forward pass of one view under one set of weights; its backward pass counts two more. Base losses,
unlearning (with the search for its step) and scoring count, base losses spread over 20 queries. The Fisher
is a by-product of training in both.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from benches import Bench, bench_parser
from common import quiet
from judged import Half, evidence
from matplotlib.figure import Figure
from sweep import Measured, measured, must_be_measured, rounded, scores_of
from sweep_settings import CENTRE, DEFAULTS, DEFAULTS_WHOLE, HALFWAY, PLAINLY, TIMESTEPS, Reduced, Unlearned
from torch import Tensor

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.unlearning.problem import DATA_DRAWS

DAMPINGS, RISES = (0.001, 0.1, 1.0), (0.3, 1.0, 3.0)
RECIPE = Unlearned(fisher="diagonal", parameters="text_kv", noise="per_sample")
STRIDES = (1, 2, 4, 5, 10, 20)
# Draws of a query to unlearn it with, and to search for the size of its step.
DRAWS = {128: 64, 6: 2}
DIFFERENCE = Reduced("difference")
# The bar of the issue, and over how many queries base losses are spread.
TIMES, SHARE, SPREAD = 1.5, 1 / 20, 20
# How many samples a person looks at.
TOP = 10


@dataclass(frozen=True, eq=False)
class Point:
    """A setting with what it costs.

    Attributes:
        name: Of the recipe's or ours.
        unlearned: How it unlearns.
        reduced: Which views it takes.
        calls: Network calls a query.
        scores: ``(N, Q)``.
    """

    name: str
    unlearned: Unlearned
    reduced: Reduced
    calls: float
    scores: Tensor


def point(name: str, unlearned: Unlearned, reduced: Reduced, found: Measured, keys: list[str]) -> Point:
    """A setting on a bench."""
    calls = found.calls + len(keys) * reduced.count * (1 + 1 / SPREAD)
    if unlearned.toward_data is not None:  # the data's loss is base losses too, in the calls of as many as there are
        calls += DATA_DRAWS * (1 / SPREAD - 1 / (len(found.losses) - 1))
    return Point(name, unlearned, reduced, calls, scores_of(found, keys, reduced))


def best_recipe(bench: Bench, choosing: Half, keys: list[str]) -> Unlearned:
    """The recipe's damping and step, by the half that chooses."""
    values = {}

    def value(unlearned: Unlearned) -> None:
        found = measured(bench, unlearned)
        if isinstance(found, Measured):
            values[unlearned] = choosing.mean(scores_of(found, keys, Reduced(rule="difference")))
        print(f"{unlearned}: {values.get(unlearned, found)}", flush=True)

    for damping, rise in product(DAMPINGS, RISES):
        value(replace(RECIPE, damping=damping, rise=rise))
    # With the best damping the default size of ours, too.
    value(replace(max(values, key=values.__getitem__), rise=CENTRE.rise, toward_data=HALFWAY))
    return max(values, key=values.__getitem__)


def points(bench: Bench, recipe: Unlearned, keys: list[str]) -> Iterator[Point]:
    """The recipe's curve and ours."""
    # So few draws can't tell a query's loss from that of the data: a rise relative to itself, then.
    few = {"draws": min(DRAWS), "rise_draws": DRAWS[min(DRAWS)], "toward_data": None}
    settings = [("recipe", recipe), ("thrifty recipe", replace(recipe, **few))]
    settings += [("ours", DEFAULTS), ("ours", replace(DEFAULTS, **few))]
    for name, unlearned in settings:
        found = must_be_measured(bench, unlearned)
        rule = PLAINLY.rule if name == "ours" else "difference"
        yield from (point(name, unlearned, Reduced(rule, stride=stride), found, keys) for stride in STRIDES)


def racing(found: Measured, keys: list[str]) -> list[dict[str, Any]]:
    """How many of the ten best by all views a cheaper way finds, and for how many calls a query.

    Few views of all samples; or a race: few views of all samples, and all other views of the share that leads then.
    """
    full = scores_of(found, keys, PLAINLY)  # (N, Q)
    best = full.topk(TOP, 0).indices
    rows = []
    for stride, share in product((2, 4, 10, 20), (0.0, 0.1, 0.25)):
        few = Reduced(PLAINLY.rule, stride=stride)
        first = scores_of(found, keys, few)
        leading = first.argsort(0, descending=True).argsort(0) < share * len(keys)
        # Those that lead are ranked among each other by all views, and before all others.
        ranked = torch.where(leading, full + 10 * full.abs().max(), first) if share else first
        hits = torch.stack([torch.isin(best[:, q], ranked[:, q].topk(TOP).indices).sum() for q in range(full.shape[1])])
        calls = len(keys) * (few.count + share * (TIMESTEPS - few.count))
        rows.append(
            {
                "views": few.count,
                "share": share,
                "calls": round(calls),
                "found": round(float(hits.double().mean() / TOP), 4),
            }
        )
    return rows


def compare(bench: Bench) -> dict[str, Any]:
    """Everything that is said of the recipe and of ours."""
    choosing, reporting = evidence(bench)
    keys = bench.plan().keys
    curve = list(points(bench, best_recipe(bench, choosing, keys), keys))
    # The first of each name has all views.
    recipe, ours = (next(found for found in curve if found.name == name) for name in ("recipe", "ours"))
    # The cheapest that is no worse beyond noise on the half that chooses; the other half tells whether it is.
    mine = [found for found in curve if found.name == "ours"]
    fine = [found for found in mine if choosing.compared(found.scores, recipe.scores).high >= 0]
    cheapest = min(fine, key=lambda found: found.calls)

    @functools.cache
    def described(found: Point) -> dict[str, Any]:
        return {
            "name": found.name,
            "unlearned": asdict(found.unlearned),
            "views": found.reduced.count,
            "calls": round(found.calls, 1),
            "chosen_on": rounded(choosing.value(found.scores)),
            "reported_on": rounded(reporting.value(found.scores)),
        }

    as_good = reporting.compared(cheapest.scores, recipe.scores)
    others = {
        "ours": ours,
        "ours_difference": point("difference", DEFAULTS, DIFFERENCE, must_be_measured(bench, DEFAULTS), keys),
        "whole": point("whole", DEFAULTS_WHOLE, PLAINLY, must_be_measured(bench, DEFAULTS_WHOLE), keys),
        "whole_difference": point(
            "whole, difference", DEFAULTS_WHOLE, DIFFERENCE, must_be_measured(bench, DEFAULTS_WHOLE), keys
        ),
    }
    better = {name: reporting.compared(found.scores, recipe.scores, TIMES) for name, found in others.items()}
    return {
        "times": TIMES,
        "recipe": described(recipe),
        "cheapest": described(cheapest),
        **{name: described(found) for name, found in others.items()},
        "less_times_recipe": {
            name: [round(end, 4) for end in (found.low, found.high)] for name, found in better.items()
        },
        "cheapest_less_recipe": [round(as_good.low, 4), round(as_good.high, 4)],
        "curve": [described(found) for found in curve],
        "all_views_calls": len(keys) * TIMESTEPS,
        "racing": racing(must_be_measured(bench, DEFAULTS), keys),
    }


def plot(bench: Bench, found: dict[str, Any]) -> None:
    """Linear datamodelling score against calls."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "the paper's recipe": [row for row in found["curve"] if row["name"] == "recipe"],
        f"the same, {min(DRAWS)} draws": [row for row in found["curve"] if row["name"] == "thrifty recipe"],
    }
    for draws in DRAWS:
        rows = [row for row in found["curve"] if row["name"] == "ours" and row["unlearned"]["draws"] == draws]
        kinds[f"ours, {draws} draws"] = rows
    for (label, rows), colour in zip(kinds.items(), ("#475569", "#94a3b8", "#c2410c", "#ea8a4d"), strict=True):
        calls, values = [row["calls"] for row in rows], [row["reported_on"] for row in rows]
        means = [value[0] for value in values]
        reach = [[value[0] - value[1] for value in values], [value[2] - value[0] for value in values]]
        axes.errorbar(calls, means, reach, fmt="o-", markersize=4, elinewidth=0.7, color=colour, label=label)
    axes.axvline(found["recipe"]["calls"] * SHARE, color="#0f766e", linewidth=1, linestyle=":")
    axes.annotate("a twentieth", (found["recipe"]["calls"] * SHARE, axes.get_ylim()[0]), color="#0f766e", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(f"network calls a query ({', '.join(map(str, (TIMESTEPS // s for s in STRIDES)))} views a sample)")
    axes.set_ylabel("LDS on the reporting half, 95 %")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(bench.folder / "recipe.png", dpi=130)


def main() -> None:
    """Write a bench's comparison."""
    bench = Bench(bench_parser(__doc__).parse_args().bench)
    quiet()
    torch.set_num_threads(1)
    found = compare(bench)
    write_atomically(bench.folder / "recipe.json", json.dumps(found, indent=1).encode() + b"\n")
    plot(bench, found)
    print(json.dumps({name: value for name, value in found.items() if name != "curve"}, indent=1))


if __name__ == "__main__":
    main()
