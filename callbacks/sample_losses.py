"""Each training image's own losses, with the noise level taken out of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.errors import InputError

STRATA = 20
# A stratum's losses that scatter less than this share of their mean are all the same, but for rounding.
LEAST_SCATTER = 1e-6


@dataclass(frozen=True)
class LossTable:
    """What was seen of each sample, in the order of their keys.

    Attributes:
        keys: ``N``.
        counts: ``(N,)`` finite losses.
        means: ``(N,)`` mean loss; NaN where there is none.
        corrected: ``(N,)`` by how many standard deviations its losses lie above those of all samples at the same noise
            levels, on average; NaN where there is none.
        last_epochs: ``(N,)`` epoch in which it was seen last, from 0.
        not_finite: ``(N,)`` losses that were NaN or infinite.
    """

    keys: list[str]
    counts: NDArray[np.int64]
    means: NDArray[np.float64]
    corrected: NDArray[np.float64]
    last_epochs: NDArray[np.int64]
    not_finite: NDArray[np.int64]

    def worst(self, top: int) -> list[int]:
        """The samples with the highest corrected loss; before all others those that had a loss that is not finite.

        Args:
            top: How many, at most.

        Returns:
            Rows, the worst first.
        """
        order = np.lexsort((np.asarray(self.keys), -np.nan_to_num(self.corrected, nan=-np.inf), -self.not_finite))
        return [int(row) for row in order[:top]]

    def write(self, path: Path) -> None:
        """Write it whole or not at all, as Parquet or CSV, as the name ends.

        Args:
            path: The file; its folder is made.
        """
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        columns: dict[str, Any] = {
            "key": self.keys,
            "count": self.counts,
            "mean_loss": self.means,
            "corrected": self.corrected,
            "last_epoch": self.last_epochs,
            "not_finite": self.not_finite,
        }
        stream = io.BytesIO()
        table = pa.table(columns)
        if path.suffix == ".csv":
            pyarrow.csv.write_csv(table, stream)
        else:
            pyarrow.parquet.write_table(table, stream)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, stream.getvalue())


class LossSums:
    r"""Sums of losses by sample and stratum of the noise level; adding up runs or ranks is addition.

    With :math:`m_s` and :math:`d_s` the mean and standard deviation of all losses, of any sample, that fell into
    stratum :math:`s`, a sample whose :math:`n` losses :math:`l_k` fell into strata :math:`s_k` has the corrected loss

    .. math:: \bar z = \frac{1}{n} \sum_k \frac{l_k - m_{s_k}}{d_{s_k}}.

    A stratum without scatter counts as 0. By chance alone :math:`\bar z` lies within some :math:`2/\sqrt n` of 0.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._sums: NDArray[np.float64] = np.zeros((0, STRATA))
        self._counts: NDArray[np.int64] = np.zeros((0, STRATA), np.int64)
        self._last: NDArray[np.int64] = np.zeros(0, np.int64)
        self._not_finite: NDArray[np.int64] = np.zeros(0, np.int64)
        self._squares: NDArray[np.float64] = np.zeros(STRATA)  # of all losses in a stratum

    def add(self, keys: Sequence[str], losses: NDArray[np.float64], strata: NDArray[np.int64], epoch: int) -> None:
        """Add a batch.

        Args:
            keys: ``B``, which may stand several times.
            losses: ``(B,)``.
            strata: ``(B,)``.
            epoch: In which it was seen.
        """
        rows = self._rows_of(keys)
        good = np.isfinite(losses)
        np.add.at(self._sums, (rows[good], strata[good]), losses[good])
        np.add.at(self._counts, (rows[good], strata[good]), 1)
        np.add.at(self._squares, strata[good], losses[good] ** 2)
        np.add.at(self._not_finite, rows[~good], 1)
        np.maximum.at(self._last, rows, epoch)

    def merge(self, other: LossSums) -> None:
        """Add what another run or rank saw.

        Args:
            other: It.
        """
        rows, count = self._rows_of(list(other._rows)), len(other._rows)
        self._sums[rows] += other._sums[:count]
        self._counts[rows] += other._counts[:count]
        self._not_finite[rows] += other._not_finite[:count]
        self._last[rows] = np.maximum(self._last[rows], other._last[:count])
        self._squares += other._squares

    def table(self) -> LossTable:
        """What was seen of each sample.

        Returns:
            It.
        """
        keys = sorted(self._rows)
        rows = np.asarray([self._rows[key] for key in keys], np.int64)
        sums, counts = self._sums[rows], self._counts[rows]  # (N, S)
        seen = np.maximum(counts.sum(0), 1)
        means = sums.sum(0) / seen  # (S,)
        scatter = np.sqrt(np.maximum(self._squares / seen - means**2, 0))
        known = scatter > LEAST_SCATTER * np.abs(means)
        deviations = np.where(known, (sums - counts * means) / np.where(known, scatter, 1), 0)
        times = counts.sum(1)  # (N,)
        with np.errstate(invalid="ignore"):
            return LossTable(
                keys, times, sums.sum(1) / times, deviations.sum(1) / times, self._last[rows], self._not_finite[rows]
            )

    def state(self) -> dict[str, Any]:
        """All of it, in plain types and tensors.

        Returns:
            For a checkpoint.
        """
        count = len(self._rows)
        return {
            "keys": list(self._rows),
            "sums": torch.from_numpy(self._sums[:count].copy()),
            "counts": torch.from_numpy(self._counts[:count].copy()),
            "last_epochs": torch.from_numpy(self._last[:count].copy()),
            "not_finite": torch.from_numpy(self._not_finite[:count].copy()),
            "squares": torch.from_numpy(self._squares.copy()),
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LossSums:
        """Back from :meth:`state`.

        Args:
            state: It.

        Returns:
            The sums.
        """
        made = cls()
        made._rows = {key: row for row, key in enumerate(state["keys"])}
        made._sums, made._counts = state["sums"].numpy().copy(), state["counts"].numpy().copy()
        made._last, made._not_finite = state["last_epochs"].numpy().copy(), state["not_finite"].numpy().copy()
        made._squares = state["squares"].numpy().copy()
        return made

    def _rows_of(self, keys: Sequence[str]) -> NDArray[np.int64]:
        for key in keys:
            self._rows.setdefault(key, len(self._rows))
        if len(self._rows) > len(self._sums):
            # Twice as many at a time, so that growing costs little.
            more = max(len(self._rows), 2 * len(self._sums)) - len(self._sums)
            self._sums = np.concatenate([self._sums, np.zeros((more, STRATA))])
            self._counts = np.concatenate([self._counts, np.zeros((more, STRATA), np.int64)])
            self._last = np.concatenate([self._last, np.full(more, -1, np.int64)])
            self._not_finite = np.concatenate([self._not_finite, np.zeros(more, np.int64)])
        return np.asarray([self._rows[key] for key in keys], np.int64)


def strata_of(timesteps: Tensor, length: float, density: Tensor | None) -> NDArray[np.int64]:
    """The strata of the noise level that timesteps fall into, which training's draws share evenly.

    Args:
        timesteps: ``(B,)`` from 0 to ``length``, whole numbers or not.
        length: Of the training schedule.
        density: ``(length,)`` how often training draws each timestep; ``None`` if all alike.

    Returns:
        ``(B,)`` from 0 to ``STRATA - 1``.

    Raises:
        InputError: If a timestep lies outside.

    Example:
        >>> strata_of(torch.tensor([0, 499, 999]), 1000, None).tolist()
        [0, 9, 19]
        >>> strata_of(torch.tensor([0, 1]), 2, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
        [2, 12]
    """
    times = timesteps.detach().cpu().double()
    if not bool(((times >= 0) & (times <= length)).all()):
        raise InputError(
            f"SampleLossLogger was given timesteps from {float(times.min()):g} to {float(times.max()):g}, but the "
            f"schedule runs from 0 to {length:g}; set num_timesteps to its length, e.g. 1.0 for those of a flow."
        )
    # Of a schedule of many steps a timestep below 1 is its first: a noise level from 0 to 1 would all fall there.
    if length > 1 and len(times) and bool(((times > 0) & (times < 1)).any()) and bool((times <= 1).all()):
        raise InputError(
            f"SampleLossLogger was given timesteps from {float(times.min()):g} to {float(times.max()):g} of a schedule "
            f"of {length:g}; set num_timesteps to 1.0 if they are noise levels."
        )
    if density is None:
        places = times / length
    else:
        shares = density.cpu().double()
        middles = shares.cumsum(0) - shares / 2
        places = middles[times.long().clamp(max=len(shares) - 1)]
    found: NDArray[np.int64] = (places * STRATA).long().clamp(0, STRATA - 1).numpy()
    return found
