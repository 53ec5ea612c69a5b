"""What deltas come from, as digests: a Fisher, and an unlearning with its queries and draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_unlearn.data.addresses import name_of
from lightning_unlearn.data.samples import named_arrays
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.data.targets import members_of
from lightning_unlearn.fingerprints import digest, settings_digest, tensors_digest
from lightning_unlearn.fisher import Fisher


def fisher_digest(fisher: Fisher | None) -> str:
    """Digest of a Fisher's kind, count, sums and targets.

    Args:
        fisher: The Fisher; ``None`` for a strategy without one.

    Returns:
        32 hexadecimal characters, or ``none``.
    """
    if fisher is None:
        return "none"
    # Those of the data, which were the only ones once, have no part of their own, so that older runs are known again.
    targets = [] if fisher.targets == "data" else [fisher.targets]
    return digest(fisher.kind, fisher.count, tensors_digest(fisher.tensors()), *targets)


def unlearning_digest(settings: Mapping[str, Any], datamodule: Any, real: bool) -> str:
    """Digest of what deltas depend on besides weights and Fisher.

    Args:
        settings: Of the unlearning.
        datamodule: With ``queries``, ``draws`` and, for sets, ``targets_by``; with ``shards`` if ``real``.
        real: Whether real samples are drawn too.

    Returns:
        32 hexadecimal characters.
    """
    order = [query.key for query in datamodule.queries]
    about = {**settings, "draws": datamodule.draws, "queries": order}
    if members := members_of(datamodule.queries, getattr(datamodule, "targets_by", None)):
        about["members"] = members
    if real:
        about["real"] = sorted(_lasting(shard) for shard in datamodule.shards)
    return digest(settings_digest(about), tensors_digest(named_arrays(datamodule.queries)))


def _lasting(shard: ShardInfo) -> list[str]:
    """Of a shard what stays as it is when it is copied to another place, where a manifest has a digest of it."""
    # Without one nothing tells its content but size and time of change, or what its server says.
    content = shard.sha256 if shard.sha256 is not None else shard.version
    return [name_of(shard.url), str(shard.samples), str(shard.bytes), content]
