"""How far the steps of a bench go, against the range in which a step means something, and what the watch is worth.

    python benchmarks/step_range.py digits                    # the default step
    python benchmarks/step_range.py digits --size "rise 300%"
    python benchmarks/step_range.py digits --lds              # and the linear datamodelling score with and without it

A line a query: its delta's length in lengths of the weights, its rise as a share of the first-order one, the relative
rise of everything else as a share of its own, how often its loss was measured, and what is out of range. Then the
smallest, the middle and the largest of each. --lds scores all samples twice and judges both by the kept study on the
half of the evidence that reports (judged.py).
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from bench import Bench, bench_parser
from common import PLAIN, quiet
from judged import evidence
from lightning.pytorch import Trainer
from method_settings import DAMPING, SIZES, newton
from methods import config, fisher_source
from torch import Tensor

from lightning_unlearn.scores import rules
from lightning_unlearn.strategies import StepRange
from lightning_unlearn.unlearning.module import UnlearningModule

OFF = StepRange(longest=math.inf, least_linear=0.0, most_others=math.inf)
SHOWN = ("rise", "length", "linear", "others", "evaluations")


def unlearned(bench: Bench, arguments: Any, step_range: StepRange | None, scored: bool) -> tuple[Any, Tensor | None]:
    """Unlearn the bench's queries.

    Returns:
        Each query's results, and the scores ``(N, Q)`` in the order of the plan's keys.
    """
    module, data = config(bench, fisher=fisher_source(bench, arguments.fisher), damping=DAMPING[arguments.fisher])
    assert isinstance(module, UnlearningModule)
    module.strategy = newton(arguments.size)
    if step_range is not None:
        module.strategy.step_range = step_range
    if arguments.queries:
        data.query_keys = arguments.queries
    trainer = Trainer(**{**PLAIN, "devices": 1})
    trainer.fit(module, data)
    if not scored:
        return module.results, None
    predictions: Any = trainer.predict(module, data)
    keys = [key for prediction in predictions for key in prediction.batch.keys]
    found = torch.cat([rules.score("ratio", prediction.base, prediction.unlearned).cpu() for prediction in predictions])
    return module.results, found[[keys.index(key) for key in bench.plan().keys]]


def row(result: dict[str, Any]) -> dict[str, float]:
    """What is shown of a query."""
    others = math.nan
    if "others_after" in result:
        others = (result["others_after"] / result["others_before"] - 1) / result["rise"]
    return {name: others if name == "others" else result[name] for name in SHOWN}


def main() -> None:
    """Measure, and print."""
    parser = bench_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="halfway", help="of the step")
    parser.add_argument("--fisher", choices=DAMPING, default="ekfac")
    parser.add_argument("--queries", nargs="+", help="keys of some; all by default")
    parser.add_argument("--lds", action="store_true", help="score and judge, with and without the watch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    arguments = parser.parse_args()
    quiet()
    bench = Bench(arguments.bench)
    results, scores = unlearned(bench, arguments, None, arguments.lds)
    rows = {query: row(result) for query, result in results.items()}
    content: dict[str, Any] = {"queries": rows, "out_of_range": {q: r["out_of_range"] for q, r in results.items()}}
    if scores is not None:
        _, without = unlearned(bench, arguments, OFF, True)
        assert without is not None
        _, half = evidence(bench)
        kept = [place for place, query in enumerate(half.queries) if query in results]
        content["lds"] = {}
        for name, values in (("with", scores), ("without", without)):
            columns = torch.full((len(values), len(half.order)), math.nan)
            columns[:, [half.order.index(query) for query in results]] = values.float()
            each = [half.mean_of(columns, half.queries[place]) for place in kept]
            content["lds"][name] = sum(each) / len(each)
    if arguments.json:
        print(json.dumps(content))
        return
    print(f"{'query':12}" + "".join(f"{name:>13}" for name in SHOWN) + "  out of range")
    for query, shown in rows.items():
        out = ", ".join(content["out_of_range"][query])
        print(f"{query:12}" + "".join(f"{shown[name]:13.4g}" for name in SHOWN) + f"  {out}")
    for word, share in (("smallest", 0.0), ("middle", 0.5), ("largest", 1.0)):
        columns = torch.tensor([[shown[name] for name in SHOWN] for shown in rows.values()]).quantile(share, dim=0)
        print(f"{word:12}" + "".join(f"{value:13.4g}" for value in columns.tolist()))
    for name, value in content.get("lds", {}).items():
        print(f"LDS {name} the watch, {len(kept)} queries that report: {value:.4f}")


if __name__ == "__main__":
    main()
