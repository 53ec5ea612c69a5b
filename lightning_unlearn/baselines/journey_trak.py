"""JourneyTRAK: TRAK along the way on which the query was generated."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.gradients import QUERIES_AT_ONCE
from lightning_unlearn.baselines.per_sample import mean_gradients
from lightning_unlearn.baselines.sample_gradients import Gradients, join
from lightning_unlearn.baselines.trak import TRAK
from lightning_unlearn.data.batches import form_of
from lightning_unlearn.data.conditions import first_captions
from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.diffusion.sampling import Samplable, has_sampler, how_generated, trajectory
from lightning_unlearn.draws.views import View
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for

# Share of a query's size by which the way made again may miss it: shards hold float16, and pictures are clipped.
FAR = 0.05


class JourneyTRAK(TRAK):
    r"""TRAK with the loss at what the network expected to end at, averaged over the steps of the sampler.

    .. math::
        τ(\hat z, z_i) = \hat φ^T (Φ^T Φ + λ \bar d\, I)^{-1} φ(z_i), \qquad
        \hat φ = \tfrac{1}{T} \sum_t ∇_θ\, E_ε\, L(\hat x_0^t, t, ε; θ_0), \quad φ(z) = ∇_θ L(z, θ_0)

    Georgiev et al. (arXiv 2312.06205): step t is attributed by the loss at :math:`\hat x_0^t`, the image
    that the network predicts from :math:`x_t`; the mean over steps is how Zheng et al. (arXiv 2311.00500) compare it.
    Training gradients are TRAK's. The trajectory is made again from what a query's json says, with the query's first
    caption.

    Args:
        ridge: λ, as a share of the mean squared length of a training gradient.
        noises: Draws of the noise at each step.
        projection: To how many random dimensions gradients are brought first; none by default, which is exact.
        seed: Of the projection.

    Raises:
        InputError: If a number is out of range.
    """

    name: ClassVar[str] = "journey_trak"
    needs_query_views: ClassVar[bool] = False  # but on their trajectory

    def __init__(self, ridge: float = 0.1, noises: int = 1, projection: int | None = None, seed: int = 0) -> None:
        super().__init__(ridge, projection, seed)
        if noises < 1:
            raise InputError(f"Each step needs at least one noise, but noises is {noises}.")
        self.noises = noises

    @property
    def query_kind(self) -> Hashable:
        """The trajectory, and the draws at each step."""
        return ("trajectory", self.noises)

    def queries(self, subject: Subject) -> Gradients:
        """Mean gradients along each query's trajectory; see :meth:`RidgeBaseline.queries`.

        Args:
            subject: The model and the queries.

        Returns:
            Of ``Q`` queries.

        Raises:
            InputError: If the model's sampler is not known, or a query doesn't say how it was made.
        """
        objective = subject.loss.objective
        if not has_sampler(objective):
            raise InputError(
                "JourneyTRAK makes the queries again with a DenoisingObjective or a FlowMatchingObjective, but the "
                f"objective is a {type(objective).__name__}; choose another method."
            )
        facts = [_how(objective, query) for query in subject.queries]
        # Those that are made in as many steps, and have one form, go together.
        alike = [(steps, form_of(query)) for query, (_, steps) in zip(subject.queries, facts, strict=True)]
        order = sorted(range(len(facts)), key=alike.__getitem__)
        parts = []
        for (steps, _), group in groupby(order, key=alike.__getitem__):
            rows = list(group)
            for start in range(0, len(rows), QUERIES_AT_ONCE):
                some = rows[start : start + QUERIES_AT_ONCE]
                queries, seeds = [subject.queries[row] for row in some], [facts[row][0] for row in some]
                views = self._views(subject, objective, queries, seeds, steps)
                parts.append(mean_gradients(subject, [query.key for query in queries], views, self.output))
        return join(parts).rows(sorted(range(len(order)), key=order.__getitem__))

    def _views(
        self, subject: Subject, objective: Samplable, queries: list[Sample], seeds: list[int], steps: int
    ) -> Iterator[View]:
        network, shape = subject.loss.network, queries[0].latent.shape
        conditions = first_captions([query.conditions for query in queries])
        rows, end = torch.arange(len(queries)), torch.zeros(len(queries), *shape)
        for number, step in enumerate(trajectory(network, objective, conditions, shape, seeds, steps)):
            views, timesteps = ViewBatch(step.predicted, conditions), torch.full((len(queries),), step.timestep)
            for draw in range(number * self.noises, (number + 1) * self.noises):
                noise = torch.stack([_noise(subject, query, draw) for query in queries])
                yield View(0, 0, draw, rows, views, timesteps, noise)
            end = step.latents
        for query, made in zip(queries, end, strict=True):
            _check_end(query, made.cpu().float())


def _how(objective: Samplable, query: Sample) -> tuple[int, int]:
    """Seed and steps of a query's sampler."""
    about: dict[str, Any] = query.metadata
    seed, steps = about.get("seed"), about.get("steps")
    needed = how_generated(objective, 0, 1)
    if (
        not isinstance(seed, int)
        or not isinstance(steps, int)
        or steps < 1
        or not how_generated(objective, seed, steps).items() <= about.items()
    ):
        raise InputError(
            f"The query {query.key!r} can't be made again for JourneyTRAK: its json must have an integer seed and "
            f"steps, scheduler {needed['scheduler']!r} and guidance 1.0, as "
            "lightning_unlearn.diffusion.sampling.how_generated writes them; leave it out by query_keys, or choose "
            "another method."
        )
    return seed, steps


def _noise(subject: Subject, query: Sample, draw: int) -> Tensor:
    """The noise ``(C, H, W)`` of a draw, the same for all queries or each one's own, as the views have it."""
    names: list[str | int] = ["journey", subject.views.seed, draw]
    if subject.views.noise == "per_sample":
        names.append(query.key)
    return torch.randn(query.latent.shape, generator=generator_for(*names), dtype=torch.float32)


def _check_end(query: Sample, made: Tensor) -> None:
    # As it may have been clipped.
    made = made.clamp(query.latent.min(), query.latent.max())
    distance = float((made - query.latent).norm() / query.latent.norm())
    if not distance <= FAR:
        warnings.warn(
            f"The trajectory that the query {query.key!r} is said to come from ends {distance:.0%} of its size away "
            "from it, so these are not the weights or the caption that it was made with."
        )
