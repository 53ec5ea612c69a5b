"""A toy model with samples and queries for the rival methods, and the views that the slow versions look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference_baselines import Look, OneView
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, toy_fields

from lightning_unlearn.baselines import Subject
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import Sample, SampleBatch, decode_sample
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.deltas import NetworkLoss
from lightning_unlearn.weights.parameters import layer_parameters, layer_specs, select_layers


def samples(count: int, captions: Sequence[int] = (1,), *, flip: bool = False, prefix: str = "sample") -> list[Sample]:
    """Random samples whose numbers of captions take turns."""
    first = 0 if prefix == "sample" else 1000
    return [
        decode_sample(toy_fields(first + number, captions[number % len(captions)], flip=flip, prefix=prefix))
        for number in range(count)
    ]


def subject(
    training: Sequence[Sample],
    queries: Sequence[Sample],
    views: Views | None = None,
    *,
    network: nn.Module | None = None,
    objective: Objective | None = None,
    parameters: str | list[str] = "all",
    batch_size: int = 3,
    fisher: Fisher | None = None,
    keep: bool = False,
) -> Subject:
    """A float64 toy with its samples in batches."""
    network = (network or ToyDenoiser()).double().eval().requires_grad_(False)

    def batches() -> list[SampleBatch]:
        return [
            collate_samples("shard", training[start : start + batch_size])
            for start in range(0, len(training), batch_size)
        ]

    layers = select_layers(network, parameters)
    loss = NetworkLoss(network, objective or ToyObjective())
    return Subject(loss, layers, views or Views(timesteps=2), queries, batches, fisher, keep)


def taken(kind: type[Fisher], toy: Subject) -> Fisher:
    """A Fisher of the toy from one backward pass over its samples, or one for each of its stages."""
    fisher = kind(layer_specs(toy.layers))
    for weight in toy.loss.network.parameters():
        weight.requires_grad_(True)
    for stage in fisher.stages or (None,):
        if fisher.stage != stage:
            fisher.next_stage()
        for batch in toy.batches():
            for view in toy.views.of(batch, ToyObjective.num_timesteps):
                with GradientCapture(toy.layers) as capture:
                    noise, timesteps = view.noise.double(), view.timesteps
                    views = type(view.batch)(view.batch.latents.double(), {"text": view.batch.text.double()})
                    toy.loss(views, timesteps, noise).sum().backward()
                fisher.update(capture.take())
    toy.loss.network.zero_grad()
    return fisher


def enlarged(latents: Tensor) -> Tensor:
    """A stand-in for a decoder: latents twice as large and half as bright."""
    return torch.nn.functional.interpolate(latents, scale_factor=2.0) / 2


def rows(latents: Tensor) -> Tensor:
    """An encoder that is a function: the pixels themselves."""
    return latents.flatten(1)


def views_of(views: Views, sample: Sample, num_timesteps: int = ToyObjective.num_timesteps) -> list[OneView]:
    """All views of one sample, one by one."""
    timesteps = views.draw_timesteps(num_timesteps).tolist()
    captions = len(sample.text) if views.captions is None else min(len(sample.text), views.captions)
    found = []
    for flip in range(1 + views.flips):
        latent = sample.latent_flip if flip else sample.latent
        assert latent is not None
        for caption in range(captions):
            for draw in range(views.draws):
                noise = views.draw_noise([sample.key], sample.latent.shape, flip, caption, draw)[0]
                found.append(OneView(latent.double(), sample.text[caption].double(), timesteps[draw], noise.double()))
    return found


def toy_look(toy: Subject) -> tuple[dict[str, Tensor], Look]:
    """The chosen weights, requiring gradients, and how the slow versions look at a view: :class:`ToyObjective`."""
    parameters: dict[str, Tensor] = dict(layer_parameters(toy.layers))
    for weight in parameters.values():
        weight.requires_grad_(True)

    def look(view: OneView) -> tuple[Tensor, Tensor]:
        share = torch.tensor((view.timestep + 1) / 11, dtype=torch.float32).double()  # as the toy rounds it
        noisy = (1 - share) * view.latent + share * view.noise
        prediction = toy.loss.network(noisy[None], torch.tensor([view.timestep]), view.text[None])[0]
        return ((prediction - view.noise) ** 2).sum() / view.noise.numel(), prediction

    return parameters, look
