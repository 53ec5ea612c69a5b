"""The numbers of many finished models in one small file, beside those that are not packed yet."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from benches import Bench
from numpy.typing import NDArray

from lightning_unlearn.evaluation import Run
from lightning_unlearn.evaluation.floors import MEASURES
from lightning_unlearn.evaluation.study import MODELS, Study, read_settings

PACKED = "models.parquet"
KEPT = tuple(measure for measure in MEASURES if measure != "cosine")  # there is no encoder on the benches


class PackedStudy(Study):
    """A study whose models are read from one file, and from their own files where they came later."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        # The models of the one file bind its settings as those in files of their own do: nothing is written here.
        self.folder, self.settings = folder, dict(settings)
        self._refuse_another()

    @functools.cached_property
    def packed(self) -> dict[str, dict[str, Any]]:
        """A run's name to each measure of each query."""
        path = self.folder / PACKED
        rows = pq.read_table(path).to_pylist() if path.is_file() else []
        return {row["run"]: row for row in rows}

    def is_finished(self, run: Run) -> bool:
        """Whether a run's numbers are there."""
        return run.name in self.packed or super().is_finished(run)

    def losses(self, runs: Sequence[Run], queries: Sequence[str], measure: str = "loss") -> NDArray[np.float64]:
        """A measure of finished runs on queries; see :meth:`Study.losses`."""
        rows = []
        for run in runs:
            if run.name in self.packed:
                values: Any = [self.packed[run.name].get(f"{measure}|{query}", np.nan) for query in queries]
                rows.append(np.array(values, dtype=np.float64)[None])
            else:
                rows.append(super().losses([run], queries, measure))
        return np.concatenate(rows) if rows else super().losses([], queries, measure)


def open_study(bench: Bench) -> PackedStudy:
    """The bench's study as it is, whatever recipe this machine would make."""
    settings = read_settings(bench.folder / "study")
    assert settings is not None, "run bench.py retrain first"
    return PackedStudy(bench.folder / "study", settings)


def is_packed(bench: Bench) -> bool:
    """Whether some models are in the one file."""
    return (bench.folder / "study" / PACKED).is_file()


def pack(bench: Bench) -> None:
    """Take all finished models into the one file; their own files are removed."""
    folder = bench.folder / "study"
    files = sorted((folder / MODELS).glob("*.json"))
    rows = dict(open_study(bench).packed)
    for path in files:
        content = json.loads(path.read_bytes())
        row = {"run": path.stem}
        for query, outcome in content["outcomes"].items():
            row |= {f"{measure}|{query}": np.float32(outcome.get(measure, np.nan)) for measure in KEPT}
        rows[path.stem] = row
    if files:
        _write(folder / PACKED, [rows[name] for name in sorted(rows)])
        for path in files:
            path.unlink()


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if all(name in row for row in rows)]
    kinds = {"run": pa.string()}
    table = pa.table({name: pa.array([row[name] for row in rows], kinds.get(name, pa.float32())) for name in names})
    waiting = path.with_suffix(".waiting")
    pq.write_table(table, waiting, compression="zstd")
    waiting.replace(path)
