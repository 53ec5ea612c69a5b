"""What an index's ``index.json`` says: of which model, looked at how, and of which shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_unlearn.data.addresses import is_address, shown_address
from lightning_unlearn.data.files import json_with_digest, read_json, write_atomically
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.index.shard_file import ShardFile
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection

INDEX_FILE = "index.json"
FAILED = "failed"


def index_fingerprints(module: UnlearningModule, projection: Projection, on_bad_sample: str) -> dict[str, str]:
    """What the numbers of an index depend on, besides each sample.

    Args:
        module: The model, its objective, the chosen weights and the views.
        projection: Of their gradients.
        on_bad_sample: Whether a sample that can't be used fails its shard or is left out.

    Returns:
        Digests by name.
    """
    layers = [spec.to_json() for spec in layer_specs(module.layers).values()]
    return {
        "weights": module.weights_fingerprint(),
        "objective": settings_digest(module.objective.settings()),
        "parameters": settings_digest({"layers": layers}),
        "views": settings_digest(module.views.settings()),
        "projection": settings_digest(projection.settings()),
        "on_bad_sample": on_bad_sample,
    }


def index_digest(fingerprints: Mapping[str, str]) -> str:
    """One digest of all fingerprints, which each file of an index holds.

    Args:
        fingerprints: By name.

    Returns:
        32 hexadecimal characters.
    """
    return settings_digest(fingerprints)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The content of an index's ``index.json``.

    Args:
        folder: The index's.

    Returns:
        It; ``None`` if there is none.

    Raises:
        InputError: If it can't be read.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    record = read_json(path, "is not the record of an index", "make the index in another folder")
    whole = all(isinstance(record.get(name), dict) for name in ("fingerprints", "projection", "sizes", "shards"))
    if not whole or not all(isinstance(one, dict) and "version" in one for one in record["shards"].values()):
        raise InputError(
            f"{path} is not the record of an index (what it says is not whole); make the index in another folder."
        )
    return record


def differing(record: Mapping[str, Any], fingerprints: Mapping[str, str]) -> list[str]:
    """Which fingerprints of an index are not these.

    Args:
        record: The content of its ``index.json``.
        fingerprints: By name.

    Returns:
        Their names.
    """
    theirs = record["fingerprints"]
    return [name for name in {**fingerprints, **theirs} if theirs.get(name) != fingerprints.get(name)]


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``index.json``, whole or not at all.

    Args:
        folder: The index's.
        content: What it holds.
    """
    write_atomically(folder / INDEX_FILE, json_with_digest(content))


def recorded_shards(shards: Sequence[ShardInfo]) -> dict[str, dict[str, Any]]:
    """What is recorded of shards.

    Args:
        shards: In the order of the index's rows.

    Returns:
        Identifier to address, numbers of samples and bytes, sha256 and version.
    """
    return {
        shard_id(shard.url): {
            "url": shown_address(shard.url) if is_address(shard.url) else str(Path(shard.url).expanduser().resolve()),
            "samples": shard.samples,
            "bytes": shard.bytes,
            "sha256": shard.sha256,
            "version": shard.version,
        }
        for shard in shards
    }


def is_indexed(folder: Path, shard: str, version: str, sizes: Mapping[str, int], index: str) -> bool:
    """Whether what is kept of a shard is there, and of the samples that it holds now.

    Args:
        folder: The index's.
        shard: The shard's identifier.
        version: Of its content.
        sizes: Output function to the length of its vectors.
        index: Digest of the index's fingerprints.

    Returns:
        Whether it is; a file that can't be read counts as none.
    """
    try:
        return ShardFile(folder, shard, sizes, index).version == version
    except InputError:
        return False
