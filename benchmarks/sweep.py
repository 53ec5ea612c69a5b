"""What each setting of unlearning is worth: one changed at a time, judged by the linear datamodelling score.

    python benchmarks/sweep.py digits     # writes digits/sweep.json; what is finished is kept
    python benchmarks/results.py          # puts its table on the page

Each row unlearns and scores anew, under 20 views whose losses are kept, so that rules, views and parts of the schedule
are compared on the same losses. Both halves of the evidence stand side by side (see judged.py): settings are chosen
on one, and reported on the other.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from bench import BENCHES, Bench
from common import quiet
from judged import halves, open_study
from methods import config, fisher_source, fit_and_predict
from torch import Tensor

from lightning_unlearn import rules
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.judging import kept_samples
from lightning_unlearn.metrics import (
    linear_datamodelling_comparison,
    linear_datamodelling_interval,
    linear_datamodelling_score,
    subset_predictions,
)
from lightning_unlearn.shards import write_atomically
from lightning_unlearn.strategies import Newton
from lightning_unlearn.views import Views

TIMESTEPS = 20


@dataclass(frozen=True)
class Unlearned:
    """How queries are unlearned, and on which noise samples are scored."""

    fisher: str = "ekfac"
    parameters: str = "text_kv"
    damping: float = 0.1
    rise: float = 1.0
    steps: int = 1
    noise: Literal["shared", "per_sample"] = "shared"


@dataclass(frozen=True)
class Reduced:
    """How the losses become scores: the rule, the part of the schedule, and every how manyth view."""

    rule: str = "ratio"
    start: int = 0
    end: int = TIMESTEPS
    stride: int = 1

    @property
    def views(self) -> slice:
        """The views, among all."""
        return slice(self.start + self.stride // 2, self.end, self.stride)


CENTRE, PLAINLY = Unlearned(), Reduced()
# Factor to the values it takes; the centre's own are left out.
UNLEARNED: dict[str, list[Unlearned]] = {
    "Fisher": [replace(CENTRE, fisher=fisher) for fisher in ("identity", "diagonal")],
    "weights": [replace(CENTRE, parameters=parameters) for parameters in ("cross_attention", "all")],
    "damping": [replace(CENTRE, damping=damping) for damping in (0.001, 0.01, 1.0)],
    "rise of the query's loss": [replace(CENTRE, rise=rise) for rise in (0.02, 0.1, 0.3, 3.0)],
    "steps": [replace(CENTRE, steps=4)],
    "noise": [replace(CENTRE, noise="per_sample")],
}
REDUCED: dict[str, list[Reduced]] = {
    "score rule": [replace(PLAINLY, rule="difference")],
    "part of the schedule": [replace(PLAINLY, start=start, end=start + 5) for start in (0, 5, 10, 15)],
    "views": [replace(PLAINLY, stride=stride) for stride in (2, 4, 10)],
}


def variants() -> Iterator[tuple[str, Unlearned, Reduced]]:
    """All rows: the factor, and both halves of the settings; the centre first."""
    yield "centre", CENTRE, PLAINLY
    for factor, changed in UNLEARNED.items():
        yield from ((factor, unlearned, PLAINLY) for unlearned in changed)
    for factor, reductions in REDUCED.items():
        yield from ((factor, CENTRE, reduced) for reduced in reductions)


def changed(unlearned: Unlearned, reduced: Reduced) -> str:
    """What a row changes, in words."""
    if reduced != PLAINLY:
        if (reduced.start, reduced.end) != (PLAINLY.start, PLAINLY.end):
            return f"{reduced.start / TIMESTEPS:.0%} to {reduced.end / TIMESTEPS:.0%}, 5 views"
        return f"{TIMESTEPS // reduced.stride}" if reduced.stride != 1 else reduced.rule
    names = [name for name, value in asdict(unlearned).items() if value != getattr(CENTRE, name)]
    return ", ".join(str(getattr(unlearned, name)) for name in names)


@functools.cache
def losses(bench: Bench, unlearned: Unlearned) -> tuple[Tensor, list[str]] | str:
    """Losses of all samples, or why there are none.

    Returns:
        ``(1 + Q, N, views)`` with θ₀ first, and the samples' keys; the sentence of an error where there is one.
    """
    folder = bench.folder / "sweep"
    folder.mkdir(exist_ok=True)
    path = folder / ("-".join(str(value) for value in asdict(unlearned).values()) + ".pt")
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        return kept if isinstance(kept, str) else (kept["losses"], kept["keys"])
    fisher = fisher_source(bench, unlearned.fisher, unlearned.parameters)
    module, data = config(bench, fisher=fisher, parameters=unlearned.parameters, damping=unlearned.damping)
    module.strategy = Newton(steps=unlearned.steps, target_increase=unlearned.rise)
    module.views = Views(timesteps=TIMESTEPS, noise=unlearned.noise)
    try:
        predictions = fit_and_predict(module, data)
    except InputError as error:
        torch.save(str(error), path)
        return str(error)
    keys = [key for prediction in predictions for key in prediction.batch.keys]
    measured = [torch.cat([prediction.base[None], prediction.unlearned]) for prediction in predictions]
    values = torch.cat(measured, 1)[:, :, 0, 0].float()  # one flip, one caption
    torch.save({"losses": values, "keys": keys}, path)
    return values, keys


def sweep(bench: Bench) -> list[dict[str, Any]]:
    """All rows, with intervals, and beside each but the centre that of the difference from it."""
    study, plan = open_study(bench), bench.plan()
    report_queries, report_runs, choose_queries, choose_runs = halves(bench, plan)
    sides = {"chosen_on": (choose_queries, choose_runs), "reported_on": (report_queries, report_runs)}
    order = [query.key for query in bench.samples("queries")]
    centre: dict[str, Tensor] = {}
    rows = []
    for factor, unlearned, reduced in variants():
        found = losses(bench, unlearned)
        row: dict[str, Any] = {"factor": factor, "value": changed(unlearned, reduced)}
        rows.append(row)
        if isinstance(found, str):
            row["failed"] = found
            continue
        values, keys = found
        views = values[:, [keys.index(key) for key in plan.keys]][:, :, None, None, reduced.views].double()
        scores = rules.score(reduced.rule, views[0], views[1:])  # (N, Q)
        for side, (queries, runs) in sides.items():
            outcomes, kept = torch.from_numpy(study.losses(runs, queries)), kept_samples(plan.keys, runs)
            chosen = scores[:, [order.index(query) for query in queries]]
            predictions = subset_predictions(chosen, kept)
            centre.setdefault(side, predictions)
            mean = float(linear_datamodelling_score(chosen, kept, outcomes).mean())
            row[side] = [round(value, 4) for value in (mean, *linear_datamodelling_interval(predictions, outcomes))]
            if factor != "centre":
                compared = linear_datamodelling_comparison(predictions, centre[side], outcomes)
                row[f"{side}_less_centre"] = [round(value, 4) for value in (compared.low, compared.high)]
        print(row, flush=True)
    return rows


def main() -> None:
    """Write a bench's sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[path.parent.name for path in sorted(BENCHES.glob("*/bench.yaml"))])
    bench = Bench(parser.parse_args().bench)
    quiet()
    torch.set_num_threads(1)
    content = json.dumps({"centre": asdict(CENTRE) | asdict(PLAINLY), "rows": sweep(bench)}, indent=1)
    write_atomically(bench.folder / "sweep.json", content.encode() + b"\n")


if __name__ == "__main__":
    main()
