"""What the settings of unlearning are worth, and the paper's own: two parts of the results page."""

from __future__ import annotations

import json
from typing import Any

from benches import Bench
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
    toward = settings.get("toward_data")
    size = f"rise {settings['rise']:g}" if toward is None else f"{toward:.0%} of the way to the data's loss"
    return (
        ", ".join(str(settings[name]) for name in names)
        + f", damping {settings['damping']:g}, {size}, {settings['draws']} draws"
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
        "the defaults": ("share of the way to the data's loss", "toward data 0.5"),
        "the defaults with all weights": ("all weights", "all, toward data 0.5"),
        "with a step that doubles the loss": ("centre", ""),
        "diagonal Fisher": ("Fisher", "diagonal"),
        "no Fisher": ("Fisher", "identity"),
        "damping 0.1": ("damping", "damping 0.1"),
        "true Fisher": ("Fisher", "ekfac_true"),
        "four steps": ("steps", "steps 4"),
        "the penalised objective": ("strategy", "penalised"),
        "mirrored fine-tuning": ("strategy", "draws 16, mirrored"),
        "noise of each sample's own": ("noise", "per_sample"),
        "difference, with a doubled loss": ("score rule", "difference"),
        "5 views in place of 20": ("views", "5"),
        "all weights": ("all weights", "all"),
    }
    lines = [
        "## The defaults of unlearning, and why",
        "",
        "An EKFAC Fisher of `text_kv`, damping 0.001, one step that brings the query's loss halfway to the mean loss "
        "of the training pictures, noise that all samples share, the ratio. The rows after the third change one "
        "setting of the third (mirrored fine-tuning has no Fisher, and 16 fresh draws a step). LDS on the half that "
        "chooses and on the half that reports:",
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
- **What matters** is the Fisher, its damping and the size of the step; the digits tell: EKFAC is far ahead of a
  diagonal Fisher, which is ahead of none; a tenth of the damping is as bad as a hundred times it; and a step of a tenth
  foretells worse than one that doubles the query's loss (0.58 against 0.69 on the choosing half), as on the emoji (0.44
  against 0.74). Views above a few and noise of each sample's own move it by a hundredth; targets drawn from the model
  (the true Fisher) are level where the evidence reports.
- **One step**: four steps to the same rise foretell worse on the digits (0.67 against 0.71), the sixty steps of the
  penalised objective lie between (0.69), and on the emoji all are level. Mirrored fine-tuning with real pictures in the
  place of a Fisher is far behind on the digits (0.52, with the weights of its paper 0.59; for 43 of 60 queries sixty
  steps were too few) and level on the emoji, but with its paper's weights behind there, too. The penalised objective
  takes five to eight times the calls to unlearn a query, mirrored five to thirty times.
- **Size of the step**: the same relative rise for all unlearns a picture that the model knows well too little and
  another too much. Halfway to the mean loss of the training pictures, but at least a rise of a half, is a little ahead
  of a doubled loss on the digits (+0.021, just within noise) and level on the emoji, and finds the exemplars of
  customised models, whose loss of their own pictures is a tenth of the others': there a doubled loss has an mAP of
  0.45, halfway 0.89 (below; it has seen these models). A quarter of the way is level with half of it by LDS (0.74 and
  0.73 on the digits) and found fewer exemplars of seven customised models (by hand); the whole way is too far (0.66).
  On the sample model, whose loss of ε hardly tells a picture that it knows, all steps are the least one: all of 50
  generated pictures find their own caption's picture first. Half the mean loss on top of the query's, without the way
  that it has already, was worse on the digits (0.68 on the choosing half, by hand; a quarter of it 0.71, level).
- **Rule**: on the digits the difference foretells better than the ratio (0.77 against 0.73 with the default step),
  though by ranks alone the two are nearly level, and without the first 1 % of the pictures that it names a query loses
  more (19.5 against 15.9 × 10⁻³); at 3 and 10 % and on the emoji they are level. For customised models the difference
  finds far less: an mAP of 0.35, the ratio 0.89 (with a doubled loss 0.18 and 0.45, for the rise of the root of the
  loss 0.2): what a model has just learned has so small a loss that its rises are small, too. So the ratio is the
  default, which loses less where it is behind, and `--rule difference` the better choice for a model that was trained
  on all of its pictures alike (on the digits; on the emoji the two are level).
- **Weights**: of the selections without convolutions the keys and values of the text foretell best (`attention`, with
  the pictures' own, is worse on the digits and level on the emoji). All weights (`parameters: all`, for the Fisher and
  the unlearning alike) are level with them by LDS on the digits, a little ahead on the emoji, and ahead where a tenth
  of the digits is removed (124 against 90 × 10⁻³). They are not the default, but one switch, for what they cost: EKFAC
  of convolutions unfolds every patch. On the sample model a pass over the data took several times as long and the sums
  fill 112 MB in place of 17; a query's delta is as large as the model; and in a Stable Diffusion the largest layers'
  factors fit nowhere. Take them for networks of some ten million weights.
- **Where a rival is ahead** of the default beyond noise, all on the digits: by the loss without the first 1 %, D-TRAK
  (by 3.4 × 10⁻³) and the influence function with an EKFAC Fisher (3.9), and by the loss without the first 10 %, pixel
  similarity (56). What was tried on the first: it is the rule. With the difference ours is level with both (19.5 × 10⁻³
  with `text_kv`, 20.3 with all weights; the rivals 19.3 and 19.8) and ahead of both at 3 %; a step of 30 % with the
  ratio has 18.9, a doubled loss 17.1. On the second: 69 % of pixel similarity's first twenty are of the query's digit,
  53 % of ours (60 % with all weights) and 56 % of D-TRAK's, though of the first six 89 to 99 % for all of these: behind
  the pictures of the query's own caption, methods that follow the text go on to other digits in the same style, and
  twenty look-alikes leave no other way to draw the picture. All weights bring 124 × 10⁻³ of pixel similarity's 146;
  other rules, weights of timesteps and scores less their mean over queries do not close the rest, and no other rival
  comes nearer (D-TRAK 100).
- **D-TRAK** is the rival to pass: but for the first 1 % of the digits it is level with the default by leave-K-out, and
  within noise of it by LDS; with the difference ours is ahead on the digits by LDS (+0.087 [0.034, 0.141]) and without
  the first 3 % (+10.0 [0.4, 20.6] × 10⁻³). The mean of its standardised scores and ours (a row of the tables below) is
  level with the default (+0.011 [−0.021, 0.041] on the digits); it needs both methods.
- **The emoji tell methods apart badly**: by the loss without the first 3 %, all methods that find the picture of the
  query's own caption are within noise of the default, with or without a Fisher, but for the diagonal Fisher of all
  weights, which is ahead (by 17.6 [1.0, 35.5] × 10⁻³); by LDS, those that look into the model are, too, but for all
  weights (+0.024 [0.002, 0.048]). What is said above rests on the digits.
- **What was tried and is worse**: pushing a query's prediction to zero or to the mean picture, in place of raising its
  loss (LDS of 0.46 and 0.49 on the digits' reporting half, ten views); the root of the loss (0.69 with the ratio, 0.73
  with the difference) changes nothing; means of the scores of several sizes of the step (no better than the best of
  them).
- **Timesteps**: on the digits the first quarter of the schedule, where little noise is added, says least; any other
  quarter with five views is as good as all twenty.
- **Cost**: six draws to unlearn with and one view a sample are not worse than the paper's recipe, at a twentieth of its
  calls. For the few best samples of one query, a race (`--race.top`) finds them at 29 % (3 best) to 57 % (10 best) of
  the calls on the digits, and at 56 to 105 % on the hundred emoji.
"""
