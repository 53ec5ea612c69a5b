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


def against_recipe(bench: Bench, ceiling: Value | None) -> list[str]:
    """Ours beside the paper's recipe on a bench: how much better, and how much cheaper."""
    path = bench.folder / "recipe.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    recipe, cheapest = found["recipe"], found["cheapest"]
    others = {
        "ours": "ours",
        "ours_difference": "ours, difference",
        "whole": "ours, all weights",
        "whole_difference": "ours, all weights, difference",
    }
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
    named = {"the paper's recipe, tuned": recipe, **{label: found[name] for name, label in others.items()}}
    named["our cheapest"] = cheapest
    for name, row in named.items():
        halves = f"{row['chosen_on'][0]:.3f} | {shown(Value(*row['reported_on']))}"
        lines.append(f"| {name} | {_unlearned(row['unlearned'])} | {row['views']} | {row['calls']:,.0f} | {halves} |")
    wanted = found["times"] * recipe["reported_on"][0]
    beyond = ""
    if ceiling is not None and wanted > ceiling.mean:
        beyond = f" That is above the noise ceiling, {ceiling.mean:.3f}, so that no method can have it."
    lines += ["", f"{found['times']:g} times the recipe's LDS is {wanted:.3f}.{beyond} What ours is above that:", ""]
    for name, label in others.items():
        reported = found[name]["reported_on"][0]
        times = reported / recipe["reported_on"][0]
        apart = Value(reported - wanted, *found["less_times_recipe"][name])
        lines.append(f"- {label} {difference(apart)}, {times:.2f} times the recipe's LDS;")
    as_good = Value(cheapest["reported_on"][0] - recipe["reported_on"][0], *found["cheapest_less_recipe"])
    lines += [
        f"- our cheapest takes 1/{recipe['calls'] / cheapest['calls']:.1f} of the recipe's calls, and its LDS less the "
        f"recipe's is {difference(as_good)}.",
    ]
    lines += [
        "",
        "Scoring alone, for the ten best samples: how many of those by all views "
        f"({found['all_views_calls']:,} calls a query) are found by few views, and by a race, which gives all views to "
        "the share of the samples that leads after few.",
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


def defaults(benches: list[Bench]) -> list[str]:
    """Why the defaults are what they are."""
    found = {}
    for bench in benches:
        path = bench.folder / "sweep.json"
        if path.is_file():
            rows = json.loads(path.read_text())["rows"]
            found[bench.name] = {(row["factor"], row["value"]): row for row in rows if "failed" not in row}
    if not found:
        return []
    asked = {
        "the defaults": ("centre", ""),
        "diagonal Fisher": ("Fisher", "diagonal"),
        "no Fisher": ("Fisher", "identity"),
        "damping 0.1": ("damping", "damping 0.1"),
        "a rise of a tenth": ("rise of the query's loss", "rise 0.1"),
        "four steps": ("steps", "steps 4"),
        "noise of each sample's own": ("noise", "per_sample"),
        "difference": ("score rule", "difference"),
        "5 views in place of 20": ("views", "5"),
        "all weights": ("all weights", "all"),
    }
    lines = [
        "## The defaults, and why",
        "",
        "An EKFAC Fisher of `text_kv`, damping 0.001, one step that doubles the query's loss, noise that all samples "
        "share, the ratio. LDS on the half that chooses and on the half that reports:",
        "",
        "| | " + " | ".join(f"{name}, choosing | {name}, reporting" for name in found) + " |",
        "|---|" + "---|---|" * len(found),
    ]
    for label, row in asked.items():
        cells = [
            f"{table[row]['chosen_on'][0]:.3f} | {table[row]['reported_on'][0]:.3f}" if row in table else "– | –"
            for table in found.values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return [*lines, "", *WHY.strip().splitlines(), ""]


WHY = """\
- **What matters** is the Fisher and the size of the step, both seen on the digits: a small step, whose scores are
  those of an influence function, foretells worse than one that doubles the query's loss, and one that takes it to the
  fourfold (a rise of 3) worse again. On the emoji's choosing half a small step is far behind, on its reporting half
  it is level. Rule, noise, draws, and views (above a few) move less than the noise of this evidence.
- **Damping** was decided with all weights, where both choosing halves prefer 0.001 or less; with `text_kv` the
  choosing halves leave it open (on average 0.689 for 0.001, 0.697 for 0.1).
- **The emoji tell methods apart badly**: all methods that find the picture of the query's own caption are within
  noise of each other, with or without a Fisher, and their choosing half even puts none and a diagonal one before
  EKFAC (0.732, 0.704, 0.672), which their reporting half turns round (0.705, 0.734, 0.773). The choice of EKFAC rests
  on the digits.
- **All weights** (`parameters: all`, for the Fisher and the unlearning alike) are ahead on the digits, within noise,
  and level on the emoji. They are not the default, but one switch, for what they cost: EKFAC of convolutions unfolds
  every patch. On the sample model a pass over the data took several times as long and the sums fill 112 MB in place
  of 17; a query's delta is as large as the model; and in a Stable Diffusion the largest layers' factors fit nowhere.
  Take them for networks of some ten million weights.
- **Timesteps**: on the digits the first quarter of the schedule, where little noise is added, says least; any other
  quarter with five views is as good as all twenty.
- **D-TRAK** is the rival to pass, and within noise of ours on both benches. The mean of its standardised scores and
  ours (a row of the tables below) has what the better of the two has on the halves that report; as it needs both
  methods, it is no default.
- **Not among the rivals yet**: influence functions with an EKFAC Fisher (the row of a rise of a tenth is near to
  them), and all weights for any but D-TRAK and DAS.
- **Cost**: eight draws to unlearn with and one view a sample are not measurably worse than the paper's recipe, at a
  twentieth of its calls. For the ten best samples alone, a race (all views for a leading quarter) finds nearly all at
  less than half the calls; it is measured here, and not built yet.
"""
