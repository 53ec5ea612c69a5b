"""Every method with its settings: as many of them for each, from which half of the evidence chooses one.

    python benchmarks/methods.py digits           # scores of all methods that are not there yet
    python benchmarks/methods.py digits d_trak    # of some

    python benchmarks/methods.py digits --costs   # what each costs, into costs.json, on one thread of this machine

A method's scores under all of its settings with a selection of weights are one Parquet file. Each runs in a process of
its own, so that its peak memory is its own. BENCH_ACCELERATOR=gpu takes scores on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench import BENCHES, CHOSEN, FISHER_FILES, TRUE_FISHER_FILES, Bench, bench_parser, fisher_file, take_fisher
from common import ACCELERATOR, PLAIN, quiet
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_unlearn import rules
from lightning_unlearn.baselines import (
    DAS,
    DTRAK,
    TRAK,
    Baseline,
    GradientSimilarity,
    Influence,
    JourneyTRAK,
    PixelSimilarity,
    Random,
    Subject,
    TextSimilarity,
)
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.module import UnlearningModule
from lightning_unlearn.precision import ExactFloat32
from lightning_unlearn.score_table import ScoreTable
from lightning_unlearn.scoring import Deviations
from lightning_unlearn.shards import write_atomically
from lightning_unlearn.strategies import Newton
from lightning_unlearn.trainer_cli import TrainerCLI

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
# Sizes of a step: how far the query's loss rises, relative to itself or on the way to the training pictures' mean loss.
SIZES = ("rise 30%", "rise 100%", "rise 300%", "halfway")
# Whatever works with weights is tried on both selections; what stands after a setting's name.
SELECTIONS = {CHOSEN: "", "all": ", all weights"}

# Method to its settings. All get eight a selection of weights, or what there is to choose.
BASELINE_SETTINGS: dict[str, dict[str, Baseline]] = {
    "random": {f"seed {seed}": Random(seed) for seed in range(8)},
    "pixel_similarity": {kind: PixelSimilarity(kind) for kind in ("cosine", "l2", "centred_cosine")},
    "text_similarity": {kind: TextSimilarity(kind) for kind in ("mean", "max", "max_token")},
    "gradient_similarity": {
        f"{kind}{', per timestep' * steps}": GradientSimilarity(kind, steps)
        for kind in ("dot", "cosine")
        for steps in (False, True)
    },
    "influence": {f"damping {value:g}": Influence(value) for value in RIDGES},
    "influence_ekfac": {f"damping {value:g}": Influence(value) for value in RIDGES},
    "trak": {f"ridge {value:g}": TRAK(value) for value in RIDGES},
    "journey_trak": {f"ridge {value:g}": JourneyTRAK(value) for value in RIDGES},
    "d_trak": {f"ridge {value:g}": DTRAK(value) for value in RIDGES},
    "das": {f"ridge {value:g}": DAS(value) for value in RIDGES},
}
# With a Fisher, and plain gradient ascent without one.
UNLEARNING = {"unlearning_ekfac": "ekfac", "unlearning": "diagonal", "gradient_ascent": "identity"}
# The default, and what the diagonal Fisher always had here (a hundredth of it changes its LDS by less than 0.02).
DAMPING = {"ekfac": 0.001, "diagonal": 0.1, "identity": 0.1}
METHODS = (*UNLEARNING, *BASELINE_SETTINGS)
# The package's defaults: a method of one setting, for which nothing is chosen.
DEFAULT, DEFAULT_OF, DEFAULT_SETTING = "default", "unlearning_ekfac", "halfway, ratio"
# Of customised models alone: the losses before customising, in the place of those after unlearning a query.
UNDONE = "undone"
WITHOUT_WEIGHTS = ("random", "pixel_similarity", "text_similarity")
WITH_FISHER = {"influence": "diagonal", "influence_ekfac": "ekfac"} | {
    name: kind for name, kind in UNLEARNING.items() if kind in FISHER_FILES
}
LABELS = {
    DEFAULT: "**unlearning with the defaults (ours)**",
    "unlearning_ekfac": "unlearning, EKFAC Fisher, tuned (ours)",
    "unlearning": "unlearning, diagonal Fisher, tuned (ours)",
    "gradient_ascent": "gradient ascent, no Fisher, tuned (ours)",
    UNDONE: "customising undone (ours; needs no query)",
    "pixel_similarity": "pixel similarity",
    "text_similarity": "text similarity",
    "gradient_similarity": "gradient similarity (TracIn, ReTrac)",
    "influence": "influence function (diagonal Fisher)",
    "influence_ekfac": "influence function (EKFAC Fisher)",
    "trak": "TRAK",
    "journey_trak": "Journey-TRAK",
    "d_trak": "D-TRAK",
    "das": "DAS",
    "random": "random",
}

Scores = dict[str, Tensor]
COSTS = "costs.json"
COSTED = 10  # queries by whose costs one's is told


def plain(method: str) -> str:
    """A method's name where nothing can be bold."""
    return LABELS[method].replace("**", "")


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


def newton(size: str) -> Newton:
    """The strategy with one of the sizes of a step."""
    if size == "halfway":
        return Newton(toward_data=0.5)
    return Newton(target_increase=float(size.removeprefix("rise ").removesuffix("%")) / 100)


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
            scores[f"{size}, {rule}{SELECTIONS[parameters]}"] = torch.cat(rows)
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
        scores = {
            setting + SELECTIONS[parameters]: BASELINE_SETTINGS[name][setting].scores(subject) for setting in settings
        }
    keys = [key for batch in subject.batches() for key in batch.keys]
    # What a method keeps of the training images for later queries: their gradients, if it takes any.
    if name in WITHOUT_WEIGHTS:
        once = 0
    else:
        once = 4 * len(keys) * sum(p.numel() for layer in module.layers.values() for p in layer.parameters())
    return scores, keys, once


def baseline_of(method: str, setting: str) -> Baseline:
    """A rival under one of its settings."""
    return BASELINE_SETTINGS[method][setting]


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
    path = files(bench, method)[parameters]
    kept = pq.read_table(path) if method in UNLEARNING and path.is_file() else None
    names = [] if kept is None else [name for name in kept.column_names[1:] if name.startswith(SIZES)]
    wanted = missing_sizes(bench, method, parameters) if method in UNLEARNING else list(BASELINE_SETTINGS[method])
    scores, keys, _ = score(bench, method, parameters, wanted)
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    if kept is not None:
        assert kept.column("key").to_pylist() == keys
        columns |= {name: kept.column(name) for name in names}
    for setting, values in scores.items():
        for number in range(values.shape[1]):
            columns[f"{setting}|query-{number:02d}"] = pa.array(values[:, number].float().contiguous().numpy())
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pq.write_table(pa.table(columns), Path(folder) / path.name, compression="zstd")
        (Path(folder) / path.name).replace(path)


def missing_sizes(bench: Bench, method: str, parameters: str) -> list[str]:
    """The sizes of a step that unlearning has no scores with."""
    path = files(bench, method)[parameters]
    names = pq.read_schema(path).names if path.is_file() else []
    return [size for size in SIZES if not any(name.startswith(f"{size},") for name in names)]


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
    known = all_costs(bench) | {files(bench, method)[parameters].stem: costs}
    content = json.dumps(known, indent=1, sort_keys=True)
    write_atomically(bench.folder / "scores" / COSTS, content.encode() + b"\n")


def all_costs(bench: Bench) -> dict[str, dict[str, float]]:
    """What was measured of each method and selection of weights, by its file's name."""
    path = bench.folder / "scores" / COSTS
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def files(bench: Bench, method: str) -> dict[str, Path]:
    """Selection of weights to the file of a method's scores with it."""
    selections = [CHOSEN] if method in WITHOUT_WEIGHTS else SELECTIONS
    ends = {selection: "" if selection == CHOSEN else f"-{selection}" for selection in selections}
    return {selection: bench.folder / "scores" / f"{method}{end}.parquet" for selection, end in ends.items()}


def is_scored(bench: Bench, method: str) -> bool:
    """Whether a method has its scores, at least with the selection of weights that is chosen."""
    return files(bench, method)[CHOSEN].is_file()


def read(bench: Bench, method: str, selection: str | None = None) -> dict[str, ScoreTable]:
    """A method's score tables by its settings, or by those with a selection of weights if it has any."""
    paths = files(bench, method)
    chosen = [paths.get(selection, paths[CHOSEN])] if selection else [p for p in paths.values() if p.is_file()]
    return {setting: table for path in chosen for setting, table in _tables(path).items()}


def _tables(path: Path) -> dict[str, ScoreTable]:
    table = pq.read_table(path)
    keys = table.column("key").to_pylist()
    order = sorted(range(len(keys)), key=keys.__getitem__)
    columns: dict[str, dict[str, Any]] = {}
    for name in table.column_names[1:]:
        setting, query = name.split("|")
        columns.setdefault(setting, {})[query] = table.column(name).to_numpy()[order]
    return {
        setting: ScoreTable(
            keys=[keys[row] for row in order],
            shards=[""] * len(keys),
            queries=list(values),
            scores=np.stack(list(values.values()), 1),
            base_losses=np.zeros(len(keys), np.float32),
            run={},
        )
        for setting, values in columns.items()
    }


def read_costs(bench: Bench, method: str, setting: str) -> dict[str, float] | None:
    """What a method cost under one of its settings, if that was measured."""
    selection = next(name for name in reversed(SELECTIONS) if setting.endswith(SELECTIONS[name]))
    return all_costs(bench).get(files(bench, method)[selection].stem)


def main() -> None:
    """Score with methods that have no scores yet, or measure costs."""
    parser = bench_parser(__doc__)
    parser.add_argument("methods", nargs="*", choices=[[], *METHODS], help="all by default")
    parser.add_argument("--costs", action="store_true", help="measure costs, and keep no scores")
    parser.add_argument("--here", choices=SELECTIONS, help=argparse.SUPPRESS)
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
