"""How far the answers for the sample model stay what they are where they take less memory or time.

That is with weights in bfloat16, layers that are computed twice, compiled scoring, and scoring in bfloat16.

    python benchmarks/lower_precision.py --work runs/lower_precision -- --model.init_args.views.timesteps 2

Attributes the shipped queries to all 544 samples by unlearning, once as ever and once each way. Prints the least rank
correlation of a query's scores with those of float32, and of its ten best how many are the same; where the command
refuses, what it says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import CONFIGS

from lightning_unlearn.scores.files import read_scores

WAYS = {
    "float32": [],
    "weights in bfloat16": ["--model.init_args.dtype", "bfloat16"],
    "checkpointed": ["--model.init_args.checkpointing", "true"],
    "compiled": ["--model.init_args.compile", "true"],
}
BEST = 10


def attributed(output: Path, options: list[str]) -> float:
    """Attribute into a folder; the seconds it took."""
    command = [sys.executable, "-m", "lightning_unlearn", "attribute", "--config", str(CONFIGS / "sample.yaml")]
    started = time.perf_counter()
    subprocess.run(
        [*command, "--method", "unlearning", "--output", str(output), *options], check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def refused(checkpoint: Path, output: Path, options: list[str]) -> str:
    """What scoring in bfloat16 says, or that it was taken."""
    command = [sys.executable, "-m", "lightning_unlearn", "predict", "--config", str(CONFIGS / "sample.yaml")]
    writer = ["--trainer.callbacks+=ScoreWriter", f"--trainer.callbacks.folder={output}"]
    more = ["--ckpt_path", str(checkpoint), "--trainer.precision", "bf16-mixed", *writer, *options]
    ended = subprocess.run([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return ended.stderr.strip().splitlines()[-1] if ended.returncode else "taken"


def main() -> None:
    """Run all, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/lower_precision"))
    parser.add_argument("options", nargs="*", help="more options of `lightning-unlearn attribute`, after --")
    arguments = parser.parse_args()
    seconds, tables = {}, {}
    for name, options in WAYS.items():
        output = arguments.work / name.replace(" ", "-")
        seconds[name] = attributed(output, [*options, *arguments.options])
        tables[name] = read_scores(output)
    first = tables["float32"]
    for name, table in tables.items():
        assert (table.keys, table.queries) == (first.keys, first.queries)
        least, same = 1.0, BEST
        for ours, theirs in zip(table.scores.T, first.scores.T, strict=True):
            places, others = np.argsort(-ours), np.argsort(-theirs)
            least = min(least, float(np.corrcoef(np.argsort(places), np.argsort(others))[0, 1]))
            same = min(same, len({*places[:BEST]} & {*others[:BEST]}))
        print(f"{name:20} rank correlation at least {least:.5f}, {same} of {BEST} best; {seconds[name]:.0f} s")
    print(
        "bf16-mixed           "
        + refused(arguments.work / "float32" / "deltas.ckpt", arguments.work / "bf16", arguments.options)
    )


if __name__ == "__main__":
    main()
