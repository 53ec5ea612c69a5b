"""What a network family has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import Tensor, nn

from lightning_unlearn.data.conditions import MASK, Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.noted import note_prediction
from lightning_unlearn.diffusion.families.settings import OWN_OBJECTIVE, refuse_settings, setting
from lightning_unlearn.diffusion.families.vaes import encode_kl
from lightning_unlearn.diffusion.timestep_density import Density
from lightning_unlearn.errors import InputError


@dataclass(frozen=True)
class Condition:
    """What networks of a family are given under one name, besides latents and timestep.

    Attributes:
        dimensions: Of one view's array: 2 for ``(tokens, dim)``, 1 for ``(dim,)``.
        widths: Settings of the network's config that may say the length of the last axis; the first that does counts.
        optional: Whether the network can do without it.
        length: Of the last axis, where it is the same for all networks: 2 for a height and a width.
    """

    dimensions: int
    widths: Sequence[str] = ()
    optional: bool = False
    length: int | None = None


TEXT = Condition(2, ("encoder_hid_dim", "cross_attention_dim"))
"""Text states as most networks take them."""


@dataclass(frozen=True)
class FlowTraining:
    """How diffusers' training script of a family trains by flow matching where it is told nothing else.

    Attributes:
        density: Of its timesteps; ``None`` where there is no script, so that it must be said.
        preconditioned: Whether it takes the network's outputs as preconditioned.
    """

    density: Density | None = "uniform"
    preconditioned: bool = False


class Family(ABC):
    """How networks of one family are called, what they are conditioned on, and where the text enters them.

    The family's diffusers pipeline is the oracle: what a network is given here for some latents, timestep and prompt is
    what the pipeline gives it.

    Attributes:
        title: What people call it, e.g. ``"Stable Diffusion XL"``.
        class_names: Names of the network classes that belong to the family.
        selections: For each named selection of weights, regular expressions that whole layer names match. A name that
            means nothing in the family is left out.
        conditions: What the networks are given, by name.
        latent_dimensions: 3 for ``(C, H, W)`` latents, 4 for ``(C, F, H, W)``.
        vae_class: The class of the VAE whose latents the networks work on.
        flow: How flows of the family are usually trained; ``None`` for a family of noise schedules.
        variance: Whether networks may predict a variance in a second half of their channels. The loss is that of the
            first half: what is attributed is the prediction of the noise, and the variance's part of the training loss
            (Nichol and Dhariwal, arXiv 2102.09672, Eq. 16) is not.
        left_out: Regular expressions of layers that ``all`` and ``linear`` can't take, and why: their rows are not
            samples, or their weights are used without them.
        plain: Settings by which a network takes more than the family gives it: the values with which it does not, and
            what it would take.
    """

    title: ClassVar[str]
    class_names: ClassVar[Sequence[str]]
    selections: ClassVar[Mapping[str, Sequence[str]]]
    conditions: ClassVar[Mapping[str, Condition]] = {"text": TEXT}
    latent_dimensions: ClassVar[int] = 3
    vae_class: ClassVar[str] = "AutoencoderKL"
    flow: ClassVar[FlowTraining | None] = None
    variance: ClassVar[bool] = False
    left_out: ClassVar[Mapping[str, str]] = {}
    plain: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    def knows(self, network: nn.Module) -> bool:
        """Whether a network is one of this family.

        Args:
            network: A denoiser, perhaps on the meta device.

        Returns:
            By the names of its class and of those that it derives from; a family that shares a class with others looks
            into the config, too.
        """
        return not {cls.__name__ for cls in type(network).__mro__}.isdisjoint(self.class_names)

    def check(self, network: nn.Module) -> None:
        """Refuse a network that takes or gives what this family knows nothing of, by what its config says.

        Args:
            network: A network of this family, perhaps on the meta device.

        Raises:
            InputError: If it needs more than the family gives it, or predicts more than one value a latent.
        """
        refuse_settings(network, self.plain)
        takes, gives = setting(network, "in_channels"), setting(network, "out_channels")
        if gives is None or takes is None or takes == gives or (self.variance and gives == 2 * takes):
            return
        name = type(network).__name__
        what = "predicts a variance beside the noise" if gives == 2 * takes else "takes or gives more than latents"
        raise InputError(f"This {name} takes {takes} channels and gives {gives}, so it {what}; {OWN_OBJECTIVE}.")

    def check_batch(self, network: nn.Module, noisy: Tensor, batch: ViewBatch) -> None:
        """Refuse latents or conditions of another form than the network's.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            batch: What it is conditioned on.

        Raises:
            InputError: If the network does not take them.
        """
        name, channels = type(network).__name__, self.latent_channels(network)
        wrong = channels is not None and noisy.shape[1] != channels
        if noisy.ndim != self.latent_dimensions + 1 or wrong:
            form = "(C, H, W)" if self.latent_dimensions == 3 else "(C, F, H, W)"
            raise InputError(
                f"Latents {form} are {tuple(noisy.shape[1:])}, but this {name} takes {channels} channels; use the "
                "samples, or the network, of one model."
            )
        needed = self.needs(network)
        for condition in batch.conditions:
            if condition.endswith(MASK) and condition not in needed:
                raise InputError(
                    f"The samples hold {condition!r}, which tells text from padding, but this {name} ({self.title}) "
                    "takes none and would take padding for text; prepare them with the pipeline of this model."
                )
        for condition, form_of in needed.items():
            array = batch.conditions.get(condition)
            if array is None:
                if form_of.optional:
                    continue
                raise InputError(
                    f"This {name} ({self.title}) takes {condition!r}, which the samples don't hold; prepare them with "
                    "`lightning-unlearn prepare` and the pipeline of this model."
                )
            width = form_of.length or next(filter(None, (setting(network, name) for name in form_of.widths)), None)
            # One width for each block is possible; then the network itself must know.
            known = isinstance(width, int) and array.shape[-1] != width
            if array.ndim != form_of.dimensions + 1 or len(array) != len(noisy) or known:
                what = "Text states are" if condition == "text" else f"{condition!r} is"
                axes = {1: "", 2: "tokens, "}.get(form_of.dimensions, "…, ")
                raise InputError(
                    f"{what} {tuple(array.shape)} for {len(noisy)} latents, but this {name} takes (views, {axes}"
                    f"{width if width is not None else 'dim'}); use the samples' own text encoder, or the network of "
                    "this text."
                )

    def needs(self, network: nn.Module) -> Mapping[str, Condition]:
        """What one network is given; where its config decides, a family says so here.

        Args:
            network: A network of this family, perhaps on the meta device.

        Returns:
            Name to its form.
        """
        return self.conditions

    def latent_channels(self, network: nn.Module) -> int | None:
        """How many channels the latents have, before any packing that :meth:`call` does.

        Args:
            network: A network of this family.

        Returns:
            The number, ``None`` where the config says nothing.
        """
        channels = setting(network, "in_channels")
        return channels if isinstance(channels, int) else None

    @abstractmethod
    def call(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """Call the network, whose inputs are checked.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            timesteps: ``(B,)`` in the scheduler's units, as its ``timesteps`` are: int64 numbers of steps of a noise
                schedule, ``1000 σ`` of a flow.
            batch: What it is conditioned on.

        Returns:
            What the network gives, in the sign and order of the training's target.
        """

    def size_shift(self, network: nn.Module, config: Any, latents: Tensor, steps: int) -> float:
        """The μ by which a sampler shifts a flow's table for a picture's size: on the scheduler's line between two.

        Args:
            network: A network of this family.
            config: The scheduler's.
            latents: ``(B, C, H, W)``.
            steps: Of the sampler.

        Returns:
            As the pipeline hands it to its scheduler.
        """
        tokens = latents.shape[-2] * latents.shape[-1] / 4  # patches of 2 × 2 latents
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditions:
        """Conditions of captions, by the pipeline's own ``encode_prompt``, as training used them.

        Args:
            pipeline: The family's diffusers pipeline with its text encoders; it may lack network and VAE.
            captions: ``n`` of them; an empty one is what the pipeline makes of an empty prompt.

        Returns:
            Name to ``(n, …)``, float32.

        Raises:
            InputError: If the family has no text, or its encoders are missing.
        """
        raise InputError(f"{self.title} makes no states of captions here; give ready `text`.")

    def facts(self, height: int, width: int, original: tuple[int, int], crop: tuple[int, int]) -> dict[str, list[int]]:
        """Numbers about a picture that its network is conditioned on, as training used them.

        Args:
            height: Of the picture as it is encoded, in pixels.
            width: Of the same.
            original: ``(height, width)`` of the picture as it lay in the data set.
            crop: ``(top, left)`` of what was cut out of it, after resizing.

        Returns:
            Name to numbers, for the sample's json; by default none.
        """
        return {}

    def encode_pictures(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents of pictures, scaled and shifted as the network is trained on them.

        Args:
            vae: The pipeline's.
            pixels: ``(B, 3, H, W)`` in [-1, 1].

        Returns:
            Mean and standard deviation ``(B, C, H, W)`` of the VAE's distribution; no deviation where the VAE gives a
            code and no distribution.
        """
        return encode_kl(vae, pixels)

    @final
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, batch: ViewBatch) -> Tensor:
        """The network's prediction, of which it is certain that it is one of the latents and of nothing else.

        Args:
            network: A network of this family.
            noisy: ``(B, C, H, W)`` noisy latents.
            timesteps: ``(B,)``, see :meth:`call`.
            batch: What it is conditioned on.

        Returns:
            The network's prediction, ``(B, C, H, W)``, without a variance.

        Raises:
            InputError: If the network and what it is given don't fit, or its prediction is of another shape.
        """
        self.check(network)
        self.check_batch(network, noisy, batch)
        prediction = self.call(network, noisy, timesteps, batch)
        if self.variance and prediction.shape[1] == 2 * noisy.shape[1]:
            prediction = prediction[:, : noisy.shape[1]]
        # A difference of other shapes would be broadcast, or end in a raw error.
        if prediction.shape != noisy.shape:
            raise InputError(
                f"{type(network).__name__} gives the shape {tuple(prediction.shape)} for latents of "
                f"{tuple(noisy.shape)}"
                f"{_variance(prediction.shape[1:2] == (2 * noisy.shape[1],))}; {OWN_OBJECTIVE}."
            )
        note_prediction(prediction)
        return prediction


def _variance(likely: bool) -> str:
    return ", that is a variance beside the noise" if likely else ""
