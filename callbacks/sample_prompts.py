"""A training's own sample prompts, answered for: as queries in a shard."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unlearn.data.conditions import CONDITION_FIELDS, NUMBERS
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.sampling import generate, has_sampler, how_generated
from lightning_unlearn.errors import InputError

Generate: TypeAlias = Callable[[nn.Module, list[Any]], Sequence[Sample]]
"""Makes queries: of a frozen copy of the network and what ``prompts`` holds."""


def generated(network: nn.Module, objective: Objective, queries: Sequence[Sample], steps: int) -> list[Sample]:
    """Generate each query anew: from its first caption's states and its seed, by the network as it is now.

    Args:
        network: Frozen.
        objective: It was trained with.
        queries: Whose prompts; ``seed`` in the json of each, by default its number.
        steps: Of the package's sampler, without guidance (:func:`~lightning_unlearn.diffusion.sampling.generate`).

    Returns:
        The same keys with other latents, without pictures.

    Raises:
        InputError: If there is no sampler for the objective.
    """
    if not has_sampler(objective):
        raise InputError(
            f"The package can't sample from a model trained with {type(objective).__name__}; give AttributionLogger a "
            "function as generate, or queries that are made already."
        )
    made = []
    for number, query in enumerate(queries):
        seed = int(query.metadata.get("seed", number))
        first = {name: array[:1] for name, array in query.conditions.items()}
        latent = generate(network, objective, first, query.latent.shape, [seed], steps)[0].clone()
        facts = {**query.metadata, "captions": query.captions[:1], **how_generated(objective, seed, steps)}
        made.append(Sample(query.key, latent, first, facts))
    return made


def write_queries(queries: Sequence[Sample], folder: Path) -> None:
    """Write queries as a shard, so that an answer can be asked again.

    Args:
        queries: At least one; with unique keys.
        folder: Of the shard.

    Raises:
        InputError: If there is none, or something else than samples.
    """
    others = [type(query).__name__ for query in queries if not isinstance(query, Sample)]
    if others or not queries:
        what = f"a {others[0]}" if others else "nothing"
        raise InputError(f"AttributionLogger answers for Samples, but was given {what}; let generate return Samples.")
    write_shards([_fields(query) for query in queries], folder, name="queries")


def _fields(query: Sample) -> dict[str, Any]:
    numbers = query.metadata.get(NUMBERS, {})
    named = {
        name: _array(array)
        for name, array in query.conditions.items()
        if name not in numbers and f"{name}.npy" in CONDITION_FIELDS
    }
    flip = None if query.latent_flip is None else _array(query.latent_flip)
    mask = None if query.mask is None else _grey(query.mask)
    return encode_sample(
        query.key,
        _array(query.latent),
        named,
        query.metadata,
        latent_flip=flip,
        picture=query.picture,
        picture_format=_format(query.picture),
        mask=mask,
    )


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


def _grey(mask: Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.rint(255 * _array(mask)).astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def _format(picture: bytes | None) -> str:
    if picture is None or picture.startswith(b"\x89PNG"):
        return "png"
    return "webp" if picture[8:12] == b"WEBP" else "jpg"
