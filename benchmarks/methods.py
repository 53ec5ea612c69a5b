"""Scores of every method under its settings (method_settings.py), from which half of the evidence chooses one.

    python benchmarks/methods.py digits           # scores of all methods that are not there yet
    python benchmarks/methods.py digits d_trak    # of some

    python benchmarks/methods.py digits --costs   # what each costs, into costs.json, on one thread of this machine

A method's scores under all of its settings with a selection of weights are one Parquet file. Each runs in a process of
its own, so that its peak memory is its own. BENCH_ACCELERATOR=gpu takes scores on a GPU.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from base_model import fisher_file, take_fisher
from benches import BENCHES, CHOSEN, FISHER_FILES, TRUE_FISHER_FILES, Bench, bench_parser
from common import ACCELERATOR, PLAIN, quiet
from lightning.pytorch import Trainer
from method_settings import (
    BASELINE_SETTINGS,
    DAMPING,
    ENDS,
    METHODS,
    UNLEARNING,
    WITH_FISHER,
    WITHOUT_WEIGHTS,
    newton,
)
from score_files import Scores, add_costs, all_costs, files, missing_sizes, write

from lightning_unlearn.baselines import Subject
from lightning_unlearn.command_line.trainer_cli import TrainerCLI
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores import rules
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.unlearning.scoring import Deviations
from lightning_unlearn.weights.precision import ExactFloat32

COSTED = 10  # queries by whose costs one's is told


def config(bench: Bench, **settings: Any) -> tuple[UnlearningModule, AttributionDataModule]:
    """The bench's attribution config."""
    os.chdir(BENCHES.parent)
    arguments = ["--config", str(bench.folder / "attribute.yaml")]
    for name, value in settings.items():
        arguments += [f"--model.init_args.{name}", str(value)]
    cli = TrainerCLI("attribute", arguments, "Bench", None, **PLAIN)
    assert isinstance(cli.model, UnlearningModule)
    assert isinstance(cli.datamodule, AttributionDataModule)
    if ACCELERATOR != "cpu":
        cli.datamodule.batch_size = cli.datamodule.draw_batch_size = 256
    return cli.model, cli.datamodule


def fisher_source(bench: Bench, kind: str, parameters: str = CHOSEN) -> str:
    """What an attribution config takes as Fisher: a file, or ``identity``."""
    return str(fisher_file(bench, kind, parameters)) if kind in FISHER_FILES | TRUE_FISHER_FILES else kind


def fit_and_predict(module: UnlearningModule, data: AttributionDataModule) -> list[Deviations]:
    """Unlearn, and the losses of all samples."""
    trainer = Trainer(**{**PLAIN, "devices": 1})
    trainer.fit(module, data)
    predictions: Any = trainer.predict(module, data)
    return list(predictions)


def unlearning_scores(
    bench: Bench, fisher: str, parameters: str, queries: int | None, sizes: Sequence[str]
) -> tuple[Scores, list[str], int]:
    """Scores of unlearning by some sizes of the step and all rules; base losses and views are the same in all."""
    scores: Scores = {}
    keys: list[str] = []
    for size in sizes:
        source = fisher_source(bench, fisher, parameters)
        module, data = config(bench, fisher=source, parameters=parameters, damping=DAMPING[fisher])
        module.strategy = newton(size)
        if queries is not None:
            data.query_keys = [f"query-{number:02d}" for number in range(queries)]
        predictions = fit_and_predict(module, data)
        keys = [key for prediction in predictions for key in prediction.batch.keys]
        for rule in rules.RULES:
            rows = [rules.score(rule, prediction.base, prediction.unlearned).cpu() for prediction in predictions]
            scores[f"{size}, {rule}{ENDS[parameters]}"] = torch.cat(rows)
    return scores, keys, 0


def baseline_scores(
    bench: Bench, name: str, parameters: str, queries: int | None, settings: Sequence[str]
) -> tuple[Scores, list[str], int]:
    """Scores of a rival under some of its settings; gradients are computed once."""
    module, data = config(bench, parameters=parameters)
    data.setup("predict")
    if ACCELERATOR != "cpu":
        module.loss.to("cuda")
    chosen = data.queries if queries is None else data.queries[:queries]
    subject = Subject(
        loss=module.loss,
        layers=module.layers,
        views=module.views,
        queries=chosen,
        batches=data.predict_dataloader,
        fisher=load_fisher(fisher_file(bench, WITH_FISHER.get(name, "diagonal"), parameters)),
        keep=True,
    )
    with ExactFloat32():
        scores = {setting + ENDS[parameters]: BASELINE_SETTINGS[name][setting].scores(subject) for setting in settings}
    keys = [key for batch in subject.batches() for key in batch.keys]
    # What a method keeps of the training images for later queries: their gradients, if it takes any.
    if name in WITHOUT_WEIGHTS:
        once = 0
    else:
        once = 4 * len(keys) * sum(p.numel() for layer in module.layers.values() for p in layer.parameters())
    return scores, keys, once


def score(
    bench: Bench, method: str, parameters: str, settings: Sequence[str], queries: int | None = None
) -> tuple[Scores, list[str], int]:
    """A method's scores by some settings, the keys of their rows, and the bytes it keeps for later queries.

    The settings of unlearning are sizes of the step, each with all rules.
    """
    if method in UNLEARNING:
        return unlearning_scores(bench, UNLEARNING[method], parameters, queries, settings)
    return baseline_scores(bench, method, parameters, queries, settings)


def fisher_seconds(bench: Bench, kind: str, parameters: str) -> float:
    """Processor time of taking the Fisher by passes over the data."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        take_fisher(bench, Path(folder) / "fisher.safetensors", kind, parameters)
        return time.process_time() - started


def ready(bench: Bench, method: str, parameters: str) -> None:
    """Do what is nobody's cost: imports, first reads, and a Fisher that training would have left."""
    quiet()
    torch.set_num_threads(1)
    config(bench)
    if method in WITH_FISHER:
        fisher_file(bench, WITH_FISHER[method], parameters)


def keep_scores(bench: Bench, method: str, parameters: str) -> None:
    """Score all queries under all settings; of unlearning, under those that are not there yet."""
    ready(bench, method, parameters)
    wanted = missing_sizes(bench, method, parameters) if method in UNLEARNING else list(BASELINE_SETTINGS[method])
    scores, keys, _ = score(bench, method, parameters, wanted)
    write(files(bench, method)[parameters], keys, scores, add=method in UNLEARNING)


def keep_costs(bench: Bench, method: str, parameters: str) -> None:
    """Score some queries by one setting, and one query alone to tell what each costs from what is done once."""
    ready(bench, method, parameters)
    setting = ["halfway"] if method in UNLEARNING else list(BASELINE_SETTINGS[method])[:1]
    started = time.process_time()
    score(bench, method, parameters, setting, 1)
    alone = time.process_time() - started
    started = time.process_time()
    once = score(bench, method, parameters, setting, COSTED)[2]
    together = time.process_time() - started
    each = max(0.0, (together - alone) / (COSTED - 1))
    before = max(0.0, alone - each)
    if method in WITH_FISHER:
        before += fisher_seconds(bench, WITH_FISHER[method], parameters)
        once += fisher_file(bench, WITH_FISHER[method], parameters).stat().st_size
    costs = {
        "seconds_a_query": each,
        "seconds_once": before,
        "bytes_once": once,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    add_costs(bench, files(bench, method)[parameters].stem, costs)


def main() -> None:
    """Score with methods that have no scores yet, or measure costs."""
    parser = bench_parser(__doc__)
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS], help="all by default")
    parser.add_argument("--costs", action="store_true", help="measure costs, and keep no scores")
    parser.add_argument("--here", choices=ENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = Bench(arguments.bench)
    work = keep_costs if arguments.costs else keep_scores
    for method in arguments.methods or METHODS:
        for selection, path in files(bench, method).items():
            is_there = path.is_file() and not (method in UNLEARNING and missing_sizes(bench, method, selection))
            if arguments.costs:
                is_there = path.stem in all_costs(bench)
            if arguments.here == selection:
                work(bench, method, selection)
            elif not arguments.here and (arguments.methods or not is_there):
                command = [sys.executable, __file__, bench.name, method, "--here", selection]
                subprocess.run(command + ["--costs"] * arguments.costs, check=True)


if __name__ == "__main__":
    main()
