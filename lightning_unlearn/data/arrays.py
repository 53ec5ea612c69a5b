"""NumPy files as they lie in a shard: checked by their header before memory is taken, and never unpickled."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_unlearn.errors import InputError

# Nobody's data comes near it: latents are some 100 at most, and hidden states of language models, which are the largest
# that networks are conditioned on, below a million. Beyond, losses would drown all others or be no numbers.
LARGEST_LATENT = 1e4
LARGEST_TEXT = 1e7


def decode_array(content: bytes, name: str, dimensions: int | tuple[int, ...], largest: float, where: str) -> Tensor:
    """Decode and check an array.

    Args:
        content: An ``.npy`` file of float16 or float32.
        name: Of the field, for messages.
        dimensions: How many it must have; several numbers are all right.
        largest: The largest magnitude that is taken for a number somebody meant.
        where: Whose array it is, for messages.

    Returns:
        The array, float32.

    Raises:
        InputError: If it is no such array, its size is not that of its header, or a number is out of range.
    """
    try:
        shape, fortran_order, dtype, start = read_header(content)
        if dtype.hasobject:
            raise InputError("it holds objects")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise InputError(f"its shape is {shape}")
    except Exception as error:  # a damaged header makes NumPy raise nearly anything, TokenError among it
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"{where}: {name} is not a plain NumPy array ({reason}); write it with numpy.save.") from None
    right = (dimensions,) if isinstance(dimensions, int) else dimensions
    if dtype not in (np.float16, np.float32) or len(shape) not in right:
        raise InputError(
            f"{where}: {name} is {dtype} with {len(shape)} dimensions, but must be float16 or float32 with "
            f"{' or '.join(map(str, right))}; make the shard again with `lightning-unlearn prepare`."
        )
    promised, held = math.prod(shape) * dtype.itemsize, len(content) - start
    if promised != held:
        raise InputError(
            f"{where}: {name} is not a plain NumPy array (its header promises {shape}, {promised} bytes, and {held} "
            "follow); write it with numpy.save."
        )
    if promised == 0:
        raise InputError(f"{where}: {name} is empty, {shape}; make this sample again or leave it out.")
    array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    array = np.array(array, np.float32, order="C")
    # NaN is what it compares with nothing to.
    magnitude = max(float(array.max()), -float(array.min()))
    if not math.isfinite(magnitude):
        raise InputError(f"{where}: {name} holds NaN or infinity; make this sample again or leave it out.")
    if magnitude > largest:
        raise InputError(
            f"{where}: {name} holds numbers as large as {magnitude:.3g}, more than {largest:.0e}; make this sample "
            "again or leave it out."
        )
    return torch.from_numpy(array)


def read_header(content: bytes) -> tuple[tuple[int, ...], bool, Any, int]:
    """What the header of an array's file says.

    Args:
        content: An ``.npy`` file.

    Returns:
        Its shape, whether the first axis changes fastest, its dtype, and where its numbers begin.

    Raises:
        Exception: Of nearly any kind, if it is damaged.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran_order, dtype = read(stream)
    return shape, fortran_order, dtype, stream.tell()
