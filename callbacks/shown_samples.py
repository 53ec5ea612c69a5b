"""Pictures of samples as a run's loggers show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.report.pictures import image_of

if TYPE_CHECKING:
    from PIL import Image

SIDE = 160  # pixels of a picture in a sheet
MARGIN, LINE = 6, 13
COLUMNS = 4


class FindsSamples(Protocol):
    """What finds training samples by their keys, as this package's datamodules do.

    Another class may stand in its place, with ``find_samples`` for data of its own.
    """

    def find_samples(self, keys: Iterable[str]) -> Mapping[str, Sample]:
        """Some samples with their pictures.

        Args:
            keys: Which.

        Returns:
            Key to sample; of those that were found.
        """


@dataclass(frozen=True)
class Shown:
    """A picture with what is said of it.

    Attributes:
        name: Short, beneath the picture.
        caption: Of the sample, and whatever else is said.
        image: In RGB; ``None`` if there is nothing to see.
    """

    name: str
    caption: str
    image: Image.Image | None


def shown(sample: Sample | None, name: str, said: str) -> Shown:
    """A sample as it is shown.

    Args:
        sample: ``None`` if it was not found.
        name: Short, beneath the picture.
        said: What is said of it, before its first caption.

    Returns:
        It.
    """
    caption = sample.captions[0] if sample is not None else ""
    return Shown(name, f"{said} · {caption}" if caption else said, None if sample is None else image_of(sample))


def sheet_of(pictures: Sequence[Shown]) -> Image.Image:
    """Pictures in rows, each with its name beneath.

    Args:
        pictures: At least one.

    Returns:
        One picture in RGB.
    """
    from PIL import Image, ImageDraw

    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    wide, high = SIDE + 2 * MARGIN, SIDE + 2 * MARGIN + LINE
    sheet = Image.new("RGB", (columns * wide, rows * high), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(pictures):
        left, top = number % columns * wide + MARGIN, number // columns * high + MARGIN
        if one.image is None:
            pen.rectangle((left, top, left + SIDE, top + SIDE), fill="#e8e8e8")
        else:
            image = _fitted(one.image)
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        pen.text((left, top + SIDE + 2), _short(one.name), fill="#303030")
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    from PIL import Image

    scale = SIDE / max(image.size)
    # Pixels of a very small picture are shown as squares, not smoothed.
    way = Image.Resampling.NEAREST if scale >= 3 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), way)


def _short(name: str) -> str:
    # The font that is always there knows no other letters.
    plain = name.encode("ascii", "replace").decode()
    return plain if len(plain) <= 26 else f"{plain[:25]}~"
