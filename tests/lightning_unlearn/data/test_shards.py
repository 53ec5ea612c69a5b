from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from toys import toy_fields, toy_shards

from lightning_unlearn.data.shards import MANIFEST, encode_sample, npy_bytes, shard_id, write_shards


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shard_id_is_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_shards(tmp_path / "data", 1) / "shard-000000.tar"
    names = set()
    for folder, name in (
        (tmp_path, "data/shard-000000.tar"),
        (tmp_path, "./data/../data/shard-000000.tar"),
        (tmp_path / "data", "shard-000000.tar"),
        (Path("/"), str(path)),
    ):
        monkeypatch.chdir(folder)
        names.add(shard_id(name))
    assert len(names) == 1
    assert names.pop().startswith("shard-000000-")


def test_shard_id_is_the_same_in_another_process() -> None:
    url = "https://example.org/data/coco-000017.tar?version=2"
    code = f"from lightning_unlearn.data.shards import shard_id; print(shard_id({url!r}))"
    # Another hash seed must not matter.
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == shard_id(url)


def test_shard_id_tells_addresses_apart_and_is_a_file_name() -> None:
    urls = [
        "https://example.org/a/x.tar",
        "https://example.org/b/x.tar",
        "https://example.org/a/x.tar?version=2",
        "http://example.org/a/x.tar",
        "pipe:cat /data/x.tar",
        "/data/x.tar",
        "/data/y.tar",
        "/data/" + 300 * "y" + ".tar",
        "/data/ü x*.tar",
    ]
    names = [shard_id(url) for url in urls]
    assert len(set(names)) == len(urls)
    for name in names:
        assert len(name) < 100
        assert all(letter.isalnum() or letter in "-_" for letter in name)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first = contents(toy_shards(tmp_path / "first", 6, 4))
    second = contents(toy_shards(tmp_path / "second", 6, 4))
    assert first == second
    assert sorted(first) == [MANIFEST, "shard-000000.tar", "shard-000001.tar"]


def test_shards_say_nothing_about_who_made_them_or_when(tmp_path: Path) -> None:
    with tarfile.open(toy_shards(tmp_path, 1) / "shard-000000.tar") as archive:
        for member in archive:
            assert (member.mtime, member.uname, member.gname) == (0, "", "")


def test_manifest_gives_counts_and_sizes(tmp_path: Path) -> None:
    samples = [toy_fields(number) for number in range(5)]
    shards = write_shards(samples, tmp_path, name="coco", samples_per_shard=2, about={"vae": "mean"})
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    assert manifest["vae"] == "mean"
    assert manifest["shards"] == [
        {
            "name": f"coco-{number:06d}.tar",
            "samples": count,
            "bytes": (tmp_path / f"coco-{number:06d}.tar").stat().st_size,
            "sha256": hashlib.sha256((tmp_path / f"coco-{number:06d}.tar").read_bytes()).hexdigest(),
        }
        for number, count in enumerate([2, 2, 1])
    ]
    assert [shard.samples for shard in shards] == [2, 2, 1]
    assert [Path(shard.url).name for shard in shards] == ["coco-000000.tar", "coco-000001.tar", "coco-000002.tar"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # WebDataset's
def test_webdataset_itself_reads_what_was_written(tmp_path: Path) -> None:
    samples = [toy_fields(number) for number in range(3)]
    write_shards(samples, tmp_path)
    read = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample["__key__"] for sample in samples]
    for got, wanted in zip(read, samples, strict=True):
        assert {name: got[name] for name in wanted} == wanted


def test_samples_are_taken_as_they_come_and_not_all_held(tmp_path: Path) -> None:
    def samples() -> Iterator[dict[str, Any]]:
        for number in range(6):
            assert len(list(tmp_path.glob("*.tar"))) == number // 2
            yield toy_fields(number)

    write_shards(samples(), tmp_path, samples_per_shard=2)
    assert len(list(tmp_path.glob("*.tar"))) == 3


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # WebDataset's
def test_dots_in_a_key_do_not_end_it(tmp_path: Path) -> None:
    sample = encode_sample(
        "a.b/c.d", np.zeros((1, 2, 2), np.float32), np.zeros((1, 1, 1), np.float32), {"captions": ["c"]}
    )
    write_shards([sample], tmp_path)
    (read,) = webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)
    assert read["__key__"] == "a_b/c_d"
    assert set(read) >= {"latent.npy", "text.npy", "json"}


def test_objects_are_never_pickled_into_a_shard() -> None:
    with pytest.raises(ValueError, match="allow_pickle=False"):
        npy_bytes(np.array([{}], dtype=object))


def test_no_samples_make_a_manifest_without_shards(tmp_path: Path) -> None:
    assert write_shards([], tmp_path / "deep" / "folder") == []
    assert contents(tmp_path / "deep" / "folder") == {MANIFEST: b'{\n "shards": []\n}\n'}


def test_interrupted_writing_leaves_whole_shards_only(tmp_path: Path) -> None:
    def samples() -> Iterator[dict[str, Any]]:
        for number in range(5):
            yield toy_fields(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(), tmp_path / "interrupted", samples_per_shard=2)
    whole = contents(toy_shards(tmp_path / "whole", 4, 2))
    del whole[MANIFEST]
    assert contents(tmp_path / "interrupted") == whole
