"""How far scores of the sample model depend on what they must not depend on: batch sizes and the number of processes.

    python benchmarks/invariance.py --work runs/invariance

Attributes a few shipped queries by unlearning in one process with batches of 64, then with batches of 7 and of 1, and
in two processes, each from an unlearning of its own. Prints, for each, the largest difference of a score from the first
run's, in standard deviations of its query's scores, and the least rank correlation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from common import CONFIGS

from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable

RUNS = {
    "64": ["--data.init_args.batch_size", "64"],
    "7": ["--data.init_args.batch_size", "7", "--data.init_args.draw_batch_size", "7"],
    "1": ["--data.init_args.batch_size", "1"],
    "2 processes": ["--data.init_args.batch_size", "64", "--trainer.devices", "2", "--trainer.strategy", "ddp"],
}


def attributed(work: Path, name: str, options: list[str], more: list[str]) -> ScoreTable:
    """The scores of a run, which is made if it is not there."""
    output = work / name.replace(" ", "-")
    command = [sys.executable, "-m", "lightning_unlearn", "attribute", "--config", str(CONFIGS / "sample.yaml")]
    command += ["--method", "unlearning"]
    subprocess.run([*command, "--output", str(output), *options, *more], check=True, stdout=subprocess.DEVNULL)
    return read_scores(output)


def main() -> None:
    """Run all, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/invariance"))
    parser.add_argument("options", nargs="*", help="more options of `lightning-unlearn attribute`, after --")
    arguments = parser.parse_args()
    tables = {name: attributed(arguments.work, name, options, arguments.options) for name, options in RUNS.items()}
    first, *_ = tables.values()
    spread = first.scores.std(0)
    for name, table in tables.items():
        assert (table.keys, table.queries) == (first.keys, first.queries)
        apart = float((np.abs(table.scores - first.scores) / spread).max())
        pairs = zip(table.scores.T, first.scores.T, strict=True)
        least = min(float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]) for a, b in pairs)
        print(f"{name:12} {apart:.2g} of the spread, rank correlation at least {least:.7f}")


if __name__ == "__main__":
    main()
