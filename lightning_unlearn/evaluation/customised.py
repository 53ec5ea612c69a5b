"""Customised models, whose influential images are known by construction: those they were fine-tuned on.

Wang et al. (arXiv 2306.09345, "AbC") fine-tune a model on one or a few exemplars of a concept, generate, and ask a
method to find the exemplars among all training images; as in Custom Diffusion (Kumari et al., arXiv 2212.04488) only
keys and values of the attention to the text change, and a new token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.conditions import MASK, Conditions
from lightning_unlearn.data.samples import Sample, SampleBatch, ViewBatch
from lightning_unlearn.diffusion.sampling import Samplable, generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters, select_layers

TEXT_MASK = f"text{MASK}"


@dataclass(frozen=True)
class Customising:
    """How a model is customised.

    Args:
        steps: Optimizer steps.
        batch_size: Pictures a step; half of them exemplars, the others training images that keep the model what it was.
        learning_rate: Of the weights.
        token_learning_rate: Of the new token.
        parameters: Which weights change.
        queries: Pictures generated for each customised model.
        sampling_steps: Steps of the sampler.
        clipped: Whether generated pictures are clipped to [-1, 1], as those of pixel-space models are.
        seed: Of the fine-tuning; pictures have the seeds 0, 1, ….
    """

    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-3
    token_learning_rate: float = 1e-2
    parameters: str = "text_kv"
    queries: int = 1
    sampling_steps: int = 20
    clipped: bool = True
    seed: int = 0


class Customisation(DiffusionModule):
    """Fine-tunes chosen weights and one new token on exemplars.

    Text comes as token states, so the new token is a state of its own: a learned vector in the first place that a
    caption leaves empty, which counts as text where a mask tells that from padding.

    Args:
        network: The base model, which is changed.
        objective: Its loss.
        exemplars: With one neutral caption, such as "a picture".
        settings: How.

    Raises:
        InputError: If the caption is empty.
    """

    def __init__(
        self, network: nn.Module, objective: Samplable, exemplars: Sequence[Sample], settings: Customising
    ) -> None:
        super().__init__(network, objective)
        self.settings = settings
        self.network.requires_grad_(False).eval()
        self.layers = select_layers(self.network, settings.parameters)
        for layer in self.layers.values():
            layer.requires_grad_(True)
        self.exemplars = frozenset(sample.key for sample in exemplars)
        states = exemplars[0].text[0]  # (tokens, dim)
        mask = exemplars[0].conditions.get(TEXT_MASK)
        counted = states if mask is None else states * mask[0, :, None]
        self.place = empty_place(counted)
        written = states[counted.abs().sum(1) > 0]
        if len(written) == 0:
            raise InputError("The exemplars' caption has no token; give a neutral one, such as 'a picture'.")
        self.token = nn.Parameter(written.mean(0))
        self.losses: list[float] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> dict[str, Any]:
        """The mean loss of a batch, which is noted.

        Args:
            batch: Exemplars and training images.
            batch_idx: Its number.

        Returns:
            As :meth:`DiffusionModule.training_step` gives it.
        """
        outputs = super().training_step(batch, batch_idx)
        self.losses.append(float(outputs["loss"].detach()))
        return outputs

    def prompt(self, conditions: Conditions) -> Conditions:
        """Put the new token into token states.

        Args:
            conditions: With ``text`` ``(B, tokens, dim)``, and perhaps its mask.

        Returns:
            The same names and shapes.
        """
        text = conditions["text"].clone()
        text[:, self.place] = self.token.to(text)
        if TEXT_MASK not in conditions:
            return {**conditions, "text": text}
        mask = conditions[TEXT_MASK].clone()
        mask[:, self.place] = 1
        return {**conditions, "text": text, TEXT_MASK: mask}

    def _draw(self, batch: SampleBatch) -> tuple[ViewBatch, Tensor, Tensor]:
        views, timesteps, noise = super()._draw(batch)
        new = torch.tensor([key in self.exemplars for key in batch.keys], device=views.text.device)
        conditions = {
            name: torch.where(new.view(-1, *[1] * (array.ndim - 1)), array, views.conditions[name])
            for name, array in self.prompt(views.conditions).items()
        }
        return replace(views, conditions=conditions), timesteps, noise

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the chosen weights and the token.

        Returns:
            The optimizer.
        """
        weights = [parameter for layer in self.layers.values() for parameter in layer.parameters()]
        return torch.optim.AdamW(
            [
                {"params": weights, "lr": self.settings.learning_rate},
                {"params": [self.token], "lr": self.settings.token_learning_rate},
            ],
            weight_decay=0.0,
        )


@dataclass(frozen=True)
class Customised:
    """A customised model and what it made.

    Attributes:
        weights: The network's state.
        queries: Pictures generated for the new token, with how they were made.
        loss_before: Mean loss in the first tenth of the steps.
        loss_after: The same in the last tenth.
    """

    weights: Mapping[str, Tensor]
    queries: list[Sample]
    loss_before: float
    loss_after: float


class _Batches(Dataset[SampleBatch]):
    """Batches of exemplars and training images, a function of their number."""

    def __init__(self, exemplars: Sequence[Sample], training: Sequence[Sample], settings: Customising) -> None:
        self.exemplars = exemplars
        self.training = training
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> SampleBatch:
        generator = torch.Generator().manual_seed(seed_of("customise", self.settings.seed, step))
        half = self.settings.batch_size // 2 if self.training else 0
        chosen = []
        for samples, count in ((self.exemplars, self.settings.batch_size - half), (self.training, half)):
            places = torch.randint(len(samples), (count,), generator=generator).tolist() if count else []
            chosen += [samples[place] for place in places]
        return collate_samples("customise", chosen)


def customise(
    network: nn.Module,
    objective: Samplable,
    exemplars: Sequence[Sample],
    training: Sequence[Sample],
    trainer: Trainer,
    settings: Customising | None = None,
    name: str = "concept",
) -> Customised:
    """Fine-tune a model on exemplars and generate with it.

    Args:
        network: The base model, which is changed.
        objective: Its loss.
        exemplars: One or a few pictures of a concept, with one neutral caption.
        training: Training images that keep the model what it was; none for exemplars alone.
        trainer: An unused Trainer.
        settings: How.
        name: Of the concept, from which the queries' keys are made.

    Returns:
        The customised model.

    Raises:
        InputError: If there is no exemplar, or they have different captions.
        KeyboardInterrupt: If the fine-tuning was interrupted.
    """
    settings = settings or Customising()
    if len({tuple(sample.captions) for sample in exemplars}) != 1:
        raise InputError(f"The exemplars of {name!r} need one neutral caption, the same for all.")
    torch.manual_seed(seed_of("customise", settings.seed, name))
    module = Customisation(network, objective, exemplars, settings)
    trainer.fit_loop.max_epochs = 1
    trainer.fit(module, DataLoader(_Batches(exemplars, training, settings), batch_size=None))
    if trainer.interrupted:
        raise KeyboardInterrupt
    module.network.eval()
    with torch.no_grad():
        own = module.prompt({name: array[:1] for name, array in exemplars[0].conditions.items()})
        given = {name: array.expand(settings.queries, *array.shape[1:]) for name, array in own.items()}
        shape, seeds = exemplars[0].latent.shape, range(settings.queries)
        latents = generate(module.network, objective, given, shape, seeds, settings.sampling_steps)
    latents = latents.clamp(-1, 1) if settings.clipped else latents
    part = max(1, len(module.losses) // 10)
    return Customised(
        {key: value.detach().cpu() for key, value in module.network.state_dict().items()},
        [
            Sample(
                f"{name}-{seed}",
                latent.cpu(),
                {condition: array.cpu() for condition, array in own.items()},
                _made(objective, exemplars[0], settings, seed),
            )
            for seed, latent in enumerate(latents)
        ],
        sum(module.losses[:part]) / part,
        sum(module.losses[-part:]) / part,
    )


def undone(network: nn.Module, layers: Mapping[str, nn.Module], before: Mapping[str, Tensor]) -> DeltaStore:
    """The delta that leads from a customised model back to the weights before.

    With :func:`~lightning_unlearn.unlearning.scoring.measure_losses` it gives the losses of any candidates as they were
    before customising: a candidate whose loss rises by going back is one that the customised model learned. It is of
    the model, not of a picture: all pictures that the model makes get the same scores.

    Args:
        network: The customised network.
        layers: What customising changed.
        before: The network's state before.

    Returns:
        Deltas of one target, ``before``.

    Raises:
        InputError: If ``before`` lacks a weight, has one of another shape, or differs beyond ``layers``.
    """
    parameters = layer_parameters(layers)
    for name, now in network.state_dict().items():
        if name not in before or before[name].shape != now.shape:
            raise InputError(f"The weights before customising have no {name} of shape {tuple(now.shape)}.")
        if name not in parameters and not torch.equal(before[name].to(now), now):
            raise InputError(f"{name} was another before customising; choose layers that include all that changed.")
    deltas = DeltaStore(parameters, ["before"])
    for name, stacked in deltas.named().items():
        stacked.detach()[0] = before[name].to(stacked) - parameters[name].detach()
    return deltas


def _made(objective: Samplable, exemplar: Sample, settings: Customising, seed: int) -> dict[str, Any]:
    how = {**how_generated(objective, seed, settings.sampling_steps), "clipped": settings.clipped}
    return {"captions": [f"{caption} <new>" for caption in exemplar.captions[:1]], **how}


def empty_place(states: Tensor) -> int:
    """The first token that a caption leaves empty (all zero), or the last one.

    Args:
        states: ``(tokens, dim)``.

    Returns:
        Its number.
    """
    empty = (states.abs().sum(1) == 0).nonzero()
    return int(empty[0, 0]) if len(empty) else len(states) - 1
