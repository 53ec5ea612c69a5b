"""What identifies a training recipe: everything in a config that changes the trained model, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from lightning_unlearn.data.addresses import is_address
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.fingerprints import digest, public_name

# Settings of a Trainer and of data that say where and how fast, not what.
TRAINER_WHERE = frozenset(
    {
        "accelerator",
        "barebones",
        "default_root_dir",
        "detect_anomaly",
        "devices",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "log_every_n_steps",
        "logger",
        "model_registry",
        "num_nodes",
        "num_sanity_val_steps",
        "profiler",
        "strategy",
    }
)
DATA_WHERE = frozenset({"allow_pipe", "cache", "keys", "num_workers", "seed", "shards"})


def recipe(
    model: Any, data: Any, trainer: Any, shards: Sequence[ShardInfo], silenced: tuple[type, ...]
) -> dict[str, Any]:
    """A recipe as JSON.

    Args:
        model: The config's model.
        data: Its data.
        trainer: Its Trainer.
        shards: The training shards; they enter by their contents, not by where they lie.
        silenced: Classes of callbacks that are left out of retraining.

    Returns:
        JSON-like settings. Files that a setting names enter by the digest of their content.
    """
    settings = {name: value for name, value in plain(trainer).items() if name not in TRAINER_WHERE}
    callbacks = settings.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    settings["callbacks"] = [callback for callback in callbacks if not _is_one(callback.get("class_path"), silenced)]
    samples = plain(data)
    kept = {name: value for name, value in samples.get("init_args", {}).items() if name not in DATA_WHERE}
    return {
        "model": plain(model),
        "data": {"class_path": samples.get("class_path"), "init_args": kept},
        # What is not set is as good as not there: another version of Lightning may know more settings.
        "trainer": {name: value for name, value in settings.items() if value is not None},
        "shards": sorted(_content(shard) for shard in shards),
    }


def plain(value: Any) -> Any:
    """A config as JSON: a namespace as a mapping, and what it names on disk as the digest of its content.

    Args:
        value: A part of a config.

    Returns:
        JSON-like. Only files, and folders of diffusers, have a content; other words that happen to be the name of a
        folder stay as they are.
    """
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, str):
        return _on_disk(value) or public_name(value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _on_disk(name: str) -> str | None:
    """The digest of a file, or of a diffusers folder with all that is in it."""
    path = Path(name)
    try:
        if path.is_file():
            return f"sha256:{_sha256(path)}"
        if not any(any(path.glob(config)) for config in ("config.json", "*/config.json")):
            return None
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return f"blake2b:{digest(*(part for file in files for part in (str(file.relative_to(path)), _sha256(file))))}"
    except (OSError, ValueError):  # a long text is no name of a file
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(shard: ShardInfo) -> str:
    path = Path(shard.url)
    if shard.sha256 is not None or is_address(shard.url) or not path.is_file():
        return shard.version
    # Without a manifest a shard's version holds the time of its last change, which a copy does not keep.
    return f"{_sha256(path)}-{path.stat().st_size}"


def _is_one(class_path: str | None, classes: tuple[type, ...]) -> bool:
    found = locate(class_path) if class_path is not None else None
    return isinstance(found, type) and issubclass(found, classes)
