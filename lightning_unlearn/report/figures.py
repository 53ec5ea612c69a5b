"""Pictures and plots as they stand inside a page that opens without a network."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.data.samples import Sample

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]

# Of a stored picture that is decoded; a few hundred kilobytes can claim more than a memory holds.
MOST_PIXELS = 2**26
LARGEST_SIDE = 384  # pixels of a picture in the page; larger ones are made smaller
LARGEST_PNG = 128  # up to this side a PNG is hardly larger than a JPEG, and exact
LARGEST_COARSE = 48  # up to this side pixels are enlarged as squares, not smoothed
# Matplotlib only knows fixed colours; these stand for the page's own, which differ in light and dark.
INKS = {"#010203": "var(--muted)", "#010204": "var(--line)", "#010205": "var(--bulk)", "#010206": "var(--accent)"}
MUTED, LINE, BULK, ACCENT = INKS


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        address: A data URI.
        width: In pixels.
        height: In pixels.
        coarse: Whether it is so small that its pixels are shown as squares.
    """

    address: str
    width: int
    height: int
    coarse: bool


def power_of_ten(exponent: int) -> str:
    """A power of ten as people write it.

    Args:
        exponent: The exponent.

    Returns:
        E.g. ``"10⁻⁶"``.
    """
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def picture_of(sample: Sample | None) -> Picture | None:
    """A sample's picture inside the page (:func:`image_of`).

    Args:
        sample: The sample, if the shards still hold it.

    Returns:
        The picture, or ``None`` if there is none to show.
    """
    image = image_of(sample)
    return None if image is None else _encode(image)


def image_of(sample: Sample | None) -> Image.Image | None:
    """A sample's picture, or the one its latent is; never an error, since a page serves without it too.

    Outside of a query's region it is faint.

    Args:
        sample: The sample, if the shards still hold it.

    Returns:
        The picture in RGB, or ``None`` if there is none to show.
    """
    from PIL import Image, ImageOps

    if sample is None:
        return None
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
    if len(latent) not in (1, 3) or (np.abs(latent) <= 1.25).mean() < 0.95:
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


def _encode(image: Image.Image) -> Picture:
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    stream = io.BytesIO()
    kind = "png" if max(image.size) <= LARGEST_PNG else "jpeg"
    image.save(stream, kind, optimize=True, **({} if kind == "png" else {"quality": 88}))
    address = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Picture(address, *image.size, coarse=max(image.size) <= LARGEST_COARSE)


def histogram(scores: Floats, shown: Floats, unit_name: str, prefix: str) -> str:
    """A histogram of all scores in the page's own colours and font, with those of the shown images marked.

    Args:
        scores: ``(N,)`` of all samples.
        shown: Those of the samples that the page shows.
        unit_name: The unit they are in, e.g. a power of ten, or nothing.
        prefix: Of the ids in the figure, so that they are unique in the page.

    Returns:
        An ``<svg>`` element.
    """
    import matplotlib
    from matplotlib.figure import Figure

    low, high = float(scores.min()), float(scores.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same: one bar in the middle
        margin = 0.5 * abs(high) or 0.5
        low, high = low - margin, high + margin
    edges = np.linspace(low, high, 2 * int(np.clip(np.sqrt(len(scores)), 4, 30)) + 2)  # an odd number of bars
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a user's matplotlibrc says
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10.5})
        figure = Figure(figsize=(5.4, 2.4), dpi=72)
        axes = figure.add_axes((0.095, 0.21, 0.895, 0.67))
        for values, colour in ((scores, BULK), (shown, ACCENT)):
            # A bar of height one must be seen on a logarithmic axis, so that bars stand on a half.
            axes.stairs(np.maximum(np.histogram(values, edges)[0], 0.5), edges, baseline=0.5, fill=True, color=colour)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2.5 * max(3, np.histogram(scores, edges)[0].max()))
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value < 1e4 else power_of_ten(round(math.log10(value)))
        )
        axes.minorticks_off()
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5, labelcolor=MUTED)
        axes.spines[:].set_visible(False)
        axes.set_xlim(low, high)
        if low < 0 < high:
            axes.axvline(0, color=MUTED, linewidth=0.9, dashes=(3, 3))
        axes.set_xlabel(f"score, in units of {unit_name}" if unit_name else "score", color=MUTED)
        axes.text(0, 1.06, "training images (logarithmic)", color=MUTED, transform=axes.transAxes)
        axes.text(1, 1.06, f"{len(shown)} shown below", color=ACCENT, ha="right", transform=axes.transAxes)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    return _inline(stream.getvalue(), prefix, f"Histogram of the scores of {len(scores):,} training images.")


def _inline(svg: str, prefix: str, label: str) -> str:
    """An SVG file as a part of the page: no prologue, namespaces or size of its own, and ids that are nobody else's."""
    svg = svg[svg.index("<svg") :]
    start, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', start)
    assert view_box
    rest = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", rest)
    for ink, name in INKS.items():
        rest = rest.replace(ink, name)
    return f'<svg class="plot" role="img" aria-label="{label}" {view_box[0]}>{rest}'
