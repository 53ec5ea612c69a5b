"""Shares over several queries have intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_unlearn.report.groups import Share
from lightning_unlearn.report.groups_over_queries import over_queries


def test_over_queries_a_mean_with_an_interval_for_other_queries() -> None:
    one = [Share("a", 0.7, 0.6, 0.8, 3, 0.5), Share("b", 0.3, 0.2, 0.4, 1, 0.5)]
    other = [Share("a", 0.9, 0.8, 1.0, 4, 0.5)]
    assert over_queries([one]) == []
    mean = over_queries([one, other])
    assert [(share.group, round(share.share, 9), share.images) for share in mean] == [("a", 0.8, 7), ("b", 0.15, 1)]
    # Of two queries Student's t reaches far: 12.7 standard errors, cut where shares end.
    assert (mean[0].low, mean[0].high) == (0.0, 1.0)
    assert len(over_queries([one, other], most=1)) == 1


@pytest.mark.parametrize("queries", [2, 3, 10])
def test_intervals_of_few_queries_hold_the_mean_in_95_of_100(queries: int) -> None:
    generator = np.random.default_rng(queries)
    inside = 0
    for _ in range(1000):
        drawn = np.clip(generator.normal(0.5, 0.05, queries), 0, 1)
        found = [[Share("a", float(share), 0.0, 1.0, 1, 0.5)] for share in drawn]
        (one,) = over_queries(found)
        inside += one.low <= 0.5 <= one.high
    assert inside / 1000 == pytest.approx(0.95, abs=0.025)
