"""The decomposed kernels of an index, kept beside its shards and made again where these are others.

They are derived: whoever removes the file loses nothing but the time to make it. While it is made, all numbers of the
shards are held against their digests; from then on a shard's file counts as unaltered as long as its size and its
time are those that it had.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.fingerprints import settings_digest, tensors_digest
from lightning_unlearn.index.kernel import IndexKernel, Vectors
from lightning_unlearn.index.shard_file import ShardFile

KERNELS = "kernels.safetensors"


def kept_kernels(folder: Path, vectors: Mapping[str, Vectors], ridges: Mapping[str, float]) -> dict[str, IndexKernel]:
    """The decomposed kernel of each output function.

    Args:
        folder: The index's.
        vectors: Output function to its vectors.
        ridges: Output function to λ.

    Returns:
        Output function to its kernel.
    """
    files = next(iter(vectors.values())).files
    of = settings_digest({"files": [file.digest for file in files], "ridges": dict(ridges)})
    kept = _read(folder / KERNELS, of, vectors)
    seen = _states(files)
    if kept is not None and kept[1] == seen:
        return kept[0]
    for file in files:
        file.check_numbers()
    kernels = kept[0] if kept is not None else {name: IndexKernel.of(v, ridges[name]) for name, v in vectors.items()}
    tensors = {
        f"{name}/{part}": getattr(kernel, part) for name, kernel in kernels.items() for part in ("factor", "rest")
    }
    metadata = {"of": of, "seen": json.dumps(seen), "digest": tensors_digest(tensors)}
    with contextlib.suppress(OSError):  # a folder that can only be read, or a full disk: they are made again next time
        write_atomically(folder / KERNELS, save(tensors, metadata))
    return kernels


def _states(files: Sequence[ShardFile]) -> list[list[int]]:
    """Size and time of each file."""
    found = [file.path.stat() for file in files]
    return [[state.st_size, state.st_mtime_ns] for state in found]


def _read(path: Path, of: str, vectors: Mapping[str, Vectors]) -> tuple[dict[str, IndexKernel], list[list[int]]] | None:
    """What is kept of these very shards, and their files' states; ``None`` if there is nothing of the kind."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("of") != of:
                return None
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if tensors_digest(tensors) != metadata["digest"]:
                return None
            return {
                name: IndexKernel(tensors[f"{name}/factor"], tensors[f"{name}/rest"]) for name in vectors
            }, json.loads(metadata["seen"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError):
        return None  # damaged: it is made again
