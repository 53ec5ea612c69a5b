"""Several methods asked together, made of kept scores as lightning_unlearn.baselines.Consensus makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from benches import Bench
from method_settings import CONSENSUS_DEFAULT, CONSENSUS_PARTS, SELECTIONS
from score_files import files, read

from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.scores.table import ScoreTable


def together(bench: Bench, parts: Sequence[tuple[str, str]]) -> ScoreTable | None:
    """The standardised mean of what methods say with their settings; nothing where one is not scored."""
    found = {}
    for method, setting in parts:
        selection = next(name for name in reversed(SELECTIONS) if setting.endswith(SELECTIONS[name]))
        tables = read(bench, method, selection) if files(bench, method)[selection].is_file() else {}
        if setting not in tables:
            return None
        found[method] = tables[setting]
    first = next(iter(found.values()))
    assert all(table.keys == first.keys and table.queries == first.queries for table in found.values())
    scores = {method: torch.from_numpy(table.scores) for method, table in found.items()}
    return replace(first, scores=combined(scores, dict.fromkeys(scores, 1.0)).numpy())


def by_default(bench: Bench) -> ScoreTable | None:
    """What `Consensus` says by default, all weights."""
    return together(bench, CONSENSUS_PARTS[CONSENSUS_DEFAULT])
