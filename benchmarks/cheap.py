"""How cheap an answer can be that still holds on every bench: few views, and what needs no unlearning.

    python benchmarks/cheap.py digits     # writes digits/cheap.json
    python benchmarks/results.py          # puts all of them on the page

DAS, D-TRAK and the influence function look at the gradients of all samples once, for all queries; those of two or
three output functions share their forward passes. A call is counted as in recipe.py: one forward pass of one view, its
backward pass two more, so that a view costs 1 + 2 for each output function; what is once for all queries is spread over
20. The paper's recipe, whose calls and score recipe.py measured, stands beside it, and what `Consensus` asks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from base_model import fisher_file
from benches import Bench, bench_parser
from common import quiet
from judged import Half, evidence
from methods import config
from recipe import SPREAD
from together import by_default
from torch import Tensor

from lightning_unlearn.baselines import DAS, DTRAK, Influence, Subject
from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.baselines.gradients import shared_gradients
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.draws.views import Views
from lightning_unlearn.evaluation.judging import scores_of as kept_scores
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.weights.precision import ExactFloat32

VIEWS = (1, 2, 3, 4)
ASKED = {
    "DAS + D-TRAK": (DAS(0.001), DTRAK(0.01)),
    "DAS + D-TRAK + influence": (DAS(0.001), DTRAK(0.01), Influence(0.001)),
}
SELECTIONS = ("all", "text_kv")
# What holds: so many times cheaper than the recipe, and this share of the default's score.
CHEAPER, SHARE = 21, 0.9


def scores_with(bench: Bench, views: int, parameters: str) -> dict[str, Tensor]:
    """Each way to ask, ``(N, Q)`` in the plan's order, from one pass."""
    module, data = config(bench, parameters=parameters)
    data.setup("predict")
    fisher = load_fisher(fisher_file(bench, "ekfac", parameters))
    few = Views(timesteps=views)
    subject = Subject(module.loss, module.layers, few, data.queries, data.predict_dataloader, fisher=fisher)
    methods = {method.name: method for asked in ASKED.values() for method in asked}
    with ExactFloat32(), shared_gradients(subject, ["mean", "square", "loss"]):
        found = {name: method.scores(subject) for name, method in methods.items()}
    keys = [key for batch in subject.batches() for key in batch.keys]
    order = [keys.index(key) for key in bench.plan().keys]
    return {
        name: combined({method.name: found[method.name][order] for method in asked}, {m.name: 1.0 for m in asked})
        for name, asked in ASKED.items()
    }


def calls(samples: int, views: int, functions: int) -> float:
    """Network calls a query."""
    return (samples / SPREAD + 1) * views * (1 + 2 * functions)


def judged(halves: tuple[Half, Half], scores: Tensor, default: Tensor) -> dict[str, Any]:
    """The score on both halves, and on the reporting one less a share of the default's."""
    value, apart = halves[1].value(scores), halves[1].compared(scores, default, SHARE)
    return {
        "chosen_on": round(halves[0].mean(scores), 4),
        "reported_on": [round(number, 4) for number in (value.mean, value.low, value.high)],
        "less_share_of_default": [round(apart.low, 4), round(apart.high, 4)],
    }


def main() -> None:
    """Write a bench's rows."""
    bench = Bench(bench_parser(__doc__).parse_args().bench)
    quiet()
    torch.set_num_threads(1)
    halves, table = evidence(bench), by_default(bench)
    assert table is not None, "run methods.py first"
    default = kept_scores(table, bench.plan().keys, halves[0].order)
    rows = []
    for parameters in SELECTIONS:
        for views in VIEWS:
            for name, scores in scores_with(bench, views, parameters).items():
                about = {"asked": name, "weights": parameters, "views": views}
                about["calls"] = round(calls(len(scores), views, len(ASKED[name])), 1)
                rows.append({**about, **judged(halves, scores, default)})
                print(json.dumps(rows[-1]), flush=True)
    found = {"default": round(halves[1].mean(default), 4), "rows": rows}
    write_atomically(bench.folder / "cheap.json", json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
