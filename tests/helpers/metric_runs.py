"""The measures over several processes: ``metric_runs.py FOLDER`` is one of them, over gloo."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.metrics import CounterfactualChange, ExemplarRetrieval, LinearDatamodellingScore

# How many models or queries (there are 7) each of two processes has. Models and queries are dealt alike.
SHARES = {"uneven": (5, 2), "one has none": (0, 7)}
MODELS = QUERIES = 7


def tables() -> dict[str, Tensor]:
    """The same on every process. Values that differ by less than float32 tells apart, so that float64 must survive."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "predictions": 1 + 1e-10 * draw(MODELS, QUERIES),
        "outcomes": 1 + 1e-10 * draw(MODELS, QUERIES),
        "without": draw(QUERIES),
        "references": draw(3, QUERIES),
        "scores": draw(20, QUERIES),
        "relevant": draw(20, QUERIES) > 0.5,
    }


def measure(share: slice) -> dict[str, Any]:
    """All measures of a share, computed once half way and once at the end."""
    given = tables()
    metrics = LinearDatamodellingScore(QUERIES, "none"), CounterfactualChange(), ExemplarRetrieval([1, 5])
    found: dict[str, Any] = {}
    middle = (share.start + share.stop + 1) // 2
    for part in (slice(share.start, middle), slice(middle, share.stop)):
        if part.start < part.stop:
            metrics[0].update(given["predictions"][part], given["outcomes"][part])
            metrics[1].update(given["without"][part], given["references"][:, part])
            metrics[2].update(given["scores"][:, part], given["relevant"][:, part])
        found = {
            "linear datamodelling score": metrics[0].compute().tolist(),
            "change": {name: float(value) for name, value in metrics[1].compute().items()},
            "retrieval": {name: float(value) for name, value in metrics[2].compute().items()},
        }
    return found


def main(out: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    found = {}
    for name, counts in SHARES.items():
        start = sum(counts[:rank])
        found[name] = measure(slice(start, start + counts[rank]))
    (out / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
