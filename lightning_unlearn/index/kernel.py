r"""The ridge regression of an index, decomposed once: what D-TRAK and DAS ask of all samples for a new query.

With the kept vectors :math:`Φ` ``(N, p)``, :math:`A = Φ^\top Φ + λ \bar d\, I` and :math:`\bar d` the mean squared
length of a vector, as in :class:`~lightning_unlearn.baselines.kernel.RidgeKernel`:

.. math::
    \text{influences} = Φ A^{-1} \hat φ = (ΦΦ^\top + λ \bar d\, I)^{-1} Φ \hat φ, \qquad
    \text{leverages} = \operatorname{diag}(Φ A^{-1} Φ^\top) .

The smaller of the two matrices has its Cholesky factor taken in float64. Vectors stay on disk: they pass by some rows
at a time, so that memory does not grow with N beyond a few numbers a sample.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.index.rows import powers, widened
from lightning_unlearn.index.shard_file import ShardFile

# Beyond so many numbers, products with queries are in float32.
EXACT_NUMBERS = 2**26


@dataclass(frozen=True)
class Vectors:
    """The vectors of one output function in all shards, on disk.

    Attributes:
        files: Of the shards.
        output: The output function.
        size: p.
    """

    files: Sequence[ShardFile]
    output: str
    size: int

    @property
    def count(self) -> int:
        """N, how many there are."""
        return sum(file.count for file in self.files)

    def products(self, others: Tensor) -> Tensor:
        """Dot products of all vectors with some others; shards are gone through by several threads.

        They are taken in float64, of many vectors in float32.

        Args:
            others: ``(Q, p)`` float64.

        Returns:
            ``(N, Q)`` float64.
        """
        # So that neither float32 nor its products overflow.
        largest = others.abs().amax(1).clamp(min=torch.finfo(torch.float64).tiny)
        dtype = torch.float64 if self.count * self.size <= EXACT_NUMBERS else torch.float32
        scaled = (others / largest[:, None]).to(dtype).mT.contiguous()
        found = torch.empty(self.count, len(others), dtype=torch.float64)

        def of_shard(file: ShardFile, start: int) -> None:
            for rows, halves, exponents in file.chunks(self.output):
                product = halves.to(scaled.dtype) @ scaled
                found[start + rows.start : start + rows.stop] = product.double() * powers(exponents)[:, None]

        self._each_shard(of_shard)
        return found * largest

    def rows(self, work: Callable[[int, Tensor], None]) -> None:
        """Go through all vectors, in their order.

        Args:
            work: Gets the number of the first row and some rows in float64.
        """
        start = 0
        for file in self.files:
            for rows, halves, exponents in file.chunks(self.output):
                work(start + rows.start, widened(halves, exponents))
            start += file.count

    def _each_shard(self, work: Callable[[ShardFile, int], None]) -> None:
        starts, start = [], 0
        for file in self.files:
            starts.append(start)
            start += file.count
        with ThreadPoolExecutor(min(len(self.files), os.cpu_count() or 1) or 1) as threads:
            for _ in threads.map(work, self.files, starts):
                pass


@dataclass(frozen=True)
class IndexKernel:
    """A ridge regression on vectors, ready for any query.

    Attributes:
        factor: Lower Cholesky factor of the damped second moments ``(p, p)``, or of the damped Gram matrix ``(N, N)``
            where there are fewer vectors than numbers in each.
        rest: ``(N,)`` one minus the leverages.
    """

    factor: Tensor
    rest: Tensor

    @classmethod
    def of(cls, vectors: Vectors, ridge: float) -> IndexKernel:
        """Decompose.

        Args:
            vectors: At least one.
            ridge: λ, as a share of the mean squared length of a vector.

        Returns:
            The kernel.

        Raises:
            InputError: If there are none, or all are zero.
        """
        if vectors.count == 0:
            raise InputError("The index holds no sample; name shards that hold some.")
        return cls._of_samples(vectors, ridge) if vectors.count <= vectors.size else cls._of_numbers(vectors, ridge)

    @classmethod
    def _of_samples(cls, vectors: Vectors, ridge: float) -> IndexKernel:
        kept = torch.empty(vectors.count, vectors.size, dtype=torch.float64)

        def take(start: int, rows: Tensor) -> None:
            kept[start : start + len(rows)] = rows

        vectors.rows(take)
        matrix = kept @ kept.mT
        added = _damp(matrix, vectors.count, ridge)
        factor = torch.linalg.cholesky(matrix).contiguous()
        return cls(factor, added * torch.cholesky_inverse(factor).diagonal())

    @classmethod
    def _of_numbers(cls, vectors: Vectors, ridge: float) -> IndexKernel:
        matrix = torch.zeros(vectors.size, vectors.size, dtype=torch.float64)
        vectors.rows(lambda start, rows: matrix.addmm_(rows.mT, rows))  # type: ignore[arg-type]
        _damp(matrix, vectors.count, ridge)
        factor = torch.linalg.cholesky(matrix).contiguous()
        rest = torch.ones(vectors.count, dtype=torch.float64)

        def take(start: int, rows: Tensor) -> None:
            solved = torch.linalg.solve_triangular(factor, rows.mT, upper=False)
            rest[start : start + len(rows)] -= solved.square().sum(0)

        vectors.rows(take)
        return cls(factor, rest.clamp(min=torch.finfo(torch.float64).eps))  # rounding may leave less than nothing

    def influences(self, vectors: Vectors, queries: Tensor) -> Tensor:
        """The regression's weight of each sample for each query.

        Args:
            vectors: Those that were decomposed.
            queries: ``(Q, p)`` float64.

        Returns:
            ``(N, Q)`` float64.
        """
        if vectors.count <= vectors.size:
            return torch.cholesky_solve(vectors.products(queries), self.factor)
        return vectors.products(torch.cholesky_solve(queries.mT, self.factor).mT.contiguous())


def _damp(matrix: Tensor, count: int, ridge: float) -> float:
    """Add the ridge to a matrix whose trace is the sum of squared lengths; how much that is."""
    trace = float(matrix.diagonal().sum())
    if not 0 < trace < float("inf"):
        raise InputError("No gradient reaches the chosen layers for any training sample; choose other parameters.")
    added = ridge * trace / count
    matrix.diagonal().add_(added)
    return added
