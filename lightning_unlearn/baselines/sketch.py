"""Gradients brought to few numbers that keep their products: what makes the gradients of all samples fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.fingerprints import generator_for

# What the gradients of all samples may take together, float32, before they are brought to fewer numbers.
GRADIENT_BYTES = 2**31
# Of so many numbers at most and at least. Above the first a sketch is hardly better; with fewer than the second it says
# little, so that memory grows with the samples from there on.
MOST_NUMBERS, LEAST_NUMBERS = 2**16, 2**11
# Of so many samples at most a kernel of samples by samples is decomposed, of more one of numbers by numbers.
KERNEL_SIDE = 2**13


def sketch_numbers(samples: int, weights: int, kinds: int) -> int | None:
    """To how many numbers the gradients of samples are to be brought.

    Args:
        samples: How many there are.
        weights: How many weights are chosen.
        kinds: How many gradients each sample has, by how many output functions.

    Returns:
        The number; ``None`` where all of them fit as they are.

    Example:
        >>> sketch_numbers(300, 1_000_000, 2), sketch_numbers(544, 1_657_363, 2), sketch_numbers(100_000, 10**8, 2)
        (None, 65536, 2684)
    """
    each = GRADIENT_BYTES // (4 * kinds * max(samples, 1))
    if weights <= each and (samples <= KERNEL_SIDE or weights <= KERNEL_SIDE):
        return None
    most = MOST_NUMBERS if samples <= KERNEL_SIDE else KERNEL_SIDE
    numbers = max(LEAST_NUMBERS, min(most, each))
    return numbers if numbers < weights else None


def kernel_bytes(samples: int, weights: int, kinds: int) -> int:
    """What the gradients of all samples and a kernel of them take, in the memory of one process.

    Args:
        samples: How many there are.
        weights: How many weights are chosen.
        kinds: How many gradients each sample has.

    Returns:
        Bytes.
    """
    numbers = sketch_numbers(samples, weights, kinds) or weights
    gradients = 4 * kinds * samples * numbers
    side = min(samples, numbers)
    # In float64: the decomposed matrix, its eigenvectors and room to work; where it is one of numbers, samples twice.
    wide = 8 * (3 * side**2 + (2 * samples * numbers if numbers < samples else 0))
    return gradients + wide


class Sketch:
    r"""A random linear map to few numbers :math:`S`, the same for all gradients, with :math:`E\, S^T S = I`.

    A count sketch (Charikar, Chen and Farach-Colton, 2002; with signs as in Weinberger et al., arXiv 0902.2206): each
    weight is added, with a random sign, to one of the numbers. A parameter is cut into pieces as long as there are
    numbers, and each piece is turned by a random shift, so that two weights of a piece never meet and two of different
    pieces meet by a chance of one in ``numbers``: products of gradients stay what they are, up to
    :math:`|a| |b| \sqrt{2 / numbers}`. It costs one multiplication and one addition a weight.

    Args:
        numbers: How many.

    Example:
        >>> sketch, gradient = Sketch(4), torch.eye(6)
        >>> torch.equal(sketch("weight", gradient).square().sum(1), torch.ones(6))
        True
    """

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self._signs: dict[str, Tensor] = {}
        self._shifts: dict[str, list[int]] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Name to how many numbers are left of it: all parameters are added up."""
        return {"sketch": self.numbers}

    def __call__(self, name: str, gradients: Tensor) -> Tensor:
        """What a parameter adds to the numbers.

        Args:
            name: Of the parameter.
            gradients: ``(b, numel)``.

        Returns:
            ``(b, numbers)``.
        """
        size = gradients.shape[1]
        if name not in self._signs:
            generator = generator_for("sketch", name, size, self.numbers)
            signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
            self._signs[name] = signs.to(gradients.device)
            pieces = -(-size // self.numbers)
            self._shifts[name] = torch.randint(0, self.numbers, (pieces,), generator=generator).tolist()
        total = gradients.new_zeros(len(gradients), self.numbers)
        signs, numbers = self._signs[name], self.numbers
        for piece, shift in enumerate(self._shifts[name]):
            part = slice(piece * numbers, min((piece + 1) * numbers, size))
            values = gradients[:, part] * signs[part]
            before = min(numbers - shift, values.shape[1])  # what comes to lie before the end
            total[:, shift : shift + before] += values[:, :before]
            total[:, : values.shape[1] - before] += values[:, before:]
        return total
