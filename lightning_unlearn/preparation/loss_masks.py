"""Masks of trainers: which part of a picture the loss was of, brought to the picture's own shape."""

from __future__ import annotations

import io
from pathlib import Path

from PIL.Image import Image
from PIL.Image import open as open_image

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import Choices
from lightning_unlearn.preparation.layouts.files import LOSS_MASK, readable_suffixes
from lightning_unlearn.preparation.pictures import open_picture
from lightning_unlearn.preparation.records import PATH_COLUMN, SKIP, Record
from lightning_unlearn.preparation.resizing import resized


def loss_mask(record: Record, choices: Choices, height: int, width: int) -> bytes | None:
    """The mask that training used of a picture.

    Args:
        record: The sample, with a picture.
        choices: Where masks are: beside pictures as OneTrainer calls them, in a folder of their own as ai-toolkit's
            and kohya's trainers have them, or in the picture's transparency as in kohya's ``alpha_mask``.
        height: Of the picture as it is encoded.
        width: Likewise.

    Returns:
        An 8-bit grey PNG, white where the loss was; ``None`` if it was of the whole picture.

    Raises:
        InputError: If a mask can't be read, or is all black.
    """
    mask = _alpha(record, choices) if choices.masks == "alpha" else _of_file(record, choices)
    if mask is None:
        return None
    mask = resized(mask, height, width, choices.resize)
    if mask.getextrema() == (0, 0):
        raise InputError(f"The mask of {record.place} is all black, so there was no loss; mend it, or {SKIP}.")
    stream = io.BytesIO()
    mask.save(stream, "png")
    return stream.getvalue()


def _of_file(record: Record, choices: Choices) -> Image | None:
    if not isinstance(record.picture, Path):
        return None
    if choices.mask_folder is None:
        beside = record.picture.with_name(record.picture.stem + LOSS_MASK)
        found = [beside] if beside.is_file() else []
    else:
        inside = Path(choices.mask_folder).expanduser() / record.metadata.get(PATH_COLUMN, record.picture.name)
        found = [path for path in map(inside.with_suffix, sorted(readable_suffixes())) if path.is_file()]
    if len(found) > 1:
        raise InputError(f"{record.place} has several masks, {found[0].name} and {found[1].name}; keep one, or {SKIP}.")
    return open_picture(found[0], str(found[0]), "L", choices) if found else None


def _alpha(record: Record, choices: Choices) -> Image | None:
    from PIL import ImageOps

    assert record.picture is not None
    try:
        with open_image(io.BytesIO(record.picture) if isinstance(record.picture, bytes) else record.picture) as file:
            picture = ImageOps.exif_transpose(file) if choices.exif == "turn" else file
            if not picture.mode.upper().endswith("A") and "transparency" not in picture.info:
                return None
            alpha: Image = picture.convert("RGBA").getchannel("A")
            return alpha
    except Exception as error:  # decoders raise nearly anything at damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{record.place} can't be read as a picture ({reason}); replace it, or {SKIP}.") from None
