"""Queries out of what a person asks, one at a time and in memory: a prompt, or a picture with its prompt.

They become samples as the training's pictures did: by the same encoders, cut and resized alike.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.diffusion.sampling import Samplable, generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.asked_prompts import Prompts, cut_notes
from lightning_unlearn.preparation.encoding import Encoding
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.tally import Tally

if TYPE_CHECKING:
    from PIL import Image

# Of a picture that is given; a small file can claim more than a memory holds.
MOST_PIXELS = 2**26
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
STEPS = 40


@dataclass(frozen=True)
class Made:
    """A query that was made of what a person gave.

    Attributes:
        sample: With a picture to look at, if there is one.
        notes: Sentences that the person should know, e.g. that a prompt was cut.
    """

    sample: Sample
    notes: Sequence[str] = ()


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
        return Made(decode_sample(fields), cut_notes(self.encoding.text))


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
