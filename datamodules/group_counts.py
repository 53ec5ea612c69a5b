"""Which forms and weights the samples of shards have, where these are not all alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from lightning_unlearn.data.groups import Group, are_alike, group_samples
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.datamodules.reading import read_fields


def groups_of(shards: Sequence[ShardInfo], keys: frozenset[str] | None = None) -> list[Group]:
    """The groups of samples that training must tell apart.

    A manifest says them where a set has several; shards are read only where one says nothing and others do, or where
    samples are chosen by their keys.

    Args:
        shards: All shards.
        keys: If given, only samples with these keys.

    Returns:
        The groups, none where all samples are alike.

    Raises:
        InputError: If a shard that must be read can't be.
    """
    silent = [shard for shard in shards if not shard.groups]
    if len(silent) == len(shards):
        # A manifest is silent of a folder whose samples are alike, so one sample shows those of all.
        folders = {str(PurePosixPath(shard.url).parent): shard for shard in reversed(shards)}
        if len(folders) < 2 or are_alike([group_samples(islice(read_fields(one), 1)) for one in folders.values()]):
            return []
    if keys is None:
        found = [shard.groups or group_samples(read_fields(shard)) for shard in shards]
    else:
        found = [group_samples(_chosen(shard, keys)) for shard in shards]
    return [] if are_alike(found) else [group for of_shard in found for group in of_shard]


def _chosen(shard: ShardInfo, keys: frozenset[str]) -> Iterator[dict[str, Any]]:
    return (fields for fields in read_fields(shard) if fields["__key__"] in keys)
