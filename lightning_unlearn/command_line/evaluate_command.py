"""The command that trains models again, without some of their samples."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.command_line.command_parts import BARE, make_folder, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.retraining_cli import RetrainingCLI, study_of
from lightning_unlearn.command_line.trainer_cli import one_sentence
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.datamodules.reading import read_fields, read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Retrainer, Study
from lightning_unlearn.evaluation.judging import judge
from lightning_unlearn.evaluation.plan import Design, plan
from lightning_unlearn.evaluation.retraining import Share
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable

RESULTS_FILE = "results.json"


def evaluate(arguments: list[str]) -> None:
    """Train models without some samples, and judge score tables by what these can still make of the queries.

    Args:
        arguments: Options.

    Raises:
        InputError: If queries are missing.
    """
    place, places = array_place()

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--queries", type=str | list[str], help="The queries, in shards, as in `attribute`.")
        parser.add_argument("--study", type=str, default="study", help="Folder of the finished models' numbers.")
        parser.add_argument(
            "--scores", type=dict[str, str], default={}, help="Methods that are judged: name to the folder of its run."
        )
        parser.add_argument("--design", type=Design, default=Design(), help="How many models of each kind.")
        parser.add_argument("--draws", type=int, default=80, help="(timestep, noise) pairs of a query's loss.")
        parser.add_argument(
            "--encoder", type=str | None, default=None, help="Dotted name of an image encoder, for cosines."
        )
        parser.add_argument(
            "--decoder", type=str | None, default=None, help="Dotted name of what makes pictures from latents."
        )
        parser.add_argument("--target", type=str, default="network", help="Dotted name of the network in the module.")
        parser.add_argument(
            "--objective", type=Objective | None, default=None, help="The loss; by default the module's own."
        )
        parser.add_argument(
            "--index", type=int, default=place, help="Which share of the models this process trains, from 0."
        )
        parser.add_argument("--count", type=int, default=places, help="In how many shares they are dealt.")
        parser.add_argument("--list", type=bool, default=False, help="Only say what is missing, and how long it takes.")
        parser.add_argument(
            "--weights", type=str | None, default=None, help="Folder to keep the trained networks' weights in."
        )

    description = "Train models again without some samples, and judge score tables by them; what is finished is kept."
    with quiet(steps=True), one_sentence():
        cli = RetrainingCLI("evaluate", arguments, description, options, **BARE)
        config = cli.config
        share = Share(config.index, config.count)
        if config.queries is None:
            raise InputError("The queries are missing; give the shards that were attributed, --queries FOLDER.")
        keys, queries = _read_keys(cli.training_data()), _read_queries(config.queries, cli.training_data())
        tables = {name: _read_table(folder, keys, queries) for name, folder in config.scores.items()}
        objective = cli.config_init.objective
        measuring = {"draws": config.draws, "encoder": config.encoder, "decoder": config.decoder}
        study, measure = study_of(cli, Path(config.study), queries, config.target, objective, **measuring)
        needed = plan(cli.config_init.design, keys, [query.key for query in queries], tables)
        say(outlook(study, needed.runs(), share))
        if not config.list:
            kept = Path(config.weights) if config.weights is not None else None
            if kept is not None:
                make_folder(kept)
            retrainer = Retrainer(lambda run: cli.build(run, keys), measure, study, config.target, objective, kept)
            retrainer.train(needed.runs(), share)
        left = study.missing(needed.runs())
        if left:
            many = "1 model is" if len(left) == 1 else f"{len(left)} models are"
            say(f"{many} still missing; the results come when all are there: run this command again.")
            return
        results = judge(study, needed, tables, [query.key for query in queries])
        write_atomically(study.folder / RESULTS_FILE, json.dumps(results.to_json(), indent=1).encode() + b"\n")
        say(results.to_text())
        say(f"Results: {study.folder / RESULTS_FILE}")


def array_place() -> tuple[int, int]:
    """This process's place in a SLURM array, and how many there are; alone where there is none.

    Returns:
        Both; for numbers at uneven distances (``--array=1,2,7``) the place may be none of so many.
    """
    names = ("ID", "MIN", "STEP", "COUNT")
    values = [os.environ.get(f"SLURM_ARRAY_TASK_{name}", default) for name, default in zip(names, "0011", strict=True)]
    number, first, step, count = map(int, values)
    return (number - first) // max(step, 1), count


def outlook(study: Study, runs: Sequence[Run], share: Share) -> str:
    """How many models are finished and missing, and how long the rest takes.

    Args:
        study: Where they are kept.
        runs: All models.
        share: This process's place.

    Returns:
        A sentence or two.
    """
    missing, mine = study.missing(runs), study.missing(share.of(runs))
    said = f"{len(set(runs))} models: {len(set(runs)) - len(missing)} finished, {len(missing)} missing"
    if share.count > 1:
        said += f", {len(mine)} of them this process's (share {share.index} of {share.count})"
    seconds = study.typical_seconds()
    if mine and seconds is not None:
        said += f"; about {duration(seconds * len(mine))}, {duration(seconds)} each"
    elif mine:
        said += "; the first one will show how long they take"
    return said + "."


def duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: Its length.

    Returns:
        E.g. ``"2 h 05 min"``.
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _read_keys(data: TrainingDataModule) -> list[str]:
    """All training keys, sorted."""
    if data.keys is not None:
        raise InputError("The config trains on chosen keys already; leave `keys` out of what is evaluated.")
    shards = list_shards(data.shards, allow_pipe=data.allow_pipe)
    keys = sorted(fields["__key__"] for shard in shards for fields in read_fields(shard))
    twice = [first for first, second in pairwise(keys) if first == second]
    if twice:
        raise InputError(f"The key {twice[0]!r} stands twice in the training shards; keys must be unique.")
    return keys


def _read_queries(shards: str | list[str], data: TrainingDataModule) -> list[Sample]:
    infos = sorted(list_shards(shards, allow_pipe=data.allow_pipe), key=lambda info: info.url)
    return [sample for shard in infos for sample in read_samples(shard, masks=True)]


def _read_table(folder: str, keys: Sequence[str], queries: Sequence[Sample]) -> ScoreTable:
    table = read_scores(folder)
    if any("members" in target for target in table.run.get("targets", {}).values()):
        raise InputError(
            f"The scores in {folder} are of sets of queries, but models are measured on one query at a time; attribute "
            "without targets_by."
        )
    missing = [query.key for query in queries if query.key not in table.queries]
    if missing:
        raise InputError(f"The scores in {folder} are not of the query {missing[0]!r}; attribute the same queries.")
    if table.keys != list(keys):
        raise InputError(
            f"The scores in {folder} are of {len(table.keys)} samples, but the shards hold {len(keys)} others; "
            "score the same shards."
        )
    return table
