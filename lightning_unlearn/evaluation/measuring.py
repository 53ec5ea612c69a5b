"""What a retrained model can still make of the queries: their loss, and their pictures from the same seeds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import first_captions, shapes_of
from lightning_unlearn.data.samples import Sample, ViewBatch, named_arrays
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.sampling import SCHEDULERS, generate, has_sampler, how_generated
from lightning_unlearn.draws.unlearning_draws import draw_batches, draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest, tensors_digest
from lightning_unlearn.weights.precision import ExactFloat32

# The loss is also kept for this many parts of the schedule.
PARTS = 10
ImageFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a model makes of one query.

    Attributes:
        loss: Mean loss over the fixed draws.
        parts: The same over each tenth of the schedule.
        mse: Mean squared difference of the latent generated again from the query, ``None`` if the query does not say
            how it was made.
        ssim: Structural similarity of the two pictures (of models in pixel space, or with a decoder).
        cosine: Cosine of their codes under the user's encoder, if there is one.
    """

    loss: float
    parts: list[float]
    mse: float | None = None
    ssim: float | None = None
    cosine: float | None = None


class Measuring:
    """Measures a network on queries; the draws are a function of the seed and the query's key.

    Args:
        queries: The queries; those whose json says that and how
            :func:`~lightning_unlearn.diffusion.sampling.generate` made them (``seed``, ``steps``; neither another
            scheduler nor guidance) are generated again. Of one with a mask the loss is that of its region, while
            pictures are compared whole.
        draws: (timestep, noise) pairs over which a query's loss is the mean, a multiple of 10.
        seed: Of the draws, which come from a stream of their own.
        batch_size: Draws a forward pass.
        encoder: Dotted name of an image encoder ``(B, C, H, W) -> (B, D)``, for the cosine; it sees what the decoder
            makes.
        decoder: Dotted name of what makes pictures in [-1, 1] from latents, ``(B, c, h, w) -> (B, C, H, W)``. Without
            one latents are taken as they are, and have a structural similarity only where they are clipped to [-1, 1].

    Raises:
        InputError: If there is no query, one says its seed or steps in other than whole numbers, the number of draws is
            not a multiple of 10, the encoder or decoder is not there, or a key stands twice.
    """

    def __init__(
        self,
        queries: Sequence[Sample],
        draws: int = 80,
        seed: int = 0,
        batch_size: int = 64,
        encoder: str | None = None,
        decoder: str | None = None,
    ) -> None:
        if not queries:
            raise InputError("There is no query to measure retrained models on; make some with `prepare`.")
        keys = [query.key for query in queries]
        if len(set(keys)) < len(keys):
            raise InputError("A query's key stands twice; keys must be unique over all queries.")
        if draws < PARTS or draws % PARTS:
            raise InputError(f"The draws of a query's loss must be a multiple of {PARTS}, but are {draws}.")
        self.queries = list(queries)
        self._made = {query.key: made for query in queries if (made := _how_made(query)) is not None}
        self.draws = draws
        self.seed = seed
        self.batch_size = batch_size
        self.encoder_name = encoder
        self.encoder = _find(encoder, "encoder", "(B, D)") if encoder is not None else None
        self.decoder_name = decoder
        self.decoder = _find(decoder, "decoder", "(B, C, H, W)") if decoder is not None else None

    def settings(self) -> dict[str, Any]:
        """What outcomes depend on besides the model, as JSON.

        Returns:
            JSON-like settings; the queries by a digest of their arrays.
        """
        made = {
            query.key: [query.metadata.get(name) for name in ("seed", "steps", "clipped")] for query in self.queries
        }
        return {
            "draws": self.draws,
            "seed": self.seed,
            "encoder": self.encoder_name,
            # Named only where there is one, so that studies from before decoders came in go on.
            **({} if self.decoder_name is None else {"decoder": self.decoder_name}),
            "queries": [query.key for query in self.queries],
            "queries_digest": settings_digest({"tensors": tensors_digest(named_arrays(self.queries)), "made": made}),
        }

    @torch.no_grad()
    def __call__(self, network: nn.Module, objective: Objective) -> dict[str, Outcome]:
        """Measure a network.

        Args:
            network: Trained; the mode of each of its parts is put back afterwards.
            objective: Its loss.

        Returns:
            Query key to outcome.
        """
        modes = {part: part.training for part in network.modules()}
        network.eval()
        try:
            with ExactFloat32():
                pictures = self._generate(network, objective)
                return {query.key: self._outcome(network, objective, query, pictures) for query in self.queries}
        finally:
            for part, mode in modes.items():
                part.training = mode

    def _outcome(self, network: nn.Module, objective: Objective, query: Sample, pictures: dict[str, Tensor]) -> Outcome:
        weight = next(network.parameters())
        losses = []
        for batch in draw_batches(query, 0, 0, self.draws, 0, 1, self.batch_size):
            timesteps, noise = draw_for_target(
                "evaluation",
                self.seed,
                query.key,
                batch.numbers,
                batch.total,
                objective.num_timesteps,
                query.latent.shape,
                objective.density(),
            )
            views = ViewBatch(batch.latents, batch.conditions, batch.mask).to(weight.device, weight.dtype)
            losses.append(objective(network, views, timesteps.to(weight.device), noise.to(weight)).double().cpu())
        values = torch.cat(losses)  # (draws,), in the order of timesteps
        parts = values.reshape(PARTS, -1).mean(1)
        found = {name: rounded(value) for name, value in self._moved(query, pictures.get(query.key)).items()}
        return Outcome(rounded(float(values.mean())), [rounded(part) for part in parts.tolist()], **found)

    def _generate(self, network: nn.Module, objective: Objective) -> dict[str, Tensor]:
        """The queries once more, those that say how they were made and whose objective has a sampler."""
        if not has_sampler(objective):
            return {}
        sampler = how_generated(objective, 0, 1)["scheduler"]
        made: dict[str, Tensor] = {}
        alike: dict[tuple[int, torch.Size, str], list[Sample]] = {}
        for query in self.queries:
            if query.key in self._made and query.metadata.get("scheduler", sampler) == sampler:
                _, steps = self._made[query.key]
                alike.setdefault((steps, query.latent.shape, str(shapes_of(query.conditions))), []).append(query)
        for (steps, shape, _), queries in alike.items():
            for start in range(0, len(queries), self.batch_size):
                part = queries[start : start + self.batch_size]
                given = first_captions([query.conditions for query in part])
                seeds = [self._made[query.key][0] for query in part]
                pictures = generate(network, objective, given, shape, seeds, steps).float().cpu()
                for query, picture in zip(part, pictures, strict=True):
                    made[query.key] = picture.clamp(-1, 1) if query.metadata.get("clipped") else picture
        return made

    def _moved(self, query: Sample, picture: Tensor | None) -> dict[str, float]:
        """How far a picture is from the query."""
        if picture is None:
            return {}
        found = {"mse": float((picture - query.latent).square().mean())}
        seen = torch.stack([picture, query.latent])
        if self.decoder is not None:
            seen = self.decoder(seen).float().cpu().clamp(-1, 1)
            if seen.ndim != 4 or len(seen) != 2:
                raise InputError(f"The decoder {self.decoder_name!r} gives {tuple(seen.shape)} for two latents.")
        if self.decoder is not None or query.metadata.get("clipped"):
            found["ssim"] = structural_similarity(*seen)
        if self.encoder is not None:
            codes = self.encoder(seen)
            found["cosine"] = float(torch.nn.functional.cosine_similarity(codes[0], codes[1], dim=0))
        return found


def _how_made(query: Sample) -> tuple[int, int] | None:
    """Seed and steps of a query, if it can be generated again."""
    about = query.metadata
    theirs = about.get("scheduler", SCHEDULERS[0]) not in SCHEDULERS or about.get("guidance", 1.0) != 1.0
    if theirs or about.get("seed") is None or about.get("steps") is None:
        return None
    seed, steps = about["seed"], about["steps"]
    if type(seed) is not int or type(steps) is not int or steps < 1:
        raise InputError(
            f"The query {query.key!r} was made with seed {seed!r} in {steps!r} steps, as its json says; give whole "
            "numbers, or leave them out."
        )
    return seed, steps


def structural_similarity(first: Tensor, second: Tensor) -> float:
    """Structural similarity of two pictures in [-1, 1] (Wang et al., 2004), by torchmetrics.

    Args:
        first: ``(C, H, W)``.
        second: ``(C, H, W)``.

    Returns:
        At most 1. The Gaussian window of σ = 1.5 pixels is made smaller for pictures below 24 pixels, where it would
        leave nothing.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = min(1.5, min(first.shape[-2:]) / 16)
    value = structural_similarity_index_measure(first[None], second[None], sigma=sigma, data_range=(-1.0, 1.0))
    assert isinstance(value, Tensor)
    return float(value)


def rounded(value: float) -> float:
    """A number as it is kept: seven significant digits, as many as float32 has.

    Args:
        value: Any.

    Returns:
        It, rounded.

    Raises:
        InputError: If it is not finite.
    """
    if not math.isfinite(value):
        raise InputError("A retrained model's loss or picture is not finite; check its training recipe.")
    return float(f"{value:.7g}")


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON, without what was not measured.

    Args:
        outcome: The outcome.

    Returns:
        Field name to value.
    """
    return {name: value for name, value in asdict(outcome).items() if value is not None}


def _find(name: str, what: str, shape: str) -> ImageFunction:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"There is no {what} {name!r} ({error}); give the dotted name of one.") from None
    made = found() if isinstance(found, type) else found
    if not callable(made):
        raise InputError(f"{name!r} is no image {what}; it must take (B, C, H, W) and give {shape}.")
    images: ImageFunction = made
    return images
