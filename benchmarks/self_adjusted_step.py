"""Whether a step that the model itself limits, and views weighted by their loss, are as good as fixed ones.

    python benchmarks/self_adjusted_step.py digits --queries 10
    python benchmarks/self_adjusted_step.py digits --keep     # scores of all queries, for consensus_tried.py

A step goes as far as a fixed rise, or until the real rise is so small a share of the first-order one ("linear"). Rules
are those of the package, the difference over each second view, and the ratio of a sample's summed losses:
(ΣU - ΣB) / (ΣU + ΣB), in which a view whose base loss is next to nothing has next to no say. A line for each selection
of weights, step and rule: the linear datamodelling score over the first queries that choose, by the models that choose.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from benches import Bench, bench_parser
from common import quiet
from judged import Half, evidence
from method_settings import DAMPING, SELECTIONS
from methods import config, fisher_source, fit_and_predict
from score_files import trials_file, write
from torch import Tensor

from lightning_unlearn.draws.views import Views
from lightning_unlearn.scores import rules
from lightning_unlearn.strategies import Newton, StepRange

FAR = 10.0  # a rise that is reached by no step that stays linear
STEPS = {
    **{f"rise {rise:.0%}": (rise, StepRange()) for rise in (0.1, 0.3, 1.0)},
    **{f"linear {share:.0%}": (FAR, StepRange(least_linear=share)) for share in (0.9, 0.7, 0.5)},
}


def ratio_of_sums(base: Tensor, unlearned: Tensor) -> Tensor:
    """``(B, Q)`` of ``(B, flips, captions, draws)`` and ``(Q, B, …)``, for one flip and one caption."""
    before, after = base.flatten(1).sum(1), unlearned.flatten(2).sum(2)
    return ((after - before) / (after + before)).mT


def losses(bench: Bench, parameters: str, step: str, queries: list[str], views: int) -> tuple[Any, dict[str, Tensor]]:
    """Each query's results, and the scores by each rule in the order of the plan's keys."""
    source = fisher_source(bench, "ekfac", parameters)
    module, data = config(bench, fisher=source, parameters=parameters, damping=DAMPING["ekfac"])
    rise, step_range = STEPS[step]
    module.strategy = Newton(target_increase=rise, step_range=step_range)
    module.views = Views(timesteps=views)
    data.query_keys = queries
    predictions = fit_and_predict(module, data)
    keys = [key for prediction in predictions for key in prediction.batch.keys]
    order = [keys.index(key) for key in bench.plan().keys]
    scores = {
        rule: torch.cat([rules.score(rule, one.base, one.unlearned).cpu() for one in predictions])[order]
        for rule in rules.RULES
    }
    scores["difference, each second view"] = torch.cat(
        [rules.score("difference", one.base[..., 1::2], one.unlearned[..., 1::2]).cpu() for one in predictions]
    )[order]
    scores["ratio of sums"] = torch.cat([ratio_of_sums(one.base, one.unlearned).cpu() for one in predictions])[order]
    return module.results, scores


def judged(half: Half, scores: Tensor, queries: list[str]) -> float:
    """The mean linear datamodelling score of some queries, whose columns these are."""
    columns = torch.zeros(len(scores), len(half.order), dtype=torch.float64)
    columns[:, [half.order.index(query) for query in queries]] = scores.double()
    return sum(half.mean_of(columns, query) for query in queries) / len(queries)


def keep(bench: Bench, steps: list[str]) -> None:
    """Score all queries by some steps, all weights."""
    queries, found = [query.key for query in bench.samples("queries")], {}
    for step in steps:
        _, scores = losses(bench, "all", step, queries, 10)
        found |= {f"{step}, {rule}{SELECTIONS['all']}": values for rule, values in scores.items()}
    write(trials_file(bench), bench.plan().keys, found, add=False)


def main() -> None:
    """Measure, and print."""
    parser = bench_parser(__doc__)
    parser.add_argument("--queries", type=int, default=10, help="how many of those that choose")
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--weights", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--keep", action="store_true", help="only write scores of all queries, all weights")
    arguments = parser.parse_args()
    bench = Bench(arguments.bench)
    quiet()
    torch.set_num_threads(1)
    if arguments.keep:
        keep(bench, arguments.steps)
        return
    choosing, _ = evidence(bench)
    queries = sorted(choosing.queries)[: arguments.queries]
    for parameters in arguments.weights:
        for step in arguments.steps:
            results, scores = losses(bench, parameters, step, queries, arguments.views)
            rises = sorted(float(result["rise"]) for result in results.values())
            about = {"weights": parameters, "step": step, "rises": [round(rises[0], 3), round(rises[-1], 3)]}
            lds = {rule: round(judged(choosing, values, queries), 4) for rule, values in scores.items()}
            print(json.dumps({**about, "lds": lds}), flush=True)


if __name__ == "__main__":
    main()
