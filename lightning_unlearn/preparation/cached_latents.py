"""Latents that kohya's trainer kept beside the pictures: what its training really saw, without a VAE."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.inputs import Array, Item
from lightning_unlearn.preparation.records import PATH_COLUMN, SKIP, Record
from lightning_unlearn.preparation.tally import Tally

# `a_0512x0768_sd.npz` is of a.png, which has 512 x 768 pixels. What lies in it is not scaled; training does that.
_NAME = re.compile(r"(?P<stem>.+)_\d+x\d+_(?P<kind>sd|sdxl)\.npz")
_FACTORS = {"sd": 0.18215, "sdxl": 0.13025}
PIXELS_A_LATENT = 8


class CachedLatents:
    """Latents in ``*_sd.npz`` or ``*_sdxl.npz`` files.

    Args:
        folder: Where they lie, as the pictures do in theirs.
        tally: Counts files that can't be used.

    Raises:
        InputError: If there are none, or of two models.
    """

    def __init__(self, folder: Path, tally: Tally) -> None:
        self._files: dict[str, list[Path]] = {}
        kinds, shapes = set[str](), Counter[tuple[int, ...]]()
        for path in sorted(folder.rglob("*.npz")):
            name = path.relative_to(folder).as_posix()
            if match := _NAME.fullmatch(name):
                kinds.add(match["kind"])
                self._files.setdefault(match["stem"], []).append(path)
                try:
                    shapes[_read(path)["latents"].shape] += 1
                except InputError:
                    continue  # its sample is a bad one, see `facts`
            else:
                tally.add("npz files are no latents of kohya's for SD or SDXL", name)
        if not shapes:
            raise InputError(f"{folder} has no cached latents that can be read (*_sd.npz, *_sdxl.npz); name another.")
        if len(kinds) > 1:
            raise InputError(f"{folder} has cached latents of SD and of SDXL; leave those of one model there.")
        factor = _FACTORS[kinds.pop()]
        self.crop: tuple[int, int] | None = None
        self.mode = "RGB"
        self.rows: int | None = None
        self.shape: tuple[int, ...] = shapes.most_common(1)[0][0]
        self.factor = np.float32(factor)
        self.about: dict[str, Any] = {"space": "latent", "vae": "cached by kohya", "shift": [0.0], "factor": [factor]}

    def facts(self, record: Record) -> dict[str, Any]:
        """See :class:`LatentSource`.

        Args:
            record: The sample.

        Returns:
            Size of its picture and what was cut from it, as kohya's trainer wrote them.

        Raises:
            InputError: If it has no latent that can be read.
        """
        arrays = _read(self._file(record))
        known: dict[str, Any] = {
            name: arrays[name].tolist() for name in ("original_size", "crop_ltrb") if name in arrays
        }
        if "alpha_mask" in arrays:
            known["alpha_mask"] = "was cached, and is not taken"
        return {"kohya": known} if known else {}

    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """See :class:`LatentSource`."""
        name = "latents_flipped" if mirrored else "latents"
        return np.stack([self._scaled(item, name) for item in items])

    def numbers(self, item: Item) -> dict[str, list[int]]:
        """See :class:`LatentSource`; the sizes that Stable Diffusion XL is told, height before width.

        Args:
            item: The sample.

        Returns:
            None where the cache does not say them.
        """
        arrays = _read(self._file(item.record))
        if not {"original_size", "crop_ltrb"} <= arrays.keys():
            return {}
        (width, height), (left, top, *_) = (
            arrays[name].astype(int).tolist() for name in ("original_size", "crop_ltrb")
        )
        target = [side * PIXELS_A_LATENT for side in arrays["latents"].shape[-2:]]
        return {"original_size": [height, width], "crop_top_left": [top, left], "target_size": target}

    def _scaled(self, item: Item, name: str) -> Array:
        path = self._file(item.record)
        arrays = _read(path)
        if name not in arrays:
            raise InputError(f"{path} has no {name}: it was cached without flips; leave `flips` out.")
        scaled: Array = arrays[name].astype(np.float32) * self.factor
        return scaled

    def _file(self, record: Record) -> Path:
        stem = PurePosixPath(record.metadata.get(PATH_COLUMN, record.key)).with_suffix("").as_posix()
        found = self._files.get(stem, [])
        if len(found) != 1:
            held = f"{len(found)} cached latents" if found else "no cached latent"
            raise InputError(f"{record.place} has {held}; cache it anew, or {SKIP}.")
        return found[0]


def _read(path: Path) -> dict[str, Array]:
    """The arrays of a file, by their names without a resolution at their end."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = {re.sub(r"_\d+x\d+$", "", name): name for name in file.files}
            if len(names) != len(file.files):
                raise InputError(f"{path} has latents of several resolutions; cache it anew with one, or {SKIP}.")
            arrays = {plain: np.asarray(file[name]) for plain, name in names.items()}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} can't be read ({reason}); cache it anew, or {SKIP}.") from None
    for name in ("latents", "latents_flipped"):
        array = arrays.get(name)
        if array is None and name == "latents_flipped":
            continue
        if array is None or array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
            raise InputError(f"{path} has no latents (C, H, W); cache it anew, or {SKIP}.")
        if array.shape != arrays["latents"].shape:
            raise InputError(f"{path}: its latents and those of the mirrored picture differ in shape; cache it anew.")
    return arrays
