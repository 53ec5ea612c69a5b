"""Picture files as they are read: upright, on white, or as a trainer left them; and small ones for people."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import Choices

if TYPE_CHECKING:
    from PIL.Image import Image


def open_picture(source: Path | bytes, place: str, mode: str, choices: Choices) -> Image:
    """Read a picture whole.

    It is turned as its EXIF orientation says, and laid over white where transparent, unless it was chosen otherwise. Of
    several frames the first is taken.

    Args:
        source: The file, or its bytes.
        place: Where it stands, for messages.
        mode: ``"RGB"`` or ``"L"``.
        choices: Whether it is turned, and what is transparent.

    Returns:
        The picture.

    Raises:
        InputError: If it can't be read, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            if file.mode.startswith(("I", "F")):
                # Pillow would cut these off at 255 and give a white picture.
                raise InputError(f"{place} has more than 8 bits a channel (mode {file.mode}); save it with 8.")
            picture = ImageOps.exif_transpose(file) if choices.exif == "turn" else file
            see_through = picture.mode.upper().endswith("A") or "transparency" in picture.info
            if see_through and choices.alpha == "white":
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB").convert(mode)
    except InputError:
        raise
    except Exception as error:  # decoders raise nearly anything at damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{place} can't be read as a picture ({reason}); replace it, or leave it out with on_bad_sample=skip."
        ) from None


def crop_middle(picture: Image, height: int, width: int) -> Image:
    """The largest part of a picture, in its middle, that has the proportions of ``height`` and ``width``.

    Args:
        picture: Any picture.
        height: Of what it will be resized to.
        width: Likewise.

    Returns:
        The part, in the picture's own resolution.
    """
    scale = min(picture.width / width, picture.height / height)
    part_width, part_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (picture.width - part_width) // 2, (picture.height - part_height) // 2
    return picture.crop((left, top, left + part_width, top + part_height))


def to_preview(picture: Image, size: int) -> bytes:
    """A small picture for people to look at.

    Args:
        picture: Any picture.
        size: Its longer side will be at most so many pixels; it is never enlarged.

    Returns:
        A WebP file.
    """
    from PIL import Image

    preview = picture.copy()
    preview.thumbnail((size, size), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    preview.save(stream, "webp", quality=80)
    return stream.getvalue()
