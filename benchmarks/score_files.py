"""Scores and costs in a bench's folder: a Parquet file a method and selection of weights, and costs.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benches import CHOSEN, Bench
from method_settings import ASKED_TOGETHER, ENDS, SELECTIONS, SIZES, WITHOUT_WEIGHTS
from torch import Tensor

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.scores.table import ScoreTable

Scores = dict[str, Tensor]
COSTS = "costs.json"
TRIALS = "trials"  # steps that no method has; self_adjusted_step.py


def files(bench: Bench, method: str) -> dict[str, Path]:
    """Selection of weights to the file of a method's scores with it."""
    selections = [CHOSEN] if method in WITHOUT_WEIGHTS else [*SELECTIONS]
    if method in ASKED_TOGETHER:
        selections += bench.settings.get("more_selections", [])
    ends = {selection: "" if selection == CHOSEN else f"-{selection}" for selection in selections}
    return {selection: bench.folder / "scores" / f"{method}{end}.parquet" for selection, end in ends.items()}


def is_scored(bench: Bench, method: str) -> bool:
    """Whether a method has its scores, at least with the selection of weights that is chosen."""
    return files(bench, method)[CHOSEN].is_file()


def missing_sizes(bench: Bench, method: str, parameters: str) -> list[str]:
    """The sizes of a step that unlearning has no scores with."""
    path = files(bench, method)[parameters]
    names = pq.read_schema(path).names if path.is_file() else []
    return [size for size in SIZES if not any(name.startswith(f"{size},") for name in names)]


def write(path: Path, keys: list[str], scores: Scores, add: bool) -> None:
    """Write the scores ``(N, Q)`` by each setting.

    Args:
        path: The file.
        keys: Of the rows.
        scores: Setting to scores.
        add: Whether the scores by sizes of a step that are in the file stay there.
    """
    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    if add and path.is_file():
        kept = pq.read_table(path)
        assert kept.column("key").to_pylist() == keys
        columns |= {name: kept.column(name) for name in kept.column_names[1:] if name.startswith(SIZES)}
    for setting, values in scores.items():
        for number in range(values.shape[1]):
            columns[f"{setting}|query-{number:02d}"] = pa.array(values[:, number].float().contiguous().numpy())
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pq.write_table(pa.table(columns), Path(folder) / path.name, compression="zstd")
        (Path(folder) / path.name).replace(path)


def read(bench: Bench, method: str, selection: str | None = None) -> dict[str, ScoreTable]:
    """A method's score tables by its settings with the usual selections, or with one of weights if it has any."""
    paths = files(bench, method)
    usual = [path for name, path in paths.items() if name in SELECTIONS and path.is_file()]
    chosen = [paths.get(selection, paths[CHOSEN])] if selection else usual
    return {setting: table for path in chosen for setting, table in _tables(path).items()}


def trials_file(bench: Bench) -> Path:
    """The file of scores by steps that were only tried."""
    return bench.folder / "scores" / f"{TRIALS}.parquet"


def read_trials(bench: Bench) -> dict[str, ScoreTable]:
    """Score tables by steps that were only tried, by their settings."""
    path = trials_file(bench)
    return _tables(path) if path.is_file() else {}


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


def add_costs(bench: Bench, name: str, costs: dict[str, float]) -> None:
    """Write what was measured of a method and selection of weights, beside that of others."""
    content = json.dumps(all_costs(bench) | {name: costs}, indent=1, sort_keys=True)
    write_atomically(bench.folder / "scores" / COSTS, content.encode() + b"\n")


def all_costs(bench: Bench) -> dict[str, dict[str, float]]:
    """What was measured of each method and selection of weights, by its file's name."""
    path = bench.folder / "scores" / COSTS
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def read_costs(bench: Bench, method: str, setting: str) -> dict[str, float] | None:
    """What a method cost under one of its settings, if that was measured."""
    selection = next(name for name in reversed(ENDS) if setting.endswith(ENDS[name]))
    return all_costs(bench).get(files(bench, method)[selection].stem)
