"""What identifies a run of a method, and what its record says of it."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.baselines.base import Baseline
from lightning_unlearn.baselines.scored_data import ScoredData
from lightning_unlearn.data.samples import Sample, named_arrays
from lightning_unlearn.data.shards import shard_id
from lightning_unlearn.fingerprints import digest, settings_digest, tensors_digest
from lightning_unlearn.unlearning.module import UnlearningModule


def fingerprints_of(method: Baseline, module: UnlearningModule, data: ScoredData) -> dict[str, str]:
    """What a method's scores depend on: runs with the same fingerprints may share a score table.

    Args:
        method: The method.
        module: Names the network, the chosen weights and the views.
        data: Names the samples and the queries.

    Returns:
        Name to digest.
    """
    versions = {shard_id(shard.url): shard.version for shard in data.shards}
    settings: dict[str, dict[str, Any]] = {
        "objective": module.objective.settings(),
        "parameters": {"parameters": module.parameters_selection},
        "views": module.views.settings(),
        "method": method.settings(),
        # Every score may depend on every sample.
        "samples": {"shards": versions, "on_bad_sample": data.on_bad_sample},
    }
    prints = {name: settings_digest(values) for name, values in settings.items()}
    if data.keys is not None:
        prints["keys"] = digest(*sorted(data.keys))
    prints["weights"] = module.weights_fingerprint()
    if method.columns is None:
        prints["queries"] = queries_digest(data.queries)
    if method.rise is not None:
        prints["unlearning"] = module.unlearning_fingerprint(data)
    if method.needs_fisher or method.rise is not None:
        prints["fisher"] = module.fisher_fingerprint()
    return prints


def about_run(
    method: Baseline, module: UnlearningModule, data: ScoredData, fingerprints: dict[str, str]
) -> dict[str, Any]:
    """What the record of a run says before anything is scored.

    Args:
        method: The method.
        module: Names the network, the chosen weights and the views.
        data: Names the queries.
        fingerprints: Of the run.

    Returns:
        JSON-like.
    """
    reason = {"parameters_reason": module.parameters_reason} if module.parameters_reason else {}
    return {
        "fingerprints": fingerprints,
        "method": method.settings(),
        "method_class": type(method).__name__,
        "network": module.origin,
        "parameters": module.parameters_selection,
        **reason,
        "objective": module.objective.settings(),
        "views": module.views.settings(),
        "precision": module.computed_in("32-true"),
        "targets": columns_of(method, data),
        "world_size": 1,
    }


def columns_of(method: Baseline, data: ScoredData) -> dict[str, dict[str, Any]]:
    """The columns of a method's table.

    Args:
        method: The method.
        data: Names the queries.

    Returns:
        Name to what the record says of it.
    """
    if method.columns is not None:
        return {name: {} for name in method.columns}
    return {query.key: {"captions": query.captions} for query in data.queries}


def queries_digest(queries: list[Sample]) -> str:
    """Digest of what queries are: their keys, their json and what the network sees of them.

    Args:
        queries: With unique keys.

    Returns:
        32 hexadecimal characters.
    """
    about = [[query.key, query.metadata] for query in queries]
    return digest(settings_digest({"queries": about}), tensors_digest(named_arrays(queries)))
