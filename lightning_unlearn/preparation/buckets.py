"""Which shape a trainer brings a picture to, where it trains in buckets: the rules of two, and one of our own.

Ours brings each side to the nearest multiple of the step, at the picture's own proportion. All keep about the area of
the square that a network is trained on, and sides that are multiples of a step. They differ in which shapes there are,
and in which of these is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

BucketRule = Literal["kohya", "nearest", "ai-toolkit"]

# Height to widths of the shapes on which Stable Diffusion XL was trained (Podell et al., arXiv 2307.01952, Appendix I),
# which ai-toolkit scales; wide ones, the others are these turned.
_SDXL = {
    128: (8192,),
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}


@dataclass(frozen=True)
class Buckets:
    """How shapes are chosen.

    Attributes:
        rule: Whose.
        side: Of the square whose area shapes keep, in pixels.
        step: Sides are multiples of it.
        shortest: Of sides, in kohya's trainer.
        longest: Of sides, in kohya's trainer.
    """

    rule: BucketRule
    side: float
    step: int = 64
    shortest: int = 256
    longest: int = 1024

    def shape_of(self, height: int, width: int) -> tuple[int, int]:
        """The shape to which a picture is brought.

        Args:
            height: The picture's, in pixels.
            width: The picture's.

        Returns:
            ``(height, width)``.
        """
        return _SHAPES[self.rule](self, height, width)


def _kohya(of: Buckets, height: int, width: int) -> tuple[int, int]:
    area = int(of.side**2)
    square = max(of.step, int(math.sqrt(area)) // of.step * of.step)
    shapes = {(square, square)}
    for side in range(of.shortest, of.longest + 1, of.step):
        other = min(of.longest, area // side // of.step * of.step)
        if other >= of.shortest:
            shapes |= {(side, other), (other, side)}
    if (height, width) in shapes:
        return height, width
    # Nearest in width to height; of two as near, the narrower.
    return min(
        sorted(shapes, key=lambda shape: shape[::-1]), key=lambda shape: abs(shape[1] / shape[0] - width / height)
    )


def _nearest(of: Buckets, height: int, width: int) -> tuple[int, int]:
    def multiple(side: float) -> int:
        return max(of.step, round(side / of.step) * of.step)

    ratio = math.sqrt(width / height)
    return multiple(of.side / ratio), multiple(of.side * ratio)


def _ai_toolkit(of: Buckets, height: int, width: int) -> tuple[int, int]:
    # Nothing is enlarged beyond its own area.
    scale = min(int(of.side), int(math.sqrt(height * width))) / 1024
    wide = [(high, long) for high, widths in _SDXL.items() for long in widths]
    shapes = [
        tuple(int(side * scale) // of.step * of.step for side in shape)
        for shape in [*reversed(wide), *((long, high) for high, long in wide)]
    ]
    usable = [(high, long) for high, long in shapes if high and long] or [(of.step, of.step)]

    def lost(shape: tuple[int, int]) -> int:
        covering = max(shape[0] / height, shape[1] / width)
        high, long = int(height * covering), int(width * covering)
        return (long - shape[1]) * high + (high - shape[0]) * long

    return (height, width) if (height, width) in usable else min(usable, key=lost)


_SHAPES: dict[BucketRule, Callable[[Buckets, int, int], tuple[int, int]]] = {
    "kohya": _kohya,
    "nearest": _nearest,
    "ai-toolkit": _ai_toolkit,
}
