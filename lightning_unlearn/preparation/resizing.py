"""Pictures brought to the size of a network, as we do it or as a trainer does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_unlearn.preparation.choices import Resize
from lightning_unlearn.preparation.inputs import Array
from lightning_unlearn.preparation.pictures import crop_middle

if TYPE_CHECKING:
    from PIL.Image import Image


def resized(picture: Image, height: int, width: int, way: Resize) -> Image:
    """A picture that covers ``height`` times ``width`` pixels, cut to these.

    Args:
        picture: In mode ``"RGB"`` or ``"L"``.
        height: In pixels.
        width: In pixels.
        way: ``"bicubic"``: its middle is cut out, then resized, bicubic and antialiased. ``"kohya"``: it is resized, by
            the mean over areas where it shrinks and else by Lanczos, then cut. ``"torchvision"``: it is resized by
            Lanczos, then cut, as torchvision's Resize and CenterCrop round.

    Returns:
        The picture.
    """
    from PIL import Image

    if way == "bicubic":
        return crop_middle(picture, height, width).resize((width, height), Image.Resampling.BICUBIC)
    half = 0.5 if way == "kohya" else 0.0  # the side that is not exact is rounded here, and cut off there
    if width * picture.height >= height * picture.width:
        size = width, max(height, int(width * picture.height / picture.width + half))
    else:
        size = max(width, int(height * picture.width / picture.height + half)), height
    by_area = way == "kohya" and size[0] <= picture.width and size[1] <= picture.height
    whole = _area(picture, *size) if by_area else picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    left, top = (int(left), int(top)) if way == "kohya" else (round(left), round(top))
    return whole.crop((left, top, left + width, top + height))


def _area(picture: Image, width: int, height: int) -> Image:
    """A smaller picture, each pixel the mean of what it covers; a pixel that it covers in part counts by that part."""
    from PIL import Image

    pixels = np.asarray(picture, dtype=np.float64)
    pixels = np.tensordot(_shares(picture.height, height), pixels, axes=(1, 0))  # (height, old width, ...)
    pixels = np.moveaxis(np.tensordot(_shares(picture.width, width), pixels, axes=(1, 1)), 0, 1)  # (height, width, ...)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _shares(old: int, new: int) -> Array:
    """Which share each of ``old`` pixels has in each of ``new``: ``(new, old)``, rows that add up to 1."""
    edges = np.arange(new + 1) * (old / new)
    starts, ends = np.maximum(edges[:-1, None], np.arange(old)), np.minimum(edges[1:, None], np.arange(1, old + 1))
    shares: Array = np.clip(ends - starts, 0, None) * (new / old)
    return shares


def to_pixels(picture: Image) -> Array:
    """A picture as a network sees it.

    Args:
        picture: In mode ``"RGB"`` or ``"L"``.

    Returns:
        ``(channels, height, width)`` float32 in [-1, 1].
    """
    array = np.asarray(picture, dtype=np.float32).reshape(picture.height, picture.width, -1)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) / np.float32(127.5) - 1
