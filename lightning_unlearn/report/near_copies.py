"""Near-copies among training images: pictures that differ in size, brightness or compression alone.

Their influence is shared among them, so that each alone stands lower than the picture that they all show. They are
found by their pixels: two pictures are near-copies where small versions of them correlate and differ much in no place.
What brightening has cut off
at white is lost, so both are first made as bright as a common level: of a picture and of its brighter copy, cut off
higher up, the same is left.

Perceptual hashes (ImageHash) tell too little: of 544 emoji the 64 bits of its pHash call 104 pairs of different ones
alike at the distance that half of all copies have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Code = NDArray[np.uint8]

SIDE = 16  # pixels of the versions that are compared
FINE = 64  # pixels at which pictures are brightened: white is cut off in pixels, not in means of many
# Mean brightness of the levels, 1 for white. A picture has those that are brighter than it is.
LEVELS = (0.0, 0.4, 0.6, 0.8, 0.9, 0.95)  # 0: as it is
MOST_GAIN = 64.0  # times as bright: beyond it hardly more than noise is seen
LEAST_SCATTER = 0.01  # of a version's values, 1 for white: of a flat picture nobody knows what it is a copy of
# Correlation from which on two pictures are near-copies, at each level: near white less is left that tells them apart.
LEAST_ALIKE = (0.997, 0.997, 0.997, 0.997, 0.9985, 0.9985)
# The same of two as they are, whatever the level: brightening makes pastel colours white, and leaves the same outlines.
LEAST_ALIKE_AS_THEY_ARE = 0.97
# How far apart any value of both may be, in deviations of all: where a small thing differs, much else agrees.
MOST_APART = 0.45
BLOCK = 1024  # pictures that are compared with all at a time


def code_of(image: Image.Image) -> Code:
    """What is kept of a picture so that its near-copies are found.

    Args:
        image: Of any size.

    Returns:
        ``(levels, SIDE, SIDE, 3)``, the picture as it is and at each level, 255 for white; all zero at levels that it
        has not.
    """
    from PIL import Image as Images

    small = image.convert("RGB").resize((FINE, FINE), Images.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(small)
    counts = np.bincount(pixels.ravel(), minlength=256)
    code = np.zeros((len(LEVELS), SIDE, SIDE, 3), np.uint8)
    for place, level in enumerate(LEVELS):
        gain = 1.0 if level == 0 else _gain(counts, level)
        if gain is not None:
            bright = np.minimum(255, gain * np.arange(256, dtype=np.float32))[pixels]
            code[place] = np.rint(bright.reshape(SIDE, FINE // SIDE, SIDE, FINE // SIDE, 3).mean((1, 3)))
    return code


def _gain(counts: NDArray[np.int64], level: float) -> float | None:
    """How many times as bright a picture's mean is the level, white being cut off; ``None`` where it can't be so."""
    # With values up to a certain one below white, and all others white, the mean is linear in the gain.
    values = np.arange(256) / 255
    below = np.cumsum(counts * values)
    white = counts.sum() - np.cumsum(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = (level * counts.sum() - white) / below
        fits = (gains * values <= 1 + 1e-9) & (gains * np.append(values[1:], np.inf) >= 1 - 1e-9)
    fits &= (gains >= 1) & (gains <= MOST_GAIN)
    return float(gains[fits][0]) if fits.any() else None


def near_copies(codes: Mapping[str, Code]) -> dict[str, tuple[str, ...]]:
    """Which pictures are near-copies of each other.

    Each is compared with the first of its group, in the order of keys, so that groups don't grow in chains.

    Args:
        codes: Key to :func:`code_of` its picture.

    Returns:
        Of each picture that has near-copies, the keys of its group in their order, its own among them.
    """
    keys = sorted(codes)
    free = np.ones(len(keys), bool)
    groups: dict[str, tuple[str, ...]] = {}
    levels = [_versions([codes[key][place] for key in keys]) for place in range(len(LEVELS))]
    for start in range(0, len(keys), BLOCK):
        stop = min(start + BLOCK, len(keys))
        # Those before belong to earlier blocks.
        whole = levels[0][start:stop] @ levels[0][start:].T >= LEAST_ALIKE_AS_THEY_ARE
        alike = [
            (versions[start:stop] @ versions[start:].T >= least) & whole
            for versions, least in zip(levels, LEAST_ALIKE, strict=True)
        ]
        for row in np.flatnonzero(free[start:stop]):
            if not free[start + row]:
                continue
            found = np.zeros(len(keys) - start, bool)
            for versions, near in zip(levels, alike, strict=True):
                members = np.flatnonzero(near[row] & free[start:] & ~found)
                found[members] = _nowhere_apart(versions[start + row], versions[start + members])
            members = np.flatnonzero(found)
            if len(members) < 2:
                continue
            free[start + members] = False
            group = tuple(keys[start + member] for member in members)
            groups |= dict.fromkeys(group, group)
    return groups


def _nowhere_apart(version: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which others of mean 0 and length 1, ``(M, D)``, differ from one, ``(D,)``, by little in each value."""
    near: NDArray[np.bool_] = np.abs(others - version).max(1, initial=0) * np.sqrt(len(version)) <= MOST_APART
    return near


def _versions(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """``(N, SIDE * SIDE * 3)`` of mean 0 and length 1, so that products are correlations; zero for flat ones."""
    values = np.stack(pictures).reshape(len(pictures), -1).astype(np.float32) if pictures else np.zeros((0, 1), "f4")
    values -= values.mean(1, keepdims=True)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    flat = lengths < 255 * LEAST_SCATTER * np.sqrt(values.shape[1])
    return np.where(flat, 0, values / np.where(flat, 1, lengths)).astype(np.float32)
