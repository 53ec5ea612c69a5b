"""Groups' shares of the ranked evidence over several queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_unlearn.report.groups import Share
from lightning_unlearn.scores.firmness import student_quantile


def over_queries(found: Iterable[Sequence[Share]], most: int = 20) -> list[Share]:
    """The mean shares over several queries, with intervals for other queries.

    Intervals are Student's t over the queries: drawing two or three of them again would give hardly more than their
    own range, which misses the mean every other time. They end at 0 and 1, as shares do.

    Args:
        found: Of each query, :func:`~lightning_unlearn.report.groups.shares`.
        most: How many groups are told.

    Returns:
        The largest ones; none for fewer than two queries.
    """
    found = list(found)
    if len(found) < 2:
        return []
    values: dict[str, NDArray[np.float64]] = {}
    about: dict[str, tuple[int, float]] = {}
    for number, of_query in enumerate(found):
        for one in of_query:
            values.setdefault(one.group, np.zeros(len(found)))[number] = one.share
            images, _ = about.get(one.group, (0, 0.0))
            about[one.group] = (images + one.images, one.of_training)
    largest = sorted(values, key=lambda name: (-values[name].mean(), name))[:most]
    quantile = float(student_quantile(torch.tensor(len(found) - 1.0)))
    listed = []
    for name in largest:
        mean = float(values[name].mean())
        reach = quantile * float(values[name].std(ddof=1)) / len(found) ** 0.5
        listed.append(Share(name, mean, max(0.0, mean - reach), min(1.0, mean + reach), *about[name]))
    return listed
