"""What is kept of each training sample, so that a new query needs no pass over the data."""

from __future__ import annotations

from lightning_unlearn.index.grouping import ScoredGroup
from lightning_unlearn.index.index import Index, IndexAnswer
from lightning_unlearn.index.index_pass import IndexPass

__all__ = ["Index", "IndexAnswer", "IndexPass", "ScoredGroup"]
