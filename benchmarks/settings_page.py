"""What the settings of unlearning are worth, and the paper's own: two parts of the results page."""

from __future__ import annotations

import json
from typing import Any

from bench import Bench
from shown import difference, shown

from lightning_unlearn.evaluation.results import Value


def swept(bench: Bench) -> list[str]:
    """What each setting of unlearning is worth on a bench."""
    path = bench.folder / "sweep.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    centre = ", ".join(f"{name} {value}" for name, value in found["centre"].items() if name not in ("start", "end"))
    lines = [
        "",
        "### Settings of unlearning",
        "",
        f"By `python benchmarks/sweep.py {bench.name}`: one setting changed at a time, from the centre ({centre}), "
        "over 20 views of a sample. LDS on the queries and models that choose, and on those that report, where the "
        "difference from the centre stands beside it.",
        "",
        "| setting | value | LDS, choosing half | LDS, reporting half | less the centre's |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "failed" in row:
            lines.append(f"| {row['factor']} | {row['value']} | {row['failed']} | – | – |")
            continue
        report = Value(*row["reported_on"])
        centred = report.mean - found["rows"][0]["reported_on"][0]
        apart = row.get("reported_on_less_centre")
        less = "–" if apart is None else difference(Value(centred, *apart))
        cells = f"{row['chosen_on'][0]:.3f} | {shown(report)} | {less}"
        lines.append(f"| {row['factor']} | {row['value'] or '–'} | {cells} |")
    return lines


def against_recipe(bench: Bench) -> list[str]:
    """Ours beside the paper's recipe on a bench: how much better, and how much cheaper."""
    path = bench.folder / "recipe.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    recipe, ours, cheapest = (found[name] for name in ("recipe", "ours", "cheapest"))
    lines = [
        "",
        "### Against the paper's recipe",
        "",
        f"![LDS by network calls]({bench.name}/recipe.png)",
        "",
        f"By `python benchmarks/recipe.py {bench.name}`, which says what counts as a call. The recipe's damping and "
        "step, and our cheapest setting, are chosen on the half that chooses.",
        "",
        "| | unlearning | views a sample | calls a query | LDS, choosing half | LDS, reporting half |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in (("the paper's recipe, tuned", recipe), ("ours", ours), ("our cheapest", cheapest)):
        halves = f"{row['chosen_on'][0]:.3f} | {shown(Value(*row['reported_on']))}"
        lines.append(f"| {name} | {_unlearned(row['unlearned'])} | {row['views']} | {row['calls']:,.0f} | {halves} |")
    times = ours["reported_on"][0] / recipe["reported_on"][0]
    low, high = found["ours_less_times_recipe"]
    wanted = found["times"] * recipe["reported_on"][0]
    ceiling = f"; a noise ceiling stands above, and {found['times']:g} times the recipe would be {wanted:.3f}"
    as_good = Value(cheapest["reported_on"][0] - recipe["reported_on"][0], *found["cheapest_less_recipe"])
    lines += [
        "",
        f"Ours has {times:.2f} times the recipe's LDS; less {found['times']:g} times it, "
        f"{difference(Value(ours['reported_on'][0] - wanted, low, high))}{ceiling}. Our cheapest takes "
        f"1/{recipe['calls'] / cheapest['calls']:.0f} of the recipe's calls; its LDS less the recipe's: "
        f"{difference(as_good)}.",
    ]
    lines += [
        "",
        f"Scoring alone, for the ten best samples: how many of those by all views ({found['all_views_calls']:,} calls a "
        "query) are found by few views, and by a race, which gives all views to the share of the samples that leads "
        "after few.",
        "",
        "| views of all samples | share that goes on to all views | calls a query | of the ten best |",
        "|---|---|---|---|",
    ]
    for row in found["racing"]:
        lines.append(f"| {row['views']} | {row['share']:.0%} | {row['calls']:,} | {row['found']:.0%} |")
    return lines


def _unlearned(settings: dict[str, Any]) -> str:
    names = ("fisher", "parameters", "noise")
    return (
        ", ".join(str(settings[name]) for name in names)
        + f", damping {settings['damping']:g}, rise {settings['rise']:g}, {settings['draws']} draws"
    )
