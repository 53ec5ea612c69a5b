"""The benches: a model, its queries, many models trained again without some pictures, and every method judged by them.

    python benchmarks/bench.py digits base       # train the model once, make the queries, take the Fisher
    python benchmarks/bench.py digits retrain    # train it again without some pictures; --index 0 --count 2 for half
    python benchmarks/methods.py digits          # score with every method, then …
    python benchmarks/bench.py digits removals   # … train it again without the pictures that each method names
    python benchmarks/bench.py digits pack       # take what is finished into one file, study/models.parquet

Models are trained many at once (stacked.py), or one after the other by Lightning with --together 1.

Everything can be stopped and started again; what is finished is kept in the bench's folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base_model import make_base
from benches import Bench, bench_parser, measuring
from judged import removal_runs
from packed import is_packed, open_study, pack
from stacked import Stacks, retrain_stacked

from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.retraining_cli import study_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Retrainer, Run
from lightning_unlearn.evaluation.retraining import Share
from lightning_unlearn.evaluation.study import differences, read_settings


def retrain(bench: Bench, runs: Sequence[Run], share: Share, how: Any) -> None:
    """Train what is missing of this process's share, one after the other or many at once."""
    cli = bench.cli()
    keys = [sample.key for sample in bench.samples("shards")]
    queries = bench.samples("queries")
    before = read_settings(bench.folder / "study")
    if before is not None and is_packed(bench):
        # A study knows of its own files only, and writes its settings where it finds none: ask one in another folder.
        with tempfile.TemporaryDirectory() as folder:
            settings = study_of(cli, Path(folder), queries, **measuring(bench))[0].settings
        if differences(json.loads(json.dumps(settings)), before):
            raise InputError(
                f"The models of {bench.folder} are of another recipe or other queries; remove its study first."
            )
    study, measure = study_of(cli, bench.folder / "study", queries, **measuring(bench))
    left = open_study(bench).missing(share.of(runs))
    if how.together > 1:
        retrain_stacked(bench, cli, study, left, how)
    else:
        Retrainer(lambda run: cli.build(run, keys), measure, study).train(left)


def main() -> None:
    """Run a step."""
    parser = bench_parser(__doc__)
    parser.add_argument("step", choices=("base", "retrain", "removals", "pack"))
    parser.add_argument("--methods", nargs="+", help="whose removals; those of bench.yaml by default")
    parser.add_argument("--index", type=int, default=0, help="which share of the models this process trains")
    parser.add_argument("--count", type=int, default=1, help="in how many shares they are dealt")
    parser.add_argument("--together", type=int, default=16, help="how many are trained in one stack (stacked.py)")
    parser.add_argument("--device", default="cpu", help="where stacks are trained")
    parser.add_argument("--recorders", type=int, default=0, help="processes that draw what is random for stacks")
    arguments = parser.parse_args()
    bench, share = Bench(arguments.bench), Share(arguments.index, arguments.count)
    how = Stacks(arguments.together, arguments.device, arguments.recorders)
    with quiet(steps=True):
        if arguments.step == "base":
            make_base(bench)
        elif arguments.step == "pack":
            pack(bench)
        elif arguments.step == "retrain":
            retrain(bench, bench.plan().runs(), share, how)
        else:
            runs = removal_runs(bench, arguments.methods)
            retrain(bench, runs, share, how)


if __name__ == "__main__":
    main()
