"""The losses of a batch of samples under θ₀ and under every target's weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.draws.views import View, Views
from lightning_unlearn.weights.deltas import DeltaStore, NetworkLoss

# Views are held in memory for this many at a time, so that weights are added up once for several calls.
VIEWS_AT_ONCE = 16
# So many samples are scored in float32, too, where scores are computed in another way.
COMPARED = 20


@dataclass(frozen=True)
class Deviations:
    """The losses of a batch of samples under θ₀ and under each target's weights.

    Attributes:
        batch: The samples, with the markers of their shard.
        base: ``(B, flips, captions, draws)`` losses under θ₀; NaN where a sample has no such caption.
        unlearned: ``(Q, B, flips, captions, draws)`` losses under θ₀ + δ.
        exact: Of the first batches, under autocast or compiled, both in float32:
            ``(1 + Q, B, flips, captions, draws)``, base first.
        computed_in: How the losses were computed, in words.
    """

    batch: SampleBatch
    base: Tensor
    unlearned: Tensor
    exact: Tensor | None = None
    computed_in: str = ""

    def to(self, device: torch.device) -> Deviations:
        """The losses on ``device``; Lightning calls this for what ``predict`` returns where no ScoreWriter takes it.

        Args:
            device: Where to.

        Returns:
            New deviations.
        """
        return replace(
            self, batch=self.batch.to(device), base=self.base.to(device), unlearned=self.unlearned.to(device)
        )


def measure_losses(
    loss: NetworkLoss, deltas: DeltaStore, views: Views, batch: SampleBatch, device: torch.device
) -> Tensor:
    """Losses of all views of a batch; base losses are computed once for all targets.

    Args:
        loss: The network with its objective.
        deltas: Of ``Q`` targets.
        views: Which views.
        batch: ``B`` samples; may be empty.
        device: Where the network is.

    Returns:
        ``(1 + Q, B, flips, captions, draws)`` float64 on the CPU, θ₀ first; NaN where a sample has no such caption.
    """
    captions = views.caption_slots(batch) if len(batch) else 0
    size = (1 + len(deltas.targets), len(batch), 1 + views.flips, captions, views.draws)
    losses = torch.full(size, torch.nan, dtype=torch.float64)
    if len(batch) == 0:
        return losses
    stacked = deltas.named()
    stream = views.of(batch, loss.objective.num_timesteps, loss.objective.density())
    while chunk := [cast_view(view, device, loss.dtype) for view in islice(stream, VIEWS_AT_ONCE)]:
        for target in range(-1, len(deltas.targets)):
            weights = {} if target < 0 else loss.target_weights(stacked, target)
            # Copied to the CPU once a target: a copy waits for the device.
            measured = [loss.under(weights, view.batch, view.timesteps, view.noise) for view in chunk]
            sizes = [len(values) for values in measured]
            for view, values in zip(chunk, torch.split(torch.cat(measured).cpu().double(), sizes), strict=True):
                losses[1 + target, view.rows, view.flip, view.caption, view.draw] = values
    return losses


def measured(losses: Tensor, caption_counts: Tensor) -> Tensor:
    """Which samples have a finite loss on each view they have.

    NaN stands for captions that a sample lacks, and means over views leave it out; a loss that is NaN must not slip
    through so.

    Args:
        losses: ``(K, B, flips, captions, draws)``, for instance under ``K`` weights.
        caption_counts: ``(B,)``.

    Returns:
        ``(B,)`` bool.
    """
    slots = torch.arange(losses.shape[-2])
    absent = (slots >= caption_counts.cpu()[:, None])[:, None, :, None]  # (B, 1, captions, 1)
    return (losses.isfinite() | absent).transpose(0, 1).flatten(1).all(1)


def cast_view(view: View, device: torch.device, dtype: torch.dtype) -> View:
    """A view where the network is, in the network's type.

    Args:
        view: On any device.
        device: The network's.
        dtype: The network's.

    Returns:
        A new view; rows stay where they are.
    """
    return replace(
        view,
        batch=view.batch.to(device, dtype),
        timesteps=view.timesteps.to(device),
        noise=view.noise.to(device, dtype),
    )
