"""Pictures as a page shows them: inside it, or once for all pages in files beside them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from lightning_unlearn.data.samples import Sample

if TYPE_CHECKING:
    from PIL import Image

# Of a stored picture that is decoded; a few hundred kilobytes can claim more than a memory holds.
MOST_PIXELS = 2**26
LARGEST_SIDE = 384  # pixels of a picture in the page; larger ones are made smaller
LARGEST_IN_FILE = 192  # the same where thousands of them lie in files
LARGEST_PNG = 128  # up to this side a PNG is hardly larger than a JPEG, and exact
LARGEST_COARSE = 48  # up to this side pixels are enlarged as squares, not smoothed
# Files of pictures, whole or not.
OURS = re.compile(r"[0-9a-f]{24}\.(png|webp|tmp)")


@dataclass(frozen=True)
class Picture:
    """A picture in a page.

    Attributes:
        address: A data URI, or a file relative to the folder of pages.
        width: In pixels.
        height: In pixels.
        coarse: Whether it is so small that its pixels are shown as squares.
    """

    address: str
    width: int
    height: int
    coarse: bool


class Album(ABC):
    """Where a report keeps its pictures."""

    @abstractmethod
    def place(self, image: Image.Image) -> Picture:
        """Keep a picture.

        Args:
            image: In RGB; it may be made smaller in place.

        Returns:
            How the page refers to it.
        """


class InPage(Album):
    """Pictures that are a part of the page."""

    def place(self, image: Image.Image) -> Picture:
        """See :meth:`Album.place`."""
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        kind = "png" if max(image.size) <= LARGEST_PNG else "jpeg"
        encoded = _encoded(image, kind)
        address = f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
        return Picture(address, *image.size, coarse=max(image.size) <= LARGEST_COARSE)


class InFiles(Album):
    """Pictures in files, named by their content, so that the same one is kept once.

    Args:
        folder: Of the pages; the pictures lie in ``pictures`` in it.
    """

    NAME = "pictures"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / self.NAME
        self.folder.mkdir(parents=True, exist_ok=True)

    def place(self, image: Image.Image) -> Picture:
        """See :meth:`Album.place`."""
        image.thumbnail((LARGEST_IN_FILE, LARGEST_IN_FILE))
        kind = "png" if max(image.size) <= LARGEST_COARSE else "webp"
        encoded = _encoded(image, kind)
        path = self.folder / f"{hashlib.sha256(encoded).hexdigest()[:24]}.{kind}"
        if not path.exists():
            # Whole or not at all; thousands are not synced one by one, but together before the first page is.
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(encoded)
            temporary.replace(path)
        return Picture(f"{self.NAME}/{path.name}", *image.size, coarse=max(image.size) <= LARGEST_COARSE)


def remove_pictures(folder: Path, shown: Collection[str] = ()) -> None:
    """Remove the pictures that an earlier report left, and no page shows.

    Args:
        folder: Of the pages.
        shown: Addresses of the pictures that are shown.
    """
    for path in (folder / InFiles.NAME).glob("*"):
        if f"{InFiles.NAME}/{path.name}" not in shown and OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for empty in (folder / InFiles.NAME, folder):
        with contextlib.suppress(OSError):  # not there, or not empty
            empty.rmdir()


def image_of(sample: Sample) -> Image.Image | None:
    """A sample's picture, or the one its latent is; never an error, since the page serves without it too.

    Outside of a query's region it is faint.

    Args:
        sample: The sample.

    Returns:
        The picture, upright, in RGB; ``None`` if there is none to show.
    """
    from PIL import Image, ImageOps

    if sample.picture is not None:
        try:
            with Image.open(io.BytesIO(sample.picture), formats=("PNG", "JPEG", "WEBP")) as stored:
                stored.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
                if stored.width * stored.height > MOST_PIXELS:
                    return None
                upright = ImageOps.exif_transpose(stored).convert("RGBA")
        except Exception:  # damaged bytes make Pillow raise nearly anything
            return None
        paper = Image.new("RGBA", upright.size, "white")
        return _within(Image.alpha_composite(paper, upright).convert("RGB"), sample.mask)
    latent = sample.latent.float().numpy()  # (C, H, W)
    # An autoencoder's latents may have three channels too, but they don't keep to [-1, 1]; generated pixels nearly do.
    if latent.ndim != 3 or len(latent) not in (1, 3) or (np.abs(latent) <= 1.25).mean() < 0.95:
        return None
    pixels = np.rint((latent.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    image = Image.fromarray(pixels if len(latent) == 3 else pixels[..., 0]).convert("RGB")
    return _within(image, sample.mask)


def _within(image: Image.Image, mask: Tensor | None) -> Image.Image:
    """The picture, faint outside of its region."""
    from PIL import Image

    if mask is None:
        return image
    faint = Image.blend(image, Image.new("RGB", image.size, "white"), 0.75)
    shares = Image.fromarray(np.rint(255 * mask.numpy()).astype(np.uint8))
    return Image.composite(image, faint, shares.resize(image.size, Image.Resampling.NEAREST))


def _encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "png":
        image.save(stream, kind, optimize=True)
    else:
        image.save(stream, kind, optimize=True, quality=88 if kind == "jpeg" else 80)
    return stream.getvalue()
