"""The command that says what a config describes, what it will take, and what is missing; it loads no weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.command_line.check_costs import Stage, sizes_of, stages_of
from lightning_unlearn.command_line.check_plan import Plan, plan_of
from lightning_unlearn.command_line.command_parts import BARE, many
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, one_sentence
from lightning_unlearn.data.conditions import shapes_of
from lightning_unlearn.datamodules.sources import read_manifest
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.disk import in_words
from lightning_unlearn.weights.parameters import SELECTIONS, layer_specs, select_layers

LABEL = 14


class CheckCLI(TrainerCLI):
    """Parses a config and makes nothing of it."""

    def instantiate_classes(self) -> None:
        """Nothing: a network's weights would be loaded."""


def check(arguments: list[str]) -> None:
    """Print what a config describes and what it will take.

    Args:
        arguments: Options.

    Raises:
        InputError: If something stands in the way; it was printed.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--passes", type=int, default=5, help="Of `fisher`, where there is no Fisher yet.")
        parser.add_argument("--output", type=str, default="attribution", help="Folder of the run, for its disk.")

    description = (
        "Say what the config of an attribution describes, what each stage takes in calls, memory and disk, and what is "
        "missing. No weights are loaded."
    )
    with quiet(steps=True), one_sentence():
        cli = CheckCLI("check", arguments, description, options, **BARE)
        config = cli.config
        names = {part: str(config[part] and config[part].class_path) for part in ("model", "data")}
        for part, name in (("model", "UnlearningModule"), ("data", "AttributionDataModule")):
            if not names[part].endswith(name):
                raise InputError(
                    f"This command takes an {name} as {part}, not {names[part]}; start from configs/sample.yaml."
                )
        plan = plan_of(config.model, config.data)
        for line in page(plan, config.passes, Path(config.output)):
            print(line)
    if plan.missing:
        raise InputError(f"{many(len(plan.missing), 'thing')} missing: {plan.missing[0]}")


def page(plan: Plan, passes: int, output: Path) -> Iterator[str]:
    """The page that a person reads.

    Args:
        plan: What would be run.
        passes: Of the Fisher.
        output: Where the run's folder will be.

    Yields:
        Lines.
    """
    yield from _model(plan)
    yield from _selections(plan)
    yield from _data(plan)
    if plan.network is not None and plan.objective is not None and plan.layers and plan.sample is not None:
        stages = plan.try_to(lambda: stages_of(plan, passes))
        yield from _stages(plan, stages or [], output)
    for sentence in plan.adapter.unfollowed() if plan.adapter is not None else ():
        yield _line("differs", sentence)
    for sentence in plan.missing:
        yield _line("missing", sentence)


def _line(label: str, text: str) -> str:
    return f"{label:{LABEL}}{text}"


def _model(plan: Plan) -> Iterator[str]:
    if plan.network is None:
        return
    numbers = sum(parameter.numel() for parameter in plan.network.parameters())
    dtype = str(next(plan.network.parameters()).dtype).removeprefix("torch.")
    title = plan.family.title if plan.family is not None else "no known family"
    yield _line("model", f"{title}: {type(plan.network).__name__}, {_number(numbers)} weights in {dtype}")
    if plan.objective is not None:
        yield _line("objective", f"{type(plan.objective).__name__}, {_facts(plan.objective.settings())}")
        density = plan.objective.density()
        drawn = "uniform" if density is None else "not uniform, as the objective says"
        yield _line("timesteps", f"{plan.objective.num_timesteps} of training, density {drawn}")


def _facts(settings: dict[str, Any]) -> str:
    plain = {"prediction_type": settings.get("scheduler", {}).get("prediction_type"), **settings}
    kept = {name: value for name, value in plain.items() if isinstance(value, str | int | float) and name != "class"}
    return ", ".join(f"{name} {value}" for name, value in kept.items()) or "no settings"


def _selections(plan: Plan) -> Iterator[str]:
    if plan.network is None:
        return
    for name in SELECTIONS:
        try:
            specs = layer_specs(select_layers(plan.network, name))
        except InputError:
            continue
        sizes = sizes_of(plan.network, specs)
        chosen = "  <- chosen" if name == plan.selection else ""
        yield _line(
            "weights",
            f"{name}: {many(len(specs), 'layer')}, {_number(sizes.delta // 4)} weights; a delta takes "
            f"{in_words(sizes.delta)}, the Fisher {in_words(sizes.fisher)}{chosen}",
        )
    if not isinstance(plan.selection, str):
        yield _line("weights", f"{many(len(plan.layers), 'layer')} by patterns  <- chosen")


def _data(plan: Plan) -> Iterator[str]:
    if plan.shards:
        samples = "an unknown number of samples" if plan.samples is None else many(plan.samples, "sample")
        yield _line("training data", f"{samples} in {many(len(plan.shards), 'shard')}")
        about = read_manifest(Path(plan.shards[0].url).parent) if Path(plan.shards[0].url).is_file() else {}
        if reading := about.get("reading"):
            yield _line("prepared", f"as {reading.get('layout')}, {_facts(reading.get('choices') or {})}")
    if plan.sample is not None:
        shapes = {"latent": tuple(plan.sample.latent.shape), **shapes_of(plan.sample.conditions)}
        yield _line("a sample", ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    if plan.queries:
        yield _line("queries", f"{many(plan.queries, 'query', 'queries')} in {many(plan.targets, 'target')}")


def _stages(plan: Plan, stages: list[Stage], output: Path) -> Iterator[str]:
    if plan.fisher is not None:
        yield _line("fisher", f"is there: {plan.fisher.get('kind', 'of some kind')}")
    for stage in stages:
        memory = "memory unknown" if stage.memory is None else f"some {in_words(stage.memory)} of the device"
        calls = f"{_number(stage.forward)} evaluations of a view"
        if stage.backward:
            calls += f" ({_number(stage.backward)} with a backward pass)"
        yield _line(stage.name, f"{calls}, {memory}, {in_words(stage.disk)} of disk")
    needed = sum(stage.disk for stage in stages)
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        plan.missing.append(f"The run takes {in_words(needed)} of disk, and {place} has {in_words(free)}.")


def _number(count: int) -> str:
    for size, name in ((10**9, "G"), (10**6, "M")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count:,}"
