"""What each stage of an attribution takes: calls of the network, memory of the device, disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_unlearn.command_line.check_memory import CallMemory, FusedAttention, bytes_of, call_memory
from lightning_unlearn.command_line.check_plan import Plan
from lightning_unlearn.data.conditions import chosen_caption
from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.kronecker import matrix_shape
from lightning_unlearn.unlearning.problem import DATA_DRAWS
from lightning_unlearn.weights.deltas import NetworkLoss
from lightning_unlearn.weights.parameters import LayerSpec, layer_parameters

Found = TypeVar("Found")
# Of a call without and with its backward pass.
CallsMemory = tuple[CallMemory | None, CallMemory | None]

FLOAT32 = 4
# How often the search of a step measures a target's losses: the median of both benches (benchmarks/RESULTS.md).
SEARCHED = 5
# Covariances while they are summed, and once more while their eigenvectors are found.
STATES_OF_FISHER = 2
# A row of a score table: keys and captions' counts beside the scores, as Parquet packs them.
BYTES_A_SCORE = 8


@dataclass(frozen=True)
class Stage:
    """One stage of the work.

    Attributes:
        name: What it is called.
        forward: Evaluations of a view's loss.
        backward: Those with a backward pass among them.
        memory: Bytes of the device at its peak, the network included; ``None`` where a call could not be measured.
        disk: Bytes of what it writes.
    """

    name: str
    forward: int
    backward: int
    memory: int | None
    disk: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of what lies on a device.

    Attributes:
        network: Weights and buffers.
        chosen: The chosen weights, in their own type.
        delta: One target's, float32.
        fisher: A finished EKFAC Fisher's.
    """

    network: int
    chosen: int
    delta: int
    fisher: int


def sizes_of(network: nn.Module, layers: dict[str, LayerSpec], inputs: dict[str, int] | None = None) -> Sizes:
    """What a network, a delta and a Fisher take.

    Args:
        network: On any device.
        layers: The chosen layers.
        inputs: Layer name to what it is fed; a Fisher keeps the basis of one input once. By default each has its own.

    Returns:
        Bytes.
    """
    numbers = sum(torch.Size(shape).numel() for spec in layers.values() for shape in spec.parameter_shapes.values())
    width = next(network.parameters()).element_size()
    matrices = {name: matrix_shape(spec) for name, spec in layers.items()}
    fed = {inputs.get(name, name) if inputs else name: i * i for name, (_, i) in matrices.items()}
    fisher = (sum(o * o + o * i for o, i in matrices.values()) + sum(fed.values())) * FLOAT32
    return Sizes(bytes_of([*network.parameters(), *network.buffers()]), numbers * width, numbers * FLOAT32, fisher)


def stages_of(plan: Plan, passes: int = 5, calls: CallsMemory | None = None) -> list[Stage]:
    """What each stage takes.

    Args:
        plan: With a network, an objective, chosen layers and a first sample.
        passes: Of the Fisher over the training samples.
        calls: What :func:`calls_memory` found, if it was asked already.

    Returns:
        Fisher, unlearning and scoring; without the Fisher if there is one.
    """
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    fed = inputs_of(plan.network, plan.objective, plan.sample, list(plan.layers))
    sizes = sizes_of(plan.network, plan.layers, fed)
    samples = plan.samples or 0
    forward, backward = calls or calls_memory(plan.network, plan.objective, plan.sample, list(plan.layers))
    stages = []
    if plan.fisher is None:
        held = sizes.network + STATES_OF_FISHER * sizes.fisher
        memory = None if backward is None else held + backward.of(plan.batch_size)
        # Beside the Fisher its file has the weights it was taken of.
        stages.append(Stage("fisher", samples * passes, samples * passes, memory, sizes.fisher + sizes.delta))
    stages.append(_unlearning(plan, sizes, backward))
    views = plan.views.draws * (1 + plan.views.flips)
    captions = len(plan.sample.captions)
    views *= captions if plan.views.captions is None else min(captions, plan.views.captions)
    held = sizes.network + sizes.chosen + plan.targets * sizes.delta
    memory = None if forward is None else held + forward.of(plan.batch_size)
    table = samples * plan.targets * BYTES_A_SCORE
    stages.append(Stage("scoring", samples * views * (1 + plan.targets), 0, memory, table))
    return stages


def _unlearning(plan: Plan, sizes: Sizes, backward: CallMemory | None) -> Stage:
    strategy = plan.strategy
    taken = (plan.queries * plan.draws + plan.targets * strategy.real_draws) * strategy.steps
    # Before the first step, and after each as often as its size is tried.
    tried = SEARCHED if strategy.searches else 1
    measured = plan.queries * plan.rise_draws * (1 + tried * strategy.steps)
    if strategy.needs_samples:
        measured += DATA_DRAWS * (1 + plan.targets * tried * strategy.steps)
    deltas = plan.targets * sizes.delta
    # The deltas and their gradients, the Fisher and its inverse eigenvalues, and the weights that one target has.
    held = sizes.network + 2 * deltas + sizes.fisher + sizes.delta + sizes.chosen
    memory = None if backward is None else held + backward.of(plan.draw_batch_size)
    return Stage("unlearning", taken + measured, taken, memory, deltas)


def calls_memory(network: nn.Module, objective: Objective, sample: Sample, layers: list[str]) -> CallsMemory:
    """What a call of the loss takes, without and with its backward pass.

    Args:
        network: On the meta device.
        objective: Its loss.
        sample: Whose shapes the calls have.
        layers: Names of the layers whose weights have gradients.

    Returns:
        Of a forward pass, and of both; ``None`` where the network's code can't be run without numbers.
    """
    measured = partial(_without_numbers, network, objective, sample, layers, call_memory)
    return measured(learns=False), measured(learns=True)


def view_flops(network: nn.Module, objective: Objective, sample: Sample) -> int | None:
    """The products and sums of a forward pass of one view.

    Args:
        network: On the meta device.
        objective: Its loss.
        sample: Whose shapes the view has.

    Returns:
        Their number; ``None`` where the network's code can't be run without numbers.
    """

    def counted(call: Callable[[int], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call(1)
        return int(counter.get_total_flops())

    return _without_numbers(network, objective, sample, [], counted, learns=False)


def _without_numbers(
    network: nn.Module,
    objective: Objective,
    sample: Sample,
    layers: list[str],
    measure: Callable[[Callable[[int], Any]], Found],
    *,
    learns: bool,
) -> Found | None:
    """Measure a call of the loss, made for a number of views on the meta device."""
    losses_of = {"loss": NetworkLoss(network, objective), "prediction": NetworkLoss(network, _Prediction())}
    chosen = layer_parameters({name: network.get_submodule(name) for name in layers})

    def call(views: int, *, what: str, place: str) -> Any:
        batch, noise = _views(network, sample, views)
        timesteps = torch.zeros(views, dtype=torch.int64, device=place)
        weights: dict[str, Tensor] = {}
        if learns:
            weights = {name: torch.empty_like(weight).requires_grad_() for name, weight in chosen.items()}
        with torch.set_grad_enabled(learns):
            losses = losses_of[what].under(weights, batch, timesteps, noise)
            if learns:
                losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses

    # Some losses look their timesteps up on the CPU, and some networks want them where they are themselves. A loss
    # adds next to nothing to what its network takes.
    for what, place in (("loss", "meta"), ("loss", "cpu"), ("prediction", "meta")):
        try:
            return measure(partial(call, what=what, place=place))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if isinstance(error, InputError) and what == "loss":
                raise
    return None


class _Prediction(Objective):
    """A loss that looks at no number."""

    num_timesteps = 1

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        prediction = family_of(network).predict(network, batch.latents, timesteps, batch)
        return prediction.float().square().flatten(1).mean(1)


def inputs_of(network: nn.Module, objective: Objective, sample: Sample, layers: list[str]) -> dict[str, int]:
    """Which layers are fed the same, as those are that only the text passes through.

    Args:
        network: On the meta device.
        objective: Its loss.
        sample: Whose shapes the call has.
        layers: Names of layers.

    Returns:
        Layer name to a number that stands for its input; empty where the network can't be run without numbers.
    """
    fed: dict[str, int] = {}
    held = []  # so that no two inputs have one address after each other

    def note(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        held.append(arguments[0])
        fed[name] = arguments[0].untyped_storage()._cdata

    handles = [network.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in layers]
    batch, noise = _views(network, sample, 1)
    try:
        for place in ("meta", "cpu"):
            with torch.no_grad(), FusedAttention(), suppress(RuntimeError, NotImplementedError, TypeError, ValueError):
                objective(network, batch, torch.zeros(1, dtype=torch.int64, device=place), noise)
                return fed
    finally:
        for handle in handles:
            handle.remove()
    return {}


def _views(network: nn.Module, sample: Sample, views: int) -> tuple[ViewBatch, Tensor]:
    dtype = next(network.parameters()).dtype
    meta = torch.device("meta")
    latents = sample.latent.expand(views, *sample.latent.shape)
    conditions = {
        name: array.expand(views, *array.shape) for name, array in chosen_caption(sample.conditions, 0).items()
    }
    batch = ViewBatch(latents, conditions).to(meta, dtype)
    return batch, torch.empty_like(batch.latents)
