"""What many models make of all queries, measured together; the numbers of lightning_unlearn.evaluation.Measuring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_unlearn.data.conditions import first_captions
from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.diffusion.sampling import Samplable, trajectory
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.evaluation import Measuring, Outcome
from lightning_unlearn.evaluation.measuring import PARTS, rounded

VIEWS_AT_ONCE = 320  # of each model


class Together(nn.Module):
    """A network's losses on all draws of all queries, and its pictures.

    Args:
        network: Whose weights are given with each call.
        objective: Its loss.
        queries: Each with one caption, without a mask, and with seed and steps of one number.
        measure: How models are measured one by one.
        device: Where to.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Samplable,
        queries: Sequence[Sample],
        measure: Measuring,
        device: str,
    ) -> None:
        super().__init__()
        assert all(query.mask is None and len(query.text) == 1 for query in queries)
        (self.steps,) = {query.metadata["steps"] for query in queries}
        self.network, self.objective, self.queries, self.measure = network, objective, list(queries), measure
        drawn = [
            draw_for_target(
                "evaluation",
                measure.seed,
                query.key,
                range(measure.draws),
                measure.draws,
                objective.num_timesteps,
                query.latent.shape,
                objective.density(),
            )
            for query in queries
        ]
        self.latents = torch.stack([query.latent for query in queries]).to(device)
        given = first_captions([query.conditions for query in queries])
        self.conditions = {name: values.to(device) for name, values in given.items()}
        self.rows = torch.arange(len(queries), device=device).repeat_interleave(measure.draws)
        self.timesteps, self.noise = (torch.cat(values).to(device) for values in zip(*drawn, strict=True))

    def forward(self, chosen: Tensor | None) -> Tensor:
        """Losses ``(views,)`` of the chosen draws, or with none chosen the pictures ``(Q, C, H, W)``."""
        if chosen is None:
            seeds = [query.metadata["seed"] for query in self.queries]
            shape = self.latents.shape[1:]
            *_, last = trajectory(self.network, self.objective, self.conditions, shape, seeds, self.steps)
            return last.latents
        rows = self.rows[chosen]
        views = ViewBatch(self.latents[rows], {name: values[rows] for name, values in self.conditions.items()})
        return self.objective(self.network, views, self.timesteps[chosen], self.noise[chosen])

    @torch.no_grad()
    def outcomes(self, weights: dict[str, Tensor], *, pictures: bool) -> list[dict[str, Outcome]]:
        """What each model of a stack makes of the queries.

        Args:
            weights: Name in the network to a stack ``(models, …)``.
            pictures: Whether the queries are generated again, too.

        Returns:
            Query key to outcome, of each.
        """
        named = {f"network.{name}": weight for name, weight in weights.items()}

        def of_all(chosen: Tensor | None) -> Tensor:
            # The pictures' noise is that of their seeds, for every model.
            found: Tensor = vmap(lambda one: functional_call(self, one, (chosen,)), randomness="same")(named)
            return found

        parts = torch.arange(len(self.rows), device=self.rows.device).split(VIEWS_AT_ONCE)
        losses = torch.cat([of_all(part) for part in parts], 1).double()
        losses = losses.unflatten(1, (len(self.queries), PARTS, -1)).mean(3).cpu()  # (models, Q, parts)
        moved = self._moved(of_all(None)) if pictures else [{} for _ in range(len(losses) * len(self.queries))]
        return [
            {
                query.key: Outcome(
                    rounded(float(values.mean())),
                    [rounded(value) for value in values.tolist()],
                    **moved[model * len(self.queries) + place],
                )
                for place, (query, values) in enumerate(zip(self.queries, of_model, strict=True))
            }
            for model, of_model in enumerate(losses)
        ]

    def _moved(self, made: Tensor) -> list[dict[str, float]]:
        """How far pictures ``(models, Q, C, H, W)`` are from the queries."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        assert all(query.metadata["clipped"] for query in self.queries)
        made = made.clamp(-1, 1)
        errors = (made - self.latents).square().flatten(2).mean(2).flatten().tolist()
        first, second = made.flatten(0, 1), self.latents.repeat(len(made), 1, 1, 1)
        if self.measure.decoder is not None:
            first, second = self.measure.decoder(first).clamp(-1, 1), self.measure.decoder(second).clamp(-1, 1)
        sigma = min(1.5, min(first.shape[-2:]) / 16)
        alike: Any = structural_similarity_index_measure(
            first, second, sigma=sigma, data_range=(-1.0, 1.0), reduction="none"
        )
        return [
            {"mse": rounded(error), "ssim": rounded(value)} for error, value in zip(errors, alike.tolist(), strict=True)
        ]
