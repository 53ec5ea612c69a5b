"""The draws that a target is unlearned with, of itself and of real samples, dealt to ranks by their numbers."""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.data.batches import form_of
from lightning_unlearn.data.conditions import Conditions, cast_conditions, chosen_caption, stack_conditions
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.draws.views import place_timesteps
from lightning_unlearn.fingerprints import generator_for, seed_of

Stream = Literal["unlearning", "rise", "evaluation", "real", "others"]
RealStream = Literal["real", "others"]


# Not frozen: a Trainer's precision plugin may only convert the tensors of a dataclass that isn't.
@dataclass
class DrawBatch:
    """Some (timestep, noise) draws of one query, or of real samples, by their numbers.

    Attributes:
        target: Number of the target in the run.
        key: Of the query that it is, or that belongs to it; draws are keyed by it. Empty for real samples, whose draws
            are keyed by their numbers alone.
        latents: ``(b, C, H, W)``.
        conditions: What else the network is given, name to ``(b, …)``.
        numbers: ``b`` numbers of draws.
        weights: ``(b,)`` 1, or 0 for draws that only fill up a rank's share.
        total: Draws a step, over all ranks.
        mask: ``(b, H, W)``, or ``None`` if all of the picture is unlearned.
        real: Whether they are of real samples, one a draw, which are to be kept.
        others: The rest of a batch of real samples, those of other forms: batches are as many on every rank, whatever
            samples they hold.
    """

    target: int
    key: str
    latents: Tensor
    conditions: Conditions
    numbers: list[int]
    weights: Tensor
    total: int
    mask: Tensor | None = None
    real: bool = False
    others: tuple[DrawBatch, ...] = ()

    def parts(self) -> list[DrawBatch]:
        """The draws of the batch, those of each form by themselves.

        Returns:
            Batches without others.
        """
        return [replace(self, others=()), *self.others]

    def to(self, device: torch.device) -> DrawBatch:
        """The batch with its tensors on ``device``; Lightning calls this.

        Args:
            device: Where to.

        Returns:
            A new batch.
        """
        return replace(
            self,
            latents=self.latents.to(device),
            conditions=cast_conditions(self.conditions, device),
            weights=self.weights.to(device),
            mask=None if self.mask is None else self.mask.to(device),
            others=tuple(other.to(device) for other in self.others),
        )


def draw_batches(
    sample: Sample, target: int, first: int, total: int, rank: int, world_size: int, batch_size: int
) -> list[DrawBatch]:
    """One rank's share of a step's draws of a query, in batches; the same number of batches on every rank.

    Rank ``r`` takes the draws ``first + r``, ``first + r + world_size``, … Draw ``n`` takes caption ``n`` modulo their
    number, or, where captions have shares in training, one drawn by these and ``n``.

    Args:
        sample: The target's picture, or one of them.
        target: The target's number.
        first: Number of the step's first draw.
        total: Draws of the step.
        rank: This process.
        world_size: How many there are.
        batch_size: Draws a batch.

    Returns:
        The batches; the last draws of a rank with too few of them have weight 0.
    """
    places, weights = _share(total, rank, world_size)
    batches = []
    for start in range(0, len(places), batch_size):
        chunk = [first + place for place in places[start : start + batch_size]]
        captions = [
            _caption(sample, number % len(sample.captions), "unlearning", sample.key, number) for number in chunk
        ]
        batches.append(
            DrawBatch(
                target=target,
                key=sample.key,
                latents=sample.latent.expand(len(chunk), *sample.latent.shape),
                conditions=chosen_caption(sample.conditions, captions),
                numbers=chunk,
                weights=weights[start : start + batch_size],
                total=total,
                mask=None if sample.mask is None else sample.mask.expand(len(chunk), *sample.mask.shape),
            )
        )
    return batches


def real_batches(
    stream: RealStream,
    seed: int,
    samples: Sequence[Sample],
    first: int,
    rank: int,
    world_size: int,
    batch_size: int,
) -> list[DrawBatch]:
    """One rank's share of a step's draws of real samples, in batches; as :func:`draw_batches`, but a sample a draw.

    Args:
        stream: ``"real"`` for gradients, ``"others"`` for the loss of everything else before and after.
        seed: Of all draws; the caption of draw ``n`` is drawn by it, the stream's name and ``n``.
        samples: Of the step's draws, in their order.
        first: Number of the step's first draw.
        rank: This process.
        world_size: How many there are.
        batch_size: Draws a batch.

    Returns:
        The batches, of target 0; the last draws of a rank with too few of them have weight 0.
    """
    places, weights = _share(len(samples), rank, world_size)
    batches = []
    for start in range(0, len(places), batch_size):
        chunk = places[start : start + batch_size]
        numbers = [first + place for place in chunk]
        forms: dict[str, list[DrawBatch]] = {}
        for place, number, weight in zip(chunk, numbers, weights[start : start + batch_size], strict=True):
            sample = samples[place]
            anyone = seed_of(stream, "caption", seed, number) % len(sample.captions)
            caption = _caption(sample, anyone, stream, "share", seed, number)
            one = DrawBatch(
                target=0,
                key="",
                latents=sample.latent[None],
                conditions=chosen_caption(sample.conditions, [caption]),
                numbers=[number],
                weights=weight[None],
                total=len(samples),
                real=True,
            )
            forms.setdefault(form_of(sample), []).append(one)
        alike = [_joined(of_form) for of_form in forms.values()]
        batches.append(replace(alike[0], others=tuple(alike[1:])))
    return batches


def _caption(sample: Sample, anyone: int, *names: str | int) -> int:
    """The caption of a draw: any, or one by the captions' shares in training."""
    if sample.caption_weights is None:
        return anyone
    place = random.Random(seed_of(*names)).random()
    return min(bisect(list(accumulate(sample.caption_weights)), place), len(sample.captions) - 1)


def _joined(draws: Sequence[DrawBatch]) -> DrawBatch:
    """Draws of one form, one a batch, in one batch; text states that have a mask are padded."""
    conditions = stack_conditions([draw.conditions for draw in draws], [1] * len(draws))
    return replace(
        draws[0],
        latents=torch.cat([draw.latents for draw in draws]),
        conditions={name: array[:, 0] for name, array in conditions.items()},
        numbers=[number for draw in draws for number in draw.numbers],
        weights=torch.cat([draw.weights for draw in draws]),
    )


def _share(total: int, rank: int, world_size: int) -> tuple[list[int], Tensor]:
    """A rank's draws by their places in the step, filled up with the first one, and their weights."""
    places = [rank + world_size * turn for turn in range(-(-total // world_size))]
    weights = torch.tensor([float(place < total) for place in places])
    return [place if place < total else 0 for place in places], weights


def draw_for_target(
    stream: Stream,
    seed: int,
    key: str,
    numbers: Sequence[int],
    total: int,
    num_timesteps: int,
    shape: Sequence[int],
    density: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(timestep, noise) draws of a query or of real samples, each keyed by its number.

    Draw ``n`` of ``total`` lies in the stratum ``n mod total`` of the schedule; numbers from ``total`` on belong
    to later steps.

    Args:
        stream: ``"unlearning"`` for gradients, ``"rise"`` for the target's loss before and after, ``"evaluation"`` for
            its loss under retrained models; ``"real"`` and ``"others"`` as in :func:`real_batches`.
        seed: Of all draws.
        key: The query's, or empty.
        numbers: ``B`` numbers of draws.
        total: Draws a step.
        num_timesteps: Length of the training schedule.
        shape: ``(C, H, W)``.
        density: Of the objective, whose strata have equal probability; ``None`` for a uniform one.

    Returns:
        Timesteps ``(B,)`` int64 and noise ``(B, C, H, W)`` float32, on the CPU.
    """
    uniform, noise = [], []
    for number in numbers:
        generator = generator_for(stream, seed, key, number)
        place = torch.rand((), generator=generator, dtype=torch.float64)
        uniform.append((number % total + place) / total)
        noise.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
    timesteps = place_timesteps(torch.stack(uniform), (0.0, 1.0), num_timesteps, density)
    return timesteps, torch.stack(noise)
