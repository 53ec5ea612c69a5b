"""The region of a query that is unlearned, or that training looked at: grey, white inside, of the latent's size."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.errors import InputError

MASK_FIELD = "mask.png"
LOSS_MASK_FIELD = "loss_mask.png"
# More than anybody's picture has, and not enough to fill a memory.
MOST_PIXELS = 2**24


def decode_mask(content: bytes, height: int, width: int, where: str, field: str = MASK_FIELD) -> Tensor:
    """Decode a mask and average it over the area of each of the latent's places.

    Args:
        content: An 8-bit grey PNG of any size: white (255) is in the region, black (0) is not.
        height: The latent's.
        width: The latent's.
        where: Whose mask it is, for messages.
        field: Its name in the shard, likewise.

    Returns:
        ``(H, W)`` float32: how much of each place is in the region; exactly 1 where all of it is.

    Raises:
        InputError: If it is no such picture, too large, or the region is empty.
    """
    grey = _decode(content, where, field)
    if not grey.any():
        raise InputError(f"{where}: {field} is all black, so there is no region; make the region white.")
    # Whole numbers below 2**53, so that the sums are exact.
    sums = _overlaps(grey.shape[0], height) @ grey.astype(np.float64) @ _overlaps(grey.shape[1], width).T
    return torch.from_numpy(sums / (255.0 * grey.size)).float()


def _decode(content: bytes, where: str, field: str) -> NDArray[np.uint8]:
    from PIL import Image

    remedy = "save an 8-bit grey PNG"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # No other decoder sees the bytes.
            with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
                size = picture.width * picture.height
                if size > MOST_PIXELS:
                    raise InputError(
                        f"{where}: {field} has {picture.width}×{picture.height} pixels, more than {MOST_PIXELS}; "
                        "make it smaller."
                    )
                if picture.mode != "L":
                    raise InputError(f"{where}: {field} is of the kind {picture.mode}, not 8-bit grey; {remedy}.")
                return np.asarray(picture)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{where}: {field} can't be read as a PNG ({reason}); {remedy}.") from None


def _overlaps(pixels: int, places: int) -> NDArray[Any]:
    """``(places, pixels)``: the length that each place and pixel share, on a line of ``pixels · places``."""
    left, top = np.arange(pixels) * places, np.arange(places)[:, None] * pixels
    shared = np.minimum(left + places, top + pixels) - np.maximum(left, top)
    return shared.clip(min=0).astype(np.float64)
