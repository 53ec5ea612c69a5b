"""Queries out of what a person asks, one at a time and in memory: a prompt, or a picture with its prompt.

They become samples as the training's pictures did: by the same encoders, cut and resized alike.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.diffusion.sampling import Samplable, generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.encoding import Encoding
from lightning_unlearn.preparation.inputs import Item, TextSource
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.tally import Tally

if TYPE_CHECKING:
    from PIL import Image

# Of a picture that is given; a small file can claim more than a memory holds.
MOST_PIXELS = 2**26
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
STEPS = 40
NEAR = 6
# Of a prompt that is a caption but for how it begins.
_BEGINNING = re.compile(r"^((an? )?(emoji|photo|picture|image|drawing|painting) of|an?|the) (?=.)")


@dataclass(frozen=True)
class Made:
    """A query that was made of what a person gave.

    Attributes:
        sample: With a picture to look at, if there is one.
        notes: Sentences that the person should know, e.g. that a prompt was cut.
    """

    sample: Sample
    notes: Sequence[str] = ()


class Prompts(Protocol):
    """Gives what a network is conditioned on for a prompt."""

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """Name to ``(1, …)``, and sentences that the person should know."""
        ...


class EncodedPrompts:
    """Prompts through a text encoder.

    Args:
        text: The encoder.
    """

    def __init__(self, text: TextSource) -> None:
        self.text = text

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """See :class:`Prompts`."""
        item = Item(0, Record("prompt", [prompt], {}, "the prompt"))
        states, notes = _states(self.text, item)
        return {name: torch.from_numpy(np.array(array, np.float32)) for name, array in states.items()}, notes


class KnownPrompts:
    """Prompts that say what a training caption says, of which the shards have the states: no encoder is needed.

    Args:
        captions: ``N`` lists of captions.
        fetch: A row's sample.
    """

    def __init__(self, captions: Sequence[Sequence[str]], fetch: Callable[[int], Sample]) -> None:
        self.fetch = fetch
        self._places: dict[str, tuple[int, int, str]] = {}
        for row, own in enumerate(captions):
            for place, caption in enumerate(own):
                self._places.setdefault(_plain(caption), (row, place, caption))

    def conditions(self, prompt: str) -> tuple[Conditions, list[str]]:
        """See :class:`Prompts`.

        Args:
            prompt: The prompt.

        Returns:
            The conditions of the caption.

        Raises:
            InputError: If no caption says the same.
        """
        plain = _plain(prompt)
        known = next((words for words in (plain, _without_beginning(plain)) if words in self._places), None)
        if known is None:
            near = ", ".join(repr(caption) for caption in self._near(plain))
            raise InputError(
                f"This model's text encoder is not at hand, so that only captions of its training are understood, and "
                f"{prompt[:60]!r} is none of them; try {near}, or look for one by Search."
            )
        row, place, caption = self._places[known]
        sample = self.fetch(row)
        notes = [] if caption == prompt else [f"It is read as the training caption {caption!r}."]
        return {
            name: array[place : place + 1] if len(array) > 1 else array for name, array in sample.conditions.items()
        }, notes

    def _near(self, plain: str) -> list[str]:
        """Captions that share most words with a prompt, or else some."""
        words = set(plain.split()[:64])
        shared = [(len(words & set(known.split())), known) for known in self._places]
        best = sorted((one for one in shared if one[0]), key=lambda one: (-one[0], len(one[1]), one[1]))[:NEAR]
        return [self._places[known][2] for _, known in best or shared[:NEAR]]


class PipelineQueries:
    """Queries of a pipeline: its own sampler makes pictures, and its own encoders look at them.

    Args:
        encoding: As the training's pictures were encoded.
        make: A prompt and a seed to a picture and what is known of it; ``None`` if nothing generates.
    """

    def __init__(
        self, encoding: Encoding, make: Callable[[str, int], tuple[Image.Image, dict[str, Any]]] | None
    ) -> None:
        self.encoding, self.make = for_queries(encoding), make

    def from_prompt(self, key: str, prompt: str, seed: int) -> Made:
        """Generate a picture, and encode it.

        Args:
            key: Of the query.
            prompt: Its prompt.
            seed: Of its noise.

        Returns:
            The query.

        Raises:
            InputError: If nothing can be generated.
        """
        if self.make is None:
            raise InputError("Nothing here generates pictures; give one with the prompt that it was made with.")
        picture, facts = self.make(prompt, seed)
        stream = io.BytesIO()
        picture.save(stream, "png")
        return self._encoded(key, prompt, stream.getvalue(), {"kind": "generated", "seed": seed, **facts})

    def from_picture(self, key: str, prompt: str, picture: bytes) -> Made:
        """Encode a picture.

        Args:
            key: Of the query.
            prompt: What it was generated with.
            picture: An encoded picture.

        Returns:
            The query.
        """
        check_picture(picture)
        return self._encoded(key, prompt, picture, {"kind": "given"})

    def _encoded(self, key: str, prompt: str, picture: bytes, facts: dict[str, Any]) -> Made:
        item = self.encoding.item(0, Record(key, [prompt], facts, "this picture", picture))
        self.encoding.text.cut = Tally()
        (latent,), flips, (states,) = self.encoding.arrays([item])
        fields = self.encoding.fields(item, latent, None if flips is None else flips[0], states)
        return Made(decode_sample(fields), _cut(self.encoding.text))


class NetworkQueries:
    """Queries of a network alone: what is generated stays a latent, which people see if it is pixels.

    Args:
        network: Of a known family.
        objective: Whose schedule it was trained with; ``None`` if nothing samples from it.
        shape: ``(C, H, W)`` of its latents.
        prompts: Gives its conditions.
        encoding: Makes its pixels of pictures, and nothing of text; ``None`` if it works on latents.
        mirrored: Whether queries need the latent of the mirrored picture.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Samplable | None,
        shape: tuple[int, ...],
        prompts: Prompts,
        encoding: Encoding | None,
        mirrored: bool,
    ) -> None:
        self.network, self.objective, self.shape, self.prompts = network, objective, shape, prompts
        self.encoding = None if encoding is None else for_queries(encoding)
        self.mirrored = mirrored

    def from_prompt(self, key: str, prompt: str, seed: int) -> Made:
        """Generate a latent.

        Args:
            key: Of the query.
            prompt: Its prompt.
            seed: Of its noise.

        Returns:
            The query.

        Raises:
            InputError: If nothing can be generated.
        """
        if self.objective is None:
            raise InputError("Nothing here generates pictures; give one with the prompt that it was made with.")
        conditions, notes = self.prompts.conditions(prompt)
        latent = generate(self.network, self.objective, conditions, self.shape, [seed], STEPS)[0].float().cpu()
        if self.encoding is not None:  # pixels
            latent = latent.clamp(-1, 1)
        facts = {"kind": "generated", **how_generated(self.objective, seed, STEPS)}
        return Made(self._sample(key, prompt, latent, conditions, facts, None), notes)

    def from_picture(self, key: str, prompt: str, picture: bytes) -> Made:
        """Bring a picture to the network's pixels.

        Args:
            key: Of the query.
            prompt: What it was generated with.
            picture: An encoded picture.

        Returns:
            The query.

        Raises:
            InputError: If the network does not work on pixels.
        """
        check_picture(picture)
        if self.encoding is None:
            raise InputError(
                "This model looks at latents, and nothing here makes them of a picture; start serve with the "
                "--pipeline that has its VAE, or ask with a prompt."
            )
        conditions, notes = self.prompts.conditions(prompt)
        item = self.encoding.item(0, Record(key, [prompt], {}, "this picture", picture))
        (latent,), _, _ = self.encoding.arrays([item])
        pixels = torch.from_numpy(np.array(latent, np.float32))
        return Made(self._sample(key, prompt, pixels, conditions, {"kind": "given"}, item.preview), notes)

    def _sample(
        self,
        key: str,
        prompt: str,
        latent: Tensor,
        conditions: Mapping[str, Tensor],
        facts: dict[str, Any],
        picture: bytes | None,
    ) -> Sample:
        if not latent.isfinite().all():
            raise InputError("What the model generated is not finite; take another seed or prompt.")
        latent = latent.half().float()  # as shards hold it
        flip = latent.flip(-1) if self.mirrored and self.encoding is not None else None
        metadata = {"captions": [prompt], **facts}
        return Sample(key, latent, dict(conditions), metadata, flip, picture)


def for_queries(encoding: Encoding) -> Encoding:
    """How queries are encoded where training pictures were encoded so: they have no mask of the training's loss.

    Args:
        encoding: Of the training pictures.

    Returns:
        That of queries.
    """
    return replace(encoding, choices=replace(encoding.choices, masks="leave_out"))


def _states(text: TextSource, item: Item) -> tuple[dict[str, Any], list[str]]:
    """The states ``(1, …)`` of a prompt by name, and a sentence if only its beginning was read."""
    text.cut = Tally()
    (states,) = text.states([item])
    return states, _cut(text)


def _cut(text: TextSource) -> list[str]:
    cut = "The prompt is longer than what the model's text encoder reads; only its beginning was read."
    return [cut] if text.cut.lines() else []


def check_picture(picture: bytes) -> None:
    """Refuse what is no picture, by one sentence.

    Args:
        picture: What was given.

    Raises:
        InputError: If it can't be read, or is too large.
    """
    from PIL import Image

    kinds = ", ".join(FORMATS[:3])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(picture), formats=FORMATS) as stored:
                width, height = stored.size
                if width * height <= MOST_PIXELS:
                    stored.load()
    except Exception:  # decoders raise nearly anything at damaged files
        raise InputError(f"This file can't be read as a picture; give a whole one ({kinds}).") from None
    if width * height > MOST_PIXELS:
        raise InputError(
            f"This picture has {width * height / 1e6:,.0f} million pixels, and no more than {MOST_PIXELS / 1e6:.0f} "
            "are taken; make it smaller."
        )


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split()).rstrip(".!")


def _without_beginning(words: str) -> str:
    while (rest := _BEGINNING.sub("", words)) != words:
        words = rest
    return words
