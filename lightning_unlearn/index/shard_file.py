"""What an index keeps of one shard: one safetensors file, written whole or not at all.

Of each of its ``n`` samples, in the shard's order, it holds

- for each output function its projected gradient, ``(n, p)`` float16, with a power of two for each row
  (``…/exponents``), so that no number is beyond what float16 holds;
- the root of its loss (``errors``) and its loss (``losses``), means over its views, in float64;
- what people ask for, as the bytes of a Parquet table: key, captions, what tells captions apart, and the json.

Nothing in it depends on other shards. Its metadata say of which content of the shard (``version``) and which index
(``index``) it is, and hold a digest of all its numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_unlearn.data.files import reason_of, write_atomically
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.index.rows import Rows, halved

SHARDS = "shards"
# Rows that are widened at a time.
ROWS = 1024
FACTS = ("key", "captions", "said", "json")
_SCHEMA = pa.schema(
    [("key", pa.string()), ("captions", pa.list_(pa.string())), ("said", pa.string()), ("json", pa.string())]
)
_REMEDY = "remove it and run `lightning-unlearn index` again"
# What reading a damaged file may raise.
_DAMAGED = (SafetensorError, pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError)


def shard_path(folder: Path, shard: str) -> Path:
    """Where the file of a shard lies.

    Args:
        folder: The index's.
        shard: The shard's identifier.

    Returns:
        Its path.
    """
    return folder / SHARDS / f"{shard}.safetensors"


def write_shard(
    folder: Path, shard: str, rows: Rows | None, sizes: Mapping[str, int], index: str, version: str
) -> None:
    """Write what is kept of a shard.

    Args:
        folder: The index's, which is there.
        shard: The shard's identifier.
        rows: Of its samples, in its order; ``None`` if it has none.
        sizes: Output function to the length of its vectors.
        index: Digest of the index's fingerprints.
        version: Of the shard's content.

    Raises:
        InputError: If a number is not finite, the disk is full, or the folder can't be written to.
    """
    if rows is None:
        empty = torch.zeros(0, dtype=torch.float64)
        rows = Rows([], [], [], [], {name: torch.zeros(0, size) for name, size in sizes.items()}, empty, empty)
    tensors: dict[str, Tensor] = {"errors": rows.errors.double(), "losses": rows.losses.double()}
    for name, values in rows.vectors.items():
        tensors[name], tensors[f"{name}/exponents"] = halved(values)
    tensors["facts"] = torch.frombuffer(bytearray(_facts(rows)), dtype=torch.uint8)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            bad = rows.keys[int((~tensor.isfinite()).reshape(len(rows.keys), -1).any(1).nonzero()[0])]
            raise InputError(
                f"What is to be kept of sample {bad!r} in shard {shard} ({name}) is not finite; check the sample and "
                "the model, or set on_bad_sample to skip."
            )
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"index": index, "version": version, "digest": tensors_digest(tensors)}
    path = shard_path(folder, shard)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, save(tensors, metadata))
    except OSError as error:
        raise InputError(
            f"What is kept of shard {shard} can't be written to {path} ({error.strerror}); free the disk and run "
            "again: finished shards are kept."
        ) from None


def _facts(rows: Rows) -> bytes:
    columns = [
        rows.keys,
        rows.captions,
        rows.said,
        [json.dumps(one, ensure_ascii=False, sort_keys=True) for one in rows.metadata],
    ]
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), stream, compression="zstd")
    return stream.getvalue()


class ShardFile:
    """A shard's file, whose form is checked; numbers are read when they are asked for, and not kept.

    Args:
        folder: The index's.
        shard: The shard's identifier.
        sizes: Output function to the length of its vectors.
        index: Digest of the index's fingerprints.

    Attributes:
        version: Of the content of the shard.
        digest: Of all numbers.
        count: n, how many samples it has.

    Raises:
        InputError: If it can't be read, or is of another index.
    """

    def __init__(self, folder: Path, shard: str, sizes: Mapping[str, int], index: str) -> None:
        self.path = shard_path(folder, shard)
        with self._open() as file:
            metadata = file.metadata() or {}
            self.version, self.digest = str(metadata["version"]), str(metadata["digest"])
            if metadata["index"] != index:
                raise InputError(f"{self.path} is of another index than its folder; {_REMEDY}.")
            self.count = file.get_slice("errors").get_shape()[0]
            expected: dict[str, tuple[str, list[int]]] = {"errors": ("F64", [self.count])}
            expected["losses"] = expected["errors"]
            for name, size in sizes.items():
                expected[name] = ("F16", [self.count, size])
                expected[f"{name}/exponents"] = ("I16", [self.count])
            for name, (dtype, shape) in expected.items():
                found = file.get_slice(name)
                if found.get_dtype() != dtype or found.get_shape() != shape:
                    raise InputError(f"{self.path} is damaged ({name} has another form); {_REMEDY}.")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as file:
                yield file
        except InputError:
            raise
        except _DAMAGED as error:
            raise InputError(f"{self.path} can't be read ({reason_of(error)}); {_REMEDY}.") from None

    def numbers(self, name: str) -> Tensor:
        """One number of each sample.

        Args:
            name: ``errors`` or ``losses``.

        Returns:
            ``(n,)`` float64.
        """
        with self._open() as file:
            found: Tensor = file.get_tensor(name).clone()
        return found

    def chunks(self, output: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The vectors of one output function, some rows at a time.

        Args:
            output: Its name.

        Yields:
            Which rows, their numbers in float16, and their exponents.
        """
        with self._open() as file:
            exponents, part = file.get_tensor(f"{output}/exponents"), file.get_slice(output)
            for start in range(0, self.count, ROWS):
                rows = slice(start, min(start + ROWS, self.count))
                yield rows, part[rows], exponents[rows]

    def facts(self, columns: Sequence[str]) -> pa.Table:
        """What people ask for.

        Args:
            columns: Some of ``FACTS``.

        Returns:
            A table of ``n`` rows.

        Raises:
            InputError: If it can't be read.
        """
        with self._open() as file:
            table = pq.read_table(pa.BufferReader(file.get_tensor("facts").numpy().tobytes()), columns=list(columns))
            if len(table) != self.count:
                raise InputError(f"{self.path} is damaged ({len(table)} keys of {self.count} samples); {_REMEDY}.")
        return table

    def check_numbers(self) -> None:
        """Hold all numbers against their digest.

        Raises:
            InputError: If one was altered.
        """
        with self._open() as file:
            names = list(file.keys())
            found = tensors_digest((name, file.get_tensor(name)) for name in names)
        if found != self.digest:
            raise InputError(f"{self.path} was altered after it was written; {_REMEDY}.")
