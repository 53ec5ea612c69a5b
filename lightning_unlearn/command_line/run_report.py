"""The report of a run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from lightning_unlearn.command_line.command_parts import say
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.report.report import shown_queries
from lightning_unlearn.report.report import write_report as write_pages
from lightning_unlearn.scores.files import RUN_FILE, read_scores
from lightning_unlearn.scores.table import ScoreTable


def write_report(
    folder: Path,
    top: int,
    *,
    groups: Sequence[str] = (),
    allow_pipe: bool = False,
    data: AttributionDataModule | None = None,
) -> ScoreTable:
    """Write ``report.html`` of a run, with what lies beside it, and print its path.

    Args:
        folder: The run's folder.
        top: How many images are shown for each query.
        groups: Fields of the samples' json, whose values' shares of the ranked evidence are told.
        allow_pipe: Whether shards may be commands.
        data: Of the run, if it was just made: its record has no passwords and signatures of addresses.

    Returns:
        The run's scores.
    """
    table = read_scores(folder)
    shown = frozenset(key for target in table.queries for key in shown_queries(table, target))
    urls = table.run["query_shards"] if data is None else data.query_patterns
    query_shards = list_shards(urls, allow_pipe=allow_pipe) if urls else []
    recorded = [info["url"] for info in table.run["shards"].values()]
    all_shards = list_shards(recorded, allow_pipe=allow_pipe) if data is None else data.shards

    def queries() -> Iterator[Sample]:
        for shard in query_shards:
            yield from read_samples(shard, pictures=True, masks=True, keys=shown)

    def samples(keys: frozenset[str]) -> Iterator[Sample]:
        # Others may be bad and left out: they are not decoded.
        shards = {shard for key, shard in zip(table.keys, table.shards, strict=True) if key in keys}
        for shard in all_shards:
            if shard_id(shard.url) in shards:
                yield from read_samples(shard, pictures=True, keys=keys)

    when = datetime.fromtimestamp((folder / RUN_FILE).stat().st_mtime, UTC).isoformat(timespec="seconds")
    path = write_pages(folder / "report.html", table, queries(), samples, top, groups=groups, recorded=when)
    say(f"Report: {path}")
    return table
