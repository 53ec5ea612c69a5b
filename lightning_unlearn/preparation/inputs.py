"""What ``prepare`` knows of a model: a source of latents and a source of text, such as pixels and ready arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.tally import Tally

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Taken:
    """What was taken of a picture.

    Attributes:
        original: ``(height, width)`` of all of it.
        corner: ``(top, left)`` of what was cut out, after it was resized.
    """

    original: tuple[int, int]
    corner: tuple[int, int]


@dataclass(frozen=True)
class Item:
    """One sample on its way to a shard.

    Attributes:
        index: Its row in the source, from 0.
        record: What is known of it.
        pixels: ``(channels, height, width)`` float32 in [-1, 1]; ``None`` where latents are ready.
        preview: An encoded picture for people to look at, if there is one.
        taken: Which part of the picture the pixels are.
        mask: Where training had its loss, an encoded picture.
    """

    index: int
    record: Record
    pixels: Array | None = None
    preview: bytes | None = None
    taken: Taken | None = None
    mask: bytes | None = None


class LatentSource(Protocol):
    """Gives the latents of samples.

    Attributes:
        crop: ``(height, width)`` of the pictures it takes, ``None`` if it takes none.
        mode: Their mode, Pillow's ``"RGB"`` or ``"L"``.
        rows: How many latents there are, if they are ready.
        shape: Of one latent, ``(C, H, W)``.
        about: What the manifest says of it.
    """

    crop: tuple[int, int] | None
    mode: str
    rows: int | None
    shape: tuple[int, ...]
    about: dict[str, Any]

    def facts(self, record: Record) -> dict[str, Any]:
        """What it knows of a sample, for its json; an :class:`InputError` if it has no latent of it."""
        ...

    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """Latents ``(B, C, H, W)`` of ``B`` samples' pictures, or of their mirror images."""
        ...

    def numbers(self, item: Item) -> dict[str, list[int]]:
        """What a network is told of a picture in numbers, by name."""
        ...


class TextSource(Protocol):
    """Gives the text states of samples.

    Attributes:
        rows: How many samples it has text for, if it is ready.
        captions: How many captions each of these has.
        shapes: Name to the shape for one caption; ``text`` is ``(tokens, dim)``.
        cut: Captions that were longer than what is read of them; the first of these, and how many.
        about: What the manifest says of it.
    """

    rows: int | None
    captions: int | None
    shapes: dict[str, tuple[int, ...]]
    cut: Tally
    about: dict[str, Any]

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """The conditions of ``B`` samples by name; ``text`` is ``(captions, tokens, dim)``."""
        ...


def stack_pixels(items: Sequence[Item], *, mirrored: bool) -> Array:
    """The pictures of samples as a batch.

    Args:
        items: ``B`` samples with pixels.
        mirrored: Whether left and right change places.

    Returns:
        ``(B, channels, height, width)`` float32 in [-1, 1].
    """
    pixels = np.stack([item.pixels for item in items if item.pixels is not None])
    return np.ascontiguousarray(pixels[..., ::-1]) if mirrored else pixels


class PixelLatents:
    """The pictures themselves, for a network that works on pixels.

    Args:
        size: Side of the square pictures.
        grey: Whether they have one channel instead of three.
    """

    def __init__(self, size: int, grey: bool) -> None:
        self.crop: tuple[int, int] | None = (size, size)
        self.mode = "L" if grey else "RGB"
        self.rows: int | None = None
        self.shape: tuple[int, ...] = (1 if grey else 3, size, size)
        self.about: dict[str, Any] = {"space": "pixel"}

    def facts(self, record: Record) -> dict[str, Any]:
        """See :class:`LatentSource`; it has a latent of each sample."""
        return {}

    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """See :class:`LatentSource`."""
        return stack_pixels(items, mirrored=mirrored)

    def numbers(self, item: Item) -> dict[str, list[int]]:
        """See :class:`LatentSource`; none."""
        return {}


_LATENTS = "(N, C, H, W) or (N, C, F, H, W)"


class ReadyLatents:
    """Latents that someone made before, read from the disk as they are needed.

    Args:
        path: An ``.npy`` file ``(N, C, H, W)``, or ``(N, C, F, H, W)`` of videos.
        path_flip: Those of the mirrored pictures; the same file if it has ``2 N`` rows, theirs behind the others.

    Raises:
        InputError: If a file can't be read, they differ in shape, or one file of both has no two halves.
    """

    def __init__(self, path: str, path_flip: str | None) -> None:
        self.sides = {False: open_array(path, (4, 5), _LATENTS)}
        if path_flip is not None and Path(path_flip).resolve() == Path(path).resolve():
            both = self.sides[False]
            if len(both) % 2:
                raise InputError(
                    f"{path} is named for pictures and for mirrored ones, but its {len(both)} rows are not twice as "
                    "many as the pictures; leave `latents_flip` out, or name another array."
                )
            self.sides = {False: both[: len(both) // 2], True: both[len(both) // 2 :]}
        elif path_flip is not None:
            self.sides[True] = open_array(path_flip, (4, 5), _LATENTS)
            if self.sides[True].shape != self.sides[False].shape:
                raise InputError(
                    f"{path_flip} {self.sides[True].shape} and {path} {self.sides[False].shape} differ in shape; "
                    "name arrays of the same pictures."
                )
        self.crop: tuple[int, int] | None = None
        self.mode = "RGB"
        self.rows: int | None = len(self.sides[False])
        self.shape: tuple[int, ...] = self.sides[False].shape[1:]
        self.about: dict[str, Any] = {"space": "latent", "vae": "ready array"}

    def facts(self, record: Record) -> dict[str, Any]:
        """See :class:`LatentSource`; it has a latent of each sample."""
        return {}

    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """See :class:`LatentSource`."""
        return np.stack([self.sides[mirrored][item.index] for item in items])

    def numbers(self, item: Item) -> dict[str, list[int]]:
        """See :class:`LatentSource`; none."""
        return {}


class ReadyText:
    """Text states that someone made before, read from the disk as they are needed.

    Args:
        path: An ``.npy`` file ``(N, captions, tokens, dim)``, or ``(N, tokens, dim)`` for one caption each.

    Raises:
        InputError: If it can't be read.
    """

    def __init__(self, path: str) -> None:
        array = open_array(path, (3, 4), "(N, captions, tokens, dim) or (N, tokens, dim)")
        self.array = array if array.ndim == 4 else array[:, None]  # (N, captions, tokens, dim)
        self.rows: int | None = len(array)
        self.captions: int | None = self.array.shape[1]
        self.shapes: dict[str, tuple[int, ...]] = {"text": self.array.shape[2:]}
        self.cut = Tally()
        self.about: dict[str, Any] = {"encoder": "ready array"}

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """See :class:`TextSource`."""
        return [{"text": self.array[item.index]} for item in items]


def open_array(path: str, dimensions: tuple[int, ...], form: str) -> Array:
    """An array on the disk, of which only what is asked for is read.

    Args:
        path: An ``.npy`` file.
        dimensions: How many it may have.
        form: What these are, for messages.

    Returns:
        The array, of floating point numbers.

    Raises:
        InputError: If it can't be read, or is another.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path} can't be read as a plain NumPy array ({str(error).splitlines()[0]}); write it with numpy.save."
        ) from None
    if not isinstance(array, np.ndarray) or array.ndim not in dimensions or not np.issubdtype(array.dtype, np.floating):
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InputError(
            f"{path} holds {what}, but must be {form} of floating point numbers; write it so with numpy.save."
        )
    return array
