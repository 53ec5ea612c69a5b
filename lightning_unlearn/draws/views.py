"""Which views a sample is scored on, and their noise, as a pure function of a seed.

A view is one evaluation of a sample's loss: a caption, a flip, a timestep and a noise. Everything is drawn on the CPU
and keyed by names, so that batches, workers, ranks, the order of shards or a restart can't change it. Unlearning draws
and scoring views come from streams with different names, of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_unlearn.data.samples import SampleBatch, ViewBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for


@dataclass(frozen=True)
class View:
    """One view of all samples of a batch that have it.

    Attributes:
        flip: 0, or 1 for the mirrored picture.
        caption: Number of the caption.
        draw: Number of the (timestep, noise) pair among those that are scored.
        rows: ``(b,)`` which samples of the batch have it.
        batch: Their latents and texts.
        timesteps: ``(b,)``.
        noise: ``(b, C, H, W)``.
    """

    flip: int
    caption: int
    draw: int
    rows: Tensor
    batch: ViewBatch
    timesteps: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Views:
    """The views of every sample: strata of the schedule × noises × captions × flips.

    Args:
        timesteps: Strata of the schedule, of equal probability in training; one timestep is drawn in each, the same for
            all samples.
        timestep_range: Part of the schedule that is used, as shares of its length: (0, 1) is all of it.
        noises: (timestep, noise) draws in each stratum.
        noise: ``"shared"``: all samples see the same draws; ``"per_sample"``: each sample its own.
        captions: How many of a sample's captions are used, from the first; all by default.
        flips: Whether the mirrored picture is scored too.
        seed: Of all draws.
        every: Of all these draws only each so manyth is scored, the middle one of each run of them: few of the very
            views that all samples would have. It divides the number of draws.

    Raises:
        InputError: If a number is out of range.
    """

    timesteps: int = 8
    timestep_range: tuple[float, float] = (0.0, 1.0)
    noises: int = 1
    noise: Literal["shared", "per_sample"] = "shared"
    captions: int | None = None
    flips: bool = False
    seed: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        low, high = self.timestep_range
        if (
            self.timesteps < 1
            or self.noises < 1
            or not 0 <= low < high <= 1
            or (self.captions is not None and self.captions < 1)
        ):
            raise InputError(
                "Views need at least one timestep, noise and caption, and a timestep_range within 0 and 1 "
                f"that is not empty; got {asdict(self)}."
            )
        if self.noise not in ("shared", "per_sample"):
            raise InputError(f"noise must be 'shared' or 'per_sample', not {self.noise!r}.")
        if self.every < 1 or self.timesteps * self.noises % self.every:
            raise InputError(
                f"Each {self.every}th of {self.timesteps * self.noises} draws can't be taken; choose an every that "
                "divides them."
            )

    @property
    def numbers(self) -> range:
        """Which of all (timestep, noise) pairs of each caption and flip are scored."""
        return range(self.every // 2, self.timesteps * self.noises, self.every)

    @property
    def draws(self) -> int:
        """How many these are."""
        return len(self.numbers)

    @property
    def noises_scored(self) -> int:
        """Draws of each stratum that are scored, where all have the same number; 1 where they have not."""
        return 1 if self.noises % self.every else self.noises // self.every

    def fewer(self, every: int) -> Views:
        """Only some of these draws.

        Args:
            every: Each so manyth, or more of them where that does not divide them.

        Returns:
            New views.

        Example:
            >>> Views(timesteps=6).fewer(4).draws
            2
        """
        divisor = max(number for number in range(1, every + 1) if self.draws % number == 0)
        return replace(self, every=self.every * divisor)

    def settings(self) -> dict[str, Any]:
        """The views as JSON, for fingerprints.

        Returns:
            All fields; ``every`` only where it leaves draws out, as tables of all draws have always been without it.
        """
        settings = {**asdict(self), "timestep_range": list(self.timestep_range)}
        if self.every == 1:
            del settings["every"]
        return settings

    def draw_timesteps(self, num_timesteps: int, density: Tensor | None = None) -> Tensor:
        """The timestep of each draw: as training drew them, in its stratum.

        Args:
            num_timesteps: Length of the training schedule.
            density: Of the objective, whose strata have equal probability; ``None`` for a uniform one.

        Returns:
            ``(draws,)`` int64; draw ``d`` of all lies in stratum ``d // noises``.
        """
        whole = self.timesteps * self.noises
        uniform = torch.rand(whole, generator=generator_for("scoring-timesteps", self.seed), dtype=torch.float64)
        strata = torch.arange(whole) // self.noises
        places = ((strata + uniform) / self.timesteps)[list(self.numbers)]
        return place_timesteps(places, self.timestep_range, num_timesteps, density)

    def draw_noise(self, keys: Sequence[str], shape: Sequence[int], flip: int, caption: int, draw: int) -> Tensor:
        """The noise of one view.

        Args:
            keys: ``B`` sample keys.
            shape: ``(C, H, W)``.
            flip: Of the view.
            caption: Of the view.
            draw: Of the view, its number among all.

        Returns:
            ``(B, C, H, W)`` float32 on the CPU.
        """
        view = ("scoring", self.seed, flip, caption, draw)
        if self.noise == "shared":
            return _normal(shape, *view).expand(len(keys), *shape)
        return torch.stack([_normal(shape, *view, key) for key in keys])

    def of(self, batch: SampleBatch, num_timesteps: int, density: Tensor | None = None) -> Iterator[View]:
        """The views of a batch, on the batch's device and in its dtype.

        Args:
            batch: ``B`` samples.
            num_timesteps: Length of the training schedule.
            density: Of the objective.

        Yields:
            Flips, in them captions, in them draws.

        Raises:
            InputError: If flips are asked for and the batch has none.
        """
        if self.flips and batch.latents_flip is None:
            raise InputError(
                "Flips are scored, but the shards hold no latent_flip.npy; prepare them with flips, or set flips "
                "to false."
            )
        timesteps = self.draw_timesteps(num_timesteps, density).to(batch.latents.device)
        for flip in range(1 + self.flips):
            latents = batch.latents_flip if flip else batch.latents
            assert latents is not None
            for caption in range(self.caption_slots(batch)):
                rows = (batch.caption_counts > caption).nonzero()[:, 0].cpu()
                keys = [batch.keys[row] for row in rows.tolist()]
                # Indexing copies, and nearly always all samples have the caption.
                place = rows.to(latents.device)
                every = len(rows) == len(batch)
                views = batch.views(place, torch.full_like(place, caption), latents if every else latents[place])
                for draw, number in enumerate(self.numbers):
                    noise = self.draw_noise(keys, latents.shape[1:], flip, caption, number).to(latents)
                    yield View(flip, caption, draw, rows, views, timesteps[draw].expand(len(rows)), noise)

    def caption_slots(self, batch: SampleBatch) -> int:
        """How many captions the samples of a batch are scored on at most.

        Args:
            batch: The samples.

        Returns:
            The number; samples with fewer captions have fewer views.
        """
        most = int(batch.caption_counts.max())
        return most if self.captions is None else min(most, self.captions)


def _normal(shape: Sequence[int], *names: str | int) -> Tensor:
    # A Trainer's precision changes the default dtype while it predicts; the draws must not follow it.
    return torch.randn(tuple(shape), generator=generator_for(*names), dtype=torch.float32)


def place_timesteps(
    uniform: Tensor, timestep_range: tuple[float, float], num_timesteps: int, density: Tensor | None = None
) -> Tensor:
    """Uniform numbers to timesteps in a range of the schedule, as often as training drew them there.

    Equal parts of [0, 1) become strata of equal probability.

    Args:
        uniform: Numbers in [0, 1), of any shape.
        timestep_range: Shares of the schedule's length.
        num_timesteps: Its length.
        density: ``(num_timesteps,)`` probabilities of the timesteps; ``None`` where all are alike. The range may begin
            or end within a timestep, which then counts in part.

    Returns:
        int64 timesteps of the same shape.

    Raises:
        InputError: If the density is no density of these timesteps, or has nothing in the range.

    Example:
        >>> quarters = torch.tensor([0.0, 0.25, 0.5, 0.75])
        >>> place_timesteps(quarters, (0.0, 1.0), 8), place_timesteps(quarters, (0.0, 1.0), 2, torch.tensor([0.2, 0.8]))
        (tensor([0, 2, 4, 6]), tensor([0, 1, 1, 1]))
    """
    low, high = timestep_range
    if density is None:
        places = (low + uniform * (high - low)) * num_timesteps
        return places.floor().long().clamp(0, num_timesteps - 1)
    shares = density.cpu().double()
    if shares.shape != (num_timesteps,) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < math.inf:
        raise InputError(
            f"The objective's density has the shape {tuple(shares.shape)} for {num_timesteps} timesteps, or is not one "
            "of numbers from 0 on; let it give the probability of each timestep."
        )
    edges = (torch.arange(num_timesteps + 1, dtype=torch.float64) - low * num_timesteps).clamp(min=0)
    edges = edges.clamp(max=(high - low) * num_timesteps)
    ends = (shares * edges.diff()).cumsum(0)  # what lies in the range up to the end of each timestep
    if not float(ends[-1]) > 0:
        raise InputError(
            f"Training drew no timestep in the range {timestep_range} of the schedule; choose another timestep_range."
        )
    # Beyond the last end lies what rounding puts there; a timestep that was never drawn has no stratum.
    found = torch.searchsorted(ends, uniform.double() * ends[-1], right=True)
    return found.clamp(max=int((ends < ends[-1]).sum()))
