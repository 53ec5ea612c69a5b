"""What a strategy works on in a fit: the deltas, the Fisher, and draws over which losses are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lightning_unlearn.data.targets import Target
from lightning_unlearn.draws.unlearning_draws import DrawBatch, real_batches
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.strategies import Problem, Strategy
from lightning_unlearn.unlearning.fixed_draws import FixedDraws
from lightning_unlearn.weights.deltas import DeltaStore, NetworkLoss
from lightning_unlearn.weights.parameters import layer_parameters, layer_specs

# Of the samples to score, where a strategy asks for their mean loss; once a run, however many queries there are.
DATA_DRAWS = 64


def problem_of(
    strategy: Strategy,
    deltas: DeltaStore,
    layers: Mapping[str, nn.Module],
    fisher: Fisher | None,
    targets: Sequence[Target],
    fixed: FixedDraws,
) -> Problem:
    """What a strategy works on.

    Args:
        strategy: The strategy.
        deltas: Of the targets.
        layers: The chosen layers.
        fisher: Finalized; ``None`` if there is none and the strategy needs none.
        targets: The targets.
        fixed: Measures their losses.

    Returns:
        The problem.
    """
    squares = [parameter.detach().double().square().sum() for parameter in layer_parameters(layers).values()]
    return Problem(
        deltas=deltas.named(),
        layers={name: list(spec.parameter_shapes) for name, spec in layer_specs(layers).items()},
        given_fisher=fisher,
        targets=deltas.targets,
        members=[[query.key for query in target.members] for target in targets],
        losses=fixed.target_losses,
        others=fixed.other_losses if strategy.needs_samples else None,
        data_loss=fixed.data_loss,
        weights_length=float(sum(square.item() for square in squares) ** 0.5),
        untrained=fixed.untrained_losses,
        agreed=fixed.agreed,
    )


def fixed_draws(
    strategy: Strategy,
    loss: NetworkLoss,
    targets: Sequence[Target],
    datamodule: Any,
    seed: int,
    draws: int,
    trainer: Trainer,
) -> FixedDraws:
    """Measures losses of the targets, and of real samples where the strategy needs them.

    Args:
        strategy: The strategy.
        loss: The network with its objective.
        targets: The targets.
        datamodule: With ``real_samples`` where the strategy needs them.
        seed: Of the draws.
        draws: How many of each query.
        trainer: For ranks and the sums over them.

    Returns:
        What measures.
    """
    size = getattr(datamodule, "draw_batch_size", draws)
    others: list[DrawBatch] = []
    if strategy.needs_samples:
        count = DATA_DRAWS if strategy.needs_data_loss else draws
        samples = datamodule.real_samples("others", seed).take(0, count)
        batches = real_batches("others", seed, samples, 0, trainer.global_rank, trainer.world_size, size)
        others = [part for batch in batches for part in batch.parts()]
    return FixedDraws(loss, targets, others, seed, draws, size, trainer)
