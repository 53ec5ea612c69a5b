"""Single training pictures out of shards, without reading these whole: text states are the most of a shard."""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from webdataset.tariterators import base_plus_ext

from lightning_unlearn.data.addresses import is_address
from lightning_unlearn.data.samples import PICTURE_FIELDS, Sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.errors import InputError
from lightning_unlearn.report.pictures import InPage, Picture, image_of

Fetch = Callable[[ShardInfo, frozenset[str]], Mapping[str, Sample]]
# So many are kept; a small picture has some kilobytes.
KEPT = 4096
# Of a json that is read; an honest one has some hundred bytes.
LARGEST_JSON = 2**24
# What of a json is no fact about the picture.
_NO_FACTS = ("captions", "caption_weights", "conditions")


@dataclass(frozen=True)
class Shown:
    """A training picture as the page shows it.

    Attributes:
        key: Of the sample.
        captions: Its captions; empty if its shard can't be read any more.
        facts: What else its json says.
        picture: ``None`` if there is none to look at.
    """

    key: str
    captions: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None


@dataclass(frozen=True)
class _Place:
    """Where a file's content lies in a tar."""

    start: int
    size: int


class Pictures:
    """The pictures of an index's samples, by their rows; what was read is kept.

    Args:
        keys: ``N`` keys.
        shards: ``N`` shards of them.
        fetch: Reads samples of a shard by their keys, decoded; for shards at addresses, and where a sample's latent is
            its picture.
    """

    def __init__(self, keys: Sequence[str], shards: Sequence[ShardInfo], fetch: Fetch) -> None:
        self.keys, self.shards, self.fetch = keys, shards, fetch
        self._kept = OrderedDict[int, Shown]()
        self._places: dict[str, dict[str, dict[str, _Place]]] = {}
        self._lock = Lock()

    def shown(self, rows: Sequence[int]) -> list[Shown]:
        """Some pictures; never an error, since the page serves without them.

        Args:
            rows: Of the samples.

        Returns:
            In the order of the rows.
        """
        with self._lock:
            found = {row: self._kept[row] for row in rows if row in self._kept}
            by_shard: dict[str, list[int]] = {}
            for row in rows:
                if row not in found:
                    by_shard.setdefault(self.shards[row].url, []).append(row)
            for of_shard in by_shard.values():
                found |= self._read(self.shards[of_shard[0]], of_shard)
            for row in found:
                self._kept[row] = found[row]
                self._kept.move_to_end(row)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return [found[row] for row in rows]

    def _read(self, shard: ShardInfo, rows: list[int]) -> dict[int, Shown]:
        try:
            local = {} if is_address(shard.url) else self._stored(shard, rows)
            left = frozenset(self.keys[row] for row in rows if row not in local)
            fetched = self.fetch(shard, left) if left else {}
        except (InputError, OSError, tarfile.TarError):  # moved or damaged since the index was made
            local, fetched = {}, {}
        shown: dict[int, Shown] = {}
        for row in rows:
            sample = local.get(row) or fetched.get(self.keys[row])
            shown[row] = Shown(self.keys[row]) if sample is None else _shown(sample)
        return shown

    def _stored(self, shard: ShardInfo, rows: list[int]) -> dict[int, Sample]:
        """Samples with a stored picture, without their arrays."""
        places = self._places.get(shard.url)
        if places is None:
            places = self._places[shard.url] = _places_in(Path(shard.url))
        found: dict[int, Sample] = {}
        with open(shard.url, "rb") as stream:
            for row in rows:
                files = places.get(self.keys[row], {})
                name = next((name for name in PICTURE_FIELDS if name in files), None)
                if name is None or "json" not in files or files["json"].size > LARGEST_JSON:
                    continue
                told = json.loads(_content(stream, files["json"]))
                found[row] = Sample(self.keys[row], torch.empty(0), {}, told, None, _content(stream, files[name]))
        return found


def _places_in(path: Path) -> dict[str, dict[str, _Place]]:
    """Key to the places of its json and picture."""
    places: dict[str, dict[str, _Place]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            key, suffix = base_plus_ext(member.name)
            if member.isfile() and key is not None and suffix.lower() in ("json", *PICTURE_FIELDS):
                places.setdefault(key, {})[suffix.lower()] = _Place(member.offset_data, member.size)
    return places


def _content(stream: Any, place: _Place) -> bytes:
    stream.seek(place.start)
    content: bytes = stream.read(place.size)
    return content


def _shown(sample: Sample) -> Shown:
    facts = {name: value for name, value in sample.metadata.items() if name not in _NO_FACTS}
    return Shown(sample.key, sample.captions, facts, picture_of(sample))


def picture_of(sample: Sample) -> Picture | None:
    """A sample's picture within the page.

    Args:
        sample: The sample.

    Returns:
        ``None`` if there is none to show.
    """
    image = image_of(sample)
    return None if image is None else InPage().place(image)
