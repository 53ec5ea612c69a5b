"""What a config of an attribution describes, found without loading a weight or making anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import instantiate_class
from torch import nn

from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.data.targets import targets_of
from lightning_unlearn.datamodules.reading import read_fields, read_samples
from lightning_unlearn.datamodules.sources import list_shards, with_facts
from lightning_unlearn.diffusion.adapters import TrainingRecord, load_adapter, objective_of_training
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.families import Family, family_of
from lightning_unlearn.diffusion.loading import network_without_weights
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.strategies import Newton, Strategy
from lightning_unlearn.weights.parameters import LayerSpec, layer_specs, select_layers

Found = TypeVar("Found")


@dataclass
class Plan:
    """What would be run.

    Attributes:
        network: On the meta device.
        family: ``None`` for a network that no family knows.
        objective: ``None`` where it can't be told.
        selection: The chosen weights' name or patterns.
        layers: The chosen layers; empty where they can't be told.
        adapter: What an adapter's file says of its training.
        shards: The training shards.
        sample: The first training sample.
        targets: How many queries or sets are unlearned.
        queries: How many queries these are of.
        views: Of scoring.
        strategy: Of unlearning.
        draws: A query and step.
        draw_batch_size: Draws a forward pass.
        batch_size: Samples a forward pass of scoring.
        rise_draws: Over which a query's loss is measured.
        fisher: The header of its file; ``None`` if there is none yet.
        missing: One sentence for each thing that stands in the way.
    """

    network: nn.Module | None = None
    family: Family | None = None
    objective: Objective | None = None
    selection: str | Sequence[str] = "text_kv"
    layers: dict[str, LayerSpec] = field(default_factory=dict)
    adapter: TrainingRecord | None = None
    shards: list[ShardInfo] = field(default_factory=list)
    sample: Sample | None = None
    targets: int = 0
    queries: int = 0
    views: Views = field(default_factory=Views)
    strategy: Strategy = field(default_factory=Newton)
    draws: int = 128
    draw_batch_size: int = 32
    batch_size: int = 64
    rise_draws: int = 64
    fisher: dict[str, Any] | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int | None:
        """How many training samples there are, where the manifests say it."""
        counts = [shard.samples for shard in self.shards]
        return sum(count for count in counts if count is not None) if counts and None not in counts else None

    def try_to(self, make: Callable[[], Found]) -> Found | None:
        """Make a part, or note why it can't be made.

        Args:
            make: Makes it.

        Returns:
            The part, or ``None``.
        """
        try:
            return make()
        except InputError as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return None


def plan_of(model: Namespace, data: Namespace) -> Plan:
    """What a config describes.

    Args:
        model: ``class_path`` and ``init_args`` of an UnlearningModule, as they are parsed.
        data: The same of an AttributionDataModule.

    Returns:
        The plan; what is missing stands in it.
    """
    plan = plan_of_model(model, data)
    add_shards(plan, data)
    _add_queries(plan, data.init_args)
    return plan


def plan_of_model(model: Namespace, data: Namespace) -> Plan:
    """What a config describes before there are shards.

    Args:
        model: As in :func:`plan_of`.
        data: As in :func:`plan_of`; its numbers alone are looked at.

    Returns:
        The plan without samples and queries.
    """
    ours, theirs = model.init_args, data.init_args
    plan = Plan(
        selection=ours.parameters,
        draws=theirs.draws,
        draw_batch_size=theirs.draw_batch_size,
        batch_size=theirs.batch_size,
        rise_draws=ours.rise_draws,
    )
    if ours.views is not None:
        plan.views = plan.try_to(partial(_made, ours.views, Views)) or plan.views
    if ours.strategy is not None:
        plan.strategy = plan.try_to(partial(_made, ours.strategy)) or plan.strategy
    _add_network(plan, ours)
    for name in ("weights", "adapter"):
        if ours[name] is not None and not Path(ours[name]).exists():
            plan.missing.append(f"There is no {name} file or folder {ours[name]}.")
    if isinstance(ours.fisher, str) and Path(ours.fisher).exists():
        plan.fisher = plan.try_to(partial(read_about, ours.fisher))
    return plan


def _add_network(plan: Plan, ours: Namespace) -> None:
    folder = ours.network if isinstance(ours.network, str) else None
    plan.network = plan.try_to(partial(_network, ours.network))
    if plan.network is None:
        return
    if ours.adapter is not None and Path(ours.adapter).exists():
        loaded = plan.try_to(partial(load_adapter, plan.network, ours.adapter, ours.merge))
        plan.adapter = loaded.training if loaded is not None else None
    if ours.objective is not None:
        plan.objective = plan.try_to(partial(_made, ours.objective))
    elif plan.adapter is not None:
        plan.objective = plan.try_to(partial(objective_of_training, folder, plan.adapter, plan.network))
    else:
        plan.objective = plan.try_to(partial(objective_of, folder, plan.network))
    plan.family = plan.try_to(partial(family_of, plan.network))
    if plan.objective is not None:
        plan.try_to(partial(plan.objective.check_network, plan.network))
    chosen = plan.try_to(partial(select_layers, plan.network, plan.selection))
    plan.layers = layer_specs(chosen) if chosen is not None else {}


def _network(said: str | Namespace) -> nn.Module:
    if isinstance(said, str):
        return network_without_weights(said)
    with torch.device("meta"):
        network = _made(said)
    if not isinstance(network, nn.Module):
        raise InputError(f"{said.class_path} makes no network.")
    return network.eval().requires_grad_(False)


def _made(said: Namespace, kind: type | None = None) -> Any:
    try:
        if kind is not None:
            return kind(**said.as_dict())
        return instantiate_class((), {"class_path": said.class_path, "init_args": _plain(said.get("init_args"))})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{getattr(said, 'class_path', kind)} can't be made of its settings ({error}).") from None


def _plain(settings: Namespace | None) -> dict[str, Any]:
    # A class among the settings of another one is made first.
    made = {} if settings is None else dict(vars(settings))
    return {name: _made(value) if _is_class(value) else _as_dict(value) for name, value in made.items()}


def _is_class(value: Any) -> bool:
    return isinstance(value, Namespace) and "class_path" in value


def _as_dict(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else value


def add_shards(plan: Plan, data: Namespace) -> None:
    """Add the training shards, and the first sample in them.

    Args:
        plan: Which gets them, or what is missing of them.
        data: As in :func:`plan_of`.
    """
    theirs = data.init_args
    found = plan.try_to(lambda: with_facts(list_shards(theirs.shards, allow_pipe=theirs.allow_pipe)))
    plan.shards = found or []
    if plan.shards:
        plan.sample = plan.try_to(partial(_first_sample, plan.shards[0]))


def _add_queries(plan: Plan, theirs: Namespace) -> None:
    queries = plan.try_to(lambda: _queries(theirs)) or []
    plan.queries = len(queries)
    plan.targets = len(plan.try_to(lambda: targets_of(queries, theirs.targets_by)) or [])


def _first_sample(shard: ShardInfo) -> Sample:
    for fields in read_fields(shard):
        return decode_sample(fields)
    raise InputError(f"Shard {shard.shown} holds no sample.")


def _queries(theirs: Namespace) -> list[Sample]:
    shards = list_shards(theirs.queries, allow_pipe=theirs.allow_pipe)
    queries = [query for shard in shards for query in read_samples(shard, masks=True)]
    wanted = set(theirs.query_keys or [query.key for query in queries])
    chosen = [query for query in queries if query.key in wanted]
    if not chosen:
        raise InputError(f"There is no query in {theirs.queries}; make some with `lightning-unlearn prepare`.")
    return chosen
