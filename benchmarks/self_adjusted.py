"""Whether a ridge that the model itself chooses is as good as a tuned one: by the kernel's leave-one-out error.

    python benchmarks/self_adjusted.py digits

For each kernel method and selection of weights, the ridge whose regression on all other samples best foretells what is
known of each sample without training again: its root mean squared error. Beside it the ridge that the choosing half of
the evidence takes, and the LDS of both on the reporting half. Writes self_adjusted.json in the bench's folder.
"""

from __future__ import annotations

import json

import torch
from benches import Bench, bench_parser
from common import quiet
from judged import evidence
from method_settings import BASELINE_SETTINGS, RIDGES, SELECTIONS
from methods import config
from score_files import read
from torch import Tensor

from lightning_unlearn.baselines import DAS, DTRAK, TRAK, Subject
from lightning_unlearn.baselines.gradients import shared_gradients
from lightning_unlearn.baselines.kernel import RidgeKernel
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.evaluation.judging import scores_of
from lightning_unlearn.weights.precision import ExactFloat32

METHODS = (TRAK, DTRAK, DAS)


def kernels(bench: Bench, parameters: str) -> dict[str, RidgeKernel]:
    """Each method's kernel, from one pass over the samples."""
    module, data = config(bench, parameters=parameters)
    data.setup("predict")
    subject = Subject(module.loss, module.layers, module.views, data.queries, data.predict_dataloader)
    with ExactFloat32(), shared_gradients(subject, [method.output for method in METHODS]):
        return {method.name: method().kernel(subject) for method in METHODS}


def centred(values: Tensor) -> Tensor:
    """Less their mean."""
    return values - values.mean()


def compare(bench: Bench) -> list[dict[str, object]]:
    """A row for each method and selection of weights."""
    choosing, reporting = evidence(bench)
    keys = bench.plan().keys
    rows: list[dict[str, object]] = []
    for selection, suffix in SELECTIONS.items():
        for method, kernel in kernels(bench, selection).items():
            errors = {ridge: kernel.leave_one_out_error(ridge, centred(kernel.errors)) for ridge in RIDGES}
            own = min(errors, key=errors.__getitem__)
            tables = read(bench, method, selection)
            scores = {
                ridge: scores_of(tables[f"ridge {ridge:g}{suffix}"], keys, choosing.order)
                for ridge in RIDGES
                if f"ridge {ridge:g}" in BASELINE_SETTINGS[method]
            }
            tuned = max(scores, key=lambda ridge: choosing.mean(scores[ridge]))
            apart = reporting.compared(scores[own], scores[tuned])
            rows.append(
                {
                    "method": f"{method}{suffix}",
                    "own": own,
                    "tuned": tuned,
                    "own_lds": round(reporting.mean(scores[own]), 4),
                    "tuned_lds": round(reporting.mean(scores[tuned]), 4),
                    "own_less_tuned": [round(apart.low, 4), round(apart.high, 4)],
                    "errors": {f"{ridge:g}": error for ridge, error in errors.items()},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure, and print."""
    bench = Bench(bench_parser(__doc__).parse_args().bench)
    quiet()
    torch.set_num_threads(1)
    rows = compare(bench)
    write_atomically(bench.folder / "self_adjusted.json", json.dumps({"rows": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
