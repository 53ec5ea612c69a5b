"""The report of a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_unlearn.command_line.command_parts import say
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.report.report import shown_queries
from lightning_unlearn.report.report import write_report as write_page
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable


def write_report(
    folder: Path, top: int, *, allow_pipe: bool = False, data: AttributionDataModule | None = None
) -> ScoreTable:
    """Write ``report.html`` of a run and print its path.

    Args:
        folder: The run's folder.
        top: How many images are shown for each query.
        allow_pipe: Whether shards may be commands.
        data: Of the run, if it was just made: its record has no passwords and signatures of addresses.

    Returns:
        The run's scores.
    """
    table = read_scores(folder)
    shown = frozenset(key for target in table.queries for key in shown_queries(table, target))
    urls = table.run["query_shards"] if data is None else data.query_patterns
    queries = [
        sample
        for shard in (list_shards(urls, allow_pipe=allow_pipe) if urls else [])
        for sample in read_samples(shard, pictures=True, masks=True, keys=shown)
    ]
    recorded = [info["url"] for info in table.run["shards"].values()]
    all_shards = list_shards(recorded, allow_pipe=allow_pipe) if data is None else data.shards

    def pictures(keys: Sequence[str]) -> Mapping[str, Sample]:
        # Others may be bad and left out: they are not decoded.
        wanted = frozenset(keys)
        shards = {shard for key, shard in zip(table.keys, table.shards, strict=True) if key in wanted}
        return {
            sample.key: sample
            for shard in all_shards
            if shard_id(shard.url) in shards
            for sample in read_samples(shard, pictures=True, keys=wanted)
        }

    path = write_page(folder / "report.html", table, queries, pictures, top)
    say(f"Report: {path}")
    return table
