"""What a set will take on the disk, told before it is made."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lightning_unlearn.errors import InputError

_BLOCK = 512  # of a tar, which gives each member a header of one, and fills up its last
_NPY_HEADER = 128
# WebP at quality 80: photographs come to about so many bytes a pixel.
_PREVIEW_BYTES_PER_PIXEL = 0.2


def size_on_disk(
    samples: int,
    captions: int,
    latent_shape: Sequence[int],
    text_shapes: Mapping[str, Sequence[int]],
    dtype: str,
    flips: bool,
    picture_size: int,
) -> int:
    """What a set will take, in bytes; exact but for pictures and the samples' json.

    Args:
        samples: How many there are.
        captions: For how many captions of them there are states, of those that are shared one a shard.
        latent_shape: Of one sample.
        text_shapes: Of what is stored of each caption, by name; ``text`` is ``(tokens, dim)``.
        dtype: Of both.
        flips: Whether there are latents of the mirrored pictures.
        picture_size: Longer side of the pictures for people; 0 for none.

    Returns:
        The bytes.
    """
    width = np.dtype(dtype).itemsize
    latent = _member(_NPY_HEADER + width * math.prod(latent_shape))
    numbers = sum(math.prod(shape) for shape in text_shapes.values())
    text = samples * len(text_shapes) * (_BLOCK + _NPY_HEADER + _BLOCK // 2) + captions * width * numbers
    picture = _member(round(picture_size**2 * _PREVIEW_BYTES_PER_PIXEL)) if picture_size else 0
    return samples * (latent * (1 + flips) + picture + _member(_BLOCK // 2)) + text


def _member(size: int) -> int:
    return _BLOCK + math.ceil(size / _BLOCK) * _BLOCK


def say_size(samples: int, size: int, folder: Path) -> str:
    """One sentence on what a set will take.

    Args:
        samples: How many there are.
        size: In bytes.
        folder: Where they go.

    Returns:
        The sentence.

    Raises:
        InputError: If there is less room than that.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{samples} samples take about {in_words(size)}, but {folder} has {in_words(free)} left; "
            "choose another output, or dtype=float16, picture_size=0, fewer samples."
        )
    return f"{samples} sample{'s' * (samples != 1)} will take about {in_words(size)} in {folder}."


def in_words(size: float) -> str:
    """A size as people read it.

    Args:
        size: In bytes.

    Returns:
        Such as ``"1.5 GB"``.
    """
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
