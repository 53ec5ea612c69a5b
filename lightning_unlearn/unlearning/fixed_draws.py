"""Losses over draws that stay the same: of targets, of an untrained network, and of everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.data.targets import Target
from lightning_unlearn.draws.unlearning_draws import DrawBatch, Stream, draw_batches, draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.weights.deltas import NetworkLoss


def draw_losses(
    loss: NetworkLoss, batch: DrawBatch, weights: Mapping[str, Tensor], stream: Stream, seed: int
) -> Tensor:
    """The loss of each draw.

    Args:
        loss: The network with its objective.
        batch: ``b`` draws.
        weights: Parameter name in the network to weight; the others are the network's own.
        stream: Of the draws.
        seed: Of the draws.

    Returns:
        ``(b,)``.
    """
    shape = batch.latents.shape[1:]
    length, density = loss.objective.num_timesteps, loss.objective.density()
    timesteps, noise = draw_for_target(stream, seed, batch.key, batch.numbers, batch.total, length, shape, density)
    views = ViewBatch(batch.latents, batch.conditions, batch.mask).to(loss.device, loss.dtype)
    return loss.under(weights, views, timesteps.to(loss.device), noise.to(views.latents))


class FixedDraws:
    """Measures mean losses over the same draws each time, summed over ranks; every rank must call it.

    Args:
        loss: The network with its objective.
        targets: ``Q`` targets, measured over the stream "rise".
        others: This rank's batches of real samples, measured over the stream "others"; empty if nobody asks for them.
        seed: Of the draws.
        draws: How many of each query.
        batch_size: Draws a forward pass.
        trainer: For ranks and the sums over them.
    """

    def __init__(
        self,
        loss: NetworkLoss,
        targets: Sequence[Target],
        others: Sequence[DrawBatch],
        seed: int,
        draws: int,
        batch_size: int,
        trainer: Trainer,
    ) -> None:
        self.loss = loss
        self.targets = targets
        self.others = others
        self.seed = seed
        self.draws = draws
        self.batch_size = batch_size
        self.trainer = trainer
        self._base: Tensor | None = None
        self._others_base: Tensor | None = None

    @torch.no_grad()
    def target_losses(self, deltas: Mapping[str, Tensor] | None, chosen: Tensor | None = None) -> Tensor:
        """Losses of targets; under θ₀ measured only once.

        Args:
            deltas: Parameter name to ``(Q, *parameter)``; ``None`` for θ₀.
            chosen: ``(Q,)`` bool, whose losses are measured under the deltas; ``None`` for all.

        Returns:
            ``(Q,)`` float64, NaN for those that are not chosen.
        """
        if deltas is not None:
            return self._measured(deltas, chosen, self._target_loss)
        if self._base is None:
            losses = [self._target_loss(number, {}) for number in range(len(self.targets))]
            self._base = self._reduced(torch.tensor(losses, dtype=torch.float64))
        return self._base

    def _target_loss(self, number: int, weights: Mapping[str, Tensor]) -> float:
        """This rank's part of a target's loss: a set's is the sum of its queries'."""
        batches = [batch for query in self.targets[number].members for batch in self._batches(query, number)]
        return sum(self._sum(self.loss, batch, weights, "rise") for batch in batches) / self.draws

    @torch.no_grad()
    def other_losses(self, deltas: Mapping[str, Tensor] | None, chosen: Tensor | None = None) -> Tensor:
        """The mean loss of the real samples under the weights of each target; under θ₀ measured only once.

        Args:
            deltas: Parameter name to ``(Q, *parameter)``; ``None`` for θ₀.
            chosen: ``(Q,)`` bool, under whose deltas it is measured; ``None`` for all.

        Returns:
            ``(Q,)`` float64, NaN for those that are not chosen.
        """
        if deltas is not None:
            return self._measured(deltas, chosen, self._others_loss)
        if self._others_base is None:
            loss = torch.tensor([self._others_loss(0, {})], dtype=torch.float64)
            self._others_base = self._reduced(loss).expand(len(self.targets))
        return self._others_base

    def _others_loss(self, number: int, weights: Mapping[str, Tensor]) -> float:
        """This rank's part of the real samples' mean loss."""
        return sum((self._sum(self.loss, batch, weights, "others") / batch.total for batch in self.others), 0.0)

    def _measured(
        self,
        deltas: Mapping[str, Tensor],
        chosen: Tensor | None,
        loss_of: Callable[[int, Mapping[str, Tensor]], float],
    ) -> Tensor:
        asked = torch.ones(len(self.targets), dtype=torch.bool) if chosen is None else chosen.cpu()
        sums = torch.zeros(len(self.targets), dtype=torch.float64)
        for number in torch.nonzero(asked).flatten().tolist():
            sums[number] = loss_of(number, self.loss.target_weights(deltas, number))
        return self._reduced(sums).where(asked, torch.nan)

    def data_loss(self) -> float:
        """The mean loss of the real samples under θ₀.

        Returns:
            A number.
        """
        return float(self.other_losses(None, None)[0])

    @torch.no_grad()
    def untrained_losses(self) -> dict[str, float]:
        """The mean loss of each query under a newly initialised network.

        Returns:
            Key to loss.

        Raises:
            InputError: If no network can be made anew like this one.
        """
        own = next(self.loss.network.parameters())
        # Not diffusers' own `to`, which warns of any type.
        network = nn.Module.to(newly_initialised(self.loss.network, self.seed), own.device, own.dtype)
        loss = NetworkLoss(network, self.loss.objective)
        queries = [query for target in self.targets for query in target.members]
        sums = [sum(self._sum(loss, batch, {}, "rise") for batch in self._batches(query, 0)) for query in queries]
        means = self._reduced(torch.tensor(sums, dtype=torch.float64) / self.draws)
        return dict(zip((query.key for query in queries), means.tolist(), strict=True))

    def _batches(self, query: Sample, number: int) -> list[DrawBatch]:
        places = (self.trainer.global_rank, self.trainer.world_size)
        return draw_batches(query, number, 0, self.draws, *places, self.batch_size)

    def _sum(self, loss: NetworkLoss, batch: DrawBatch, weights: Mapping[str, Tensor], stream: Stream) -> float:
        losses = draw_losses(loss, batch, weights, stream, self.seed).cpu().double()
        return float((losses * batch.weights.cpu()).sum())

    def agreed(self, numbers: Tensor) -> Tensor:
        """Numbers as the first rank has them; every rank must call it.

        Args:
            numbers: Of any shape, on any device.

        Returns:
            The same everywhere, in float64 on the CPU.
        """
        numbers = numbers.double().cpu()
        return numbers if self.trainer.world_size == 1 else self.trainer.strategy.broadcast(numbers)

    def _reduced(self, sums: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return sums
        device = next(self.loss.network.parameters()).device
        reduced = self.trainer.strategy.reduce(sums.to(device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.cpu()


def newly_initialised(network: nn.Module, seed: int) -> nn.Module:
    """A network of the same class and config that has learned nothing.

    Args:
        network: One of diffusers.
        seed: Of its weights; the same on every rank and device.

    Returns:
        The network, on the CPU, frozen and in eval mode.

    Raises:
        InputError: If it does not say how to make another one.
    """
    make, config = getattr(type(network), "from_config", None), getattr(network, "config", None)
    if make is None or not isinstance(config, Mapping):
        raise InputError(
            f"{type(network).__name__} has no config to make an untrained network from, so the loss of one can't be "
            "measured; give it to the strategy as null_loss."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("untrained", seed))
        made: nn.Module = make(config)
    return made.eval().requires_grad_(False)
