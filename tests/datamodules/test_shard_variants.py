"""Malformed and hostile shards: the right samples, or one sentence that names the shard; never anything else.

Written against issue 14 before its cures. Memory is watched in a process of its own, whose address space is limited.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import LATENT, grey_png, toy_fields

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import ShardInfo, npy_bytes, write_shards
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.errors import InputError

Member = tuple[str, bytes]
ZEROS = bytes(512)


def members_of(number: int, key: str | None = None, **changed: bytes | None) -> list[Member]:
    """A sample's files; ``latent_npy=...`` puts other bytes in one's place, and ``None`` leaves it out."""
    fields = toy_fields(number)
    key = key if key is not None else fields["__key__"]
    files = {name: fields[name] for name in ("latent.npy", "text.npy", "json")}
    files |= {name.replace("_npy", ".npy").replace("_png", ".png"): content for name, content in changed.items()}  # type: ignore[dict-item]
    return [(f"{key}.{name}", content) for name, content in files.items() if content is not None]


def three(*_: Any) -> list[Member]:
    return [member for number in range(3) for member in members_of(number)]


KEYS = [f"sample-{number:05d}" for number in range(3)]


def tar_bytes(members: list[Member], **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def written(folder: Path, content: bytes, name: str = "x.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def said_well(error: InputError, *names: str) -> None:
    """One sentence, without raw control characters, that has all names in it."""
    text = str(error)
    assert text.isprintable(), f"raw characters in {text!r}"
    text.encode()  # half a surrogate would stop the printing of it
    for name in names:
        assert name in text, f"no {name} in {text!r}"


def read(path: Path | ShardInfo, *names: str, masks: bool = False) -> list[Sample] | None:
    """All samples; none if one sentence names the shard."""
    info = path if isinstance(path, ShardInfo) else ShardInfo(str(path))
    refused: InputError | None = None
    samples: list[Sample] = []
    try:
        samples.extend(read_samples(info, pictures=True, masks=masks))
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(refused, *(names or (Path(info.url).name,)))
        return None
    for sample in samples:  # what goes on to tables and reports can be written there
        sample.key.encode()
        json.dumps(sample.metadata, ensure_ascii=False).encode()
        assert sample.latent.isfinite().all()
        assert sample.text.isfinite().all()
    return samples


def assert_is(samples: list[Sample] | None, keys: list[str] | None = None) -> None:
    """Refused, or just the toys of these keys, number by number."""
    if samples is None:
        return
    assert [sample.key for sample in samples] == (KEYS if keys is None else keys)
    for number, sample in enumerate(samples):
        fields = toy_fields(number)
        assert np.array_equal(sample.latent.numpy(), np.load(io.BytesIO(fields["latent.npy"])))
        assert np.array_equal(sample.text.numpy(), np.load(io.BytesIO(fields["text.npy"])))
        assert sample.metadata == json.loads(fields["json"])


def starts() -> list[int]:
    """Where the headers of the three samples' nine files lie."""
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(three()))) as archive:
        return [member.offset for member in archive]


# ----------------------------------------------------------------------------------------------- cut and glued


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
@pytest.mark.parametrize("cut", [1, 4, 8, 9, 100, 0.5, 0.9])
def test_compressed_shard_that_is_cut_off(tmp_path: Path, pack: Callable[[bytes], bytes], cut: float) -> None:
    """Also where only the checksum at its end is missing: without it nobody knows that all came."""
    whole = pack(tar_bytes(three()))
    left = len(whole) - int(cut) if cut >= 1 else int(len(whole) * cut)
    assert_is(read(written(tmp_path, whole[:left], "x.tar.gz")))


@pytest.mark.parametrize("place", [-1, -5, -8, 40])
def test_gzip_whose_checksum_or_length_is_wrong(tmp_path: Path, place: int) -> None:
    whole = bytearray(gzip.compress(tar_bytes(three())))
    whole[place] ^= 0x10
    assert_is(read(written(tmp_path, bytes(whole), "x.tar.gz")))


def test_gzip_of_several_members_is_one_shard_or_refused(tmp_path: Path) -> None:
    whole = tar_bytes(three())
    content = b"".join(gzip.compress(whole[start : start + 3000], mtime=0) for start in range(0, len(whole), 3000))
    assert_is(read(written(tmp_path, content, "x.tar.gz")))


GLUED: dict[str, Callable[[list[bytes]], bytes]] = {
    "tars": lambda parts: b"".join(parts),
    "gzipped tars": lambda parts: b"".join(gzip.compress(part, mtime=0) for part in parts),
    "a tar after an empty one": lambda parts: bytes(10240) + b"".join(parts),
    "one block of zeros between": lambda parts: b"".join(part.rstrip(b"\0") + ZEROS for part in parts),
    "tars far apart": lambda parts: bytes(512 * 100).join(parts),
    "a tar of other blocking": lambda parts: bytes(1024).join(
        part[: len(part.rstrip(b"\0")) + -len(part.rstrip(b"\0")) % 512] for part in parts
    ),
}


@pytest.mark.parametrize("way", GLUED)
def test_archives_one_after_the_other(tmp_path: Path, way: str) -> None:
    content = GLUED[way]([tar_bytes(members_of(number)) for number in range(3)])
    assert_is(read(written(tmp_path, content)))


@pytest.mark.parametrize("member", range(9))
@pytest.mark.parametrize("blocks", [1, 2])
def test_headers_that_were_zeroed(tmp_path: Path, member: int, blocks: int) -> None:
    """A bad disk gives zeros, and two blocks of them are how an archive ends; at its start it is none at all."""
    whole, at = bytearray(tar_bytes(three())), starts()[member]
    whole[at : at + 512 * blocks] = bytes(512 * blocks)
    assert_is(read(written(tmp_path, bytes(whole))))


def test_end_of_an_archive_that_is_padded_with_many_zeros_is_right(tmp_path: Path) -> None:
    samples = read(written(tmp_path, tar_bytes(three()) + bytes(512 * 4000)))
    assert samples is not None
    assert_is(samples)


@pytest.mark.parametrize("garbage", [b"x", b"\xff" * 512, b"PK\3\4" * 200, gzip.compress(b"more", mtime=0)])
def test_bytes_after_the_end(tmp_path: Path, garbage: bytes) -> None:
    assert_is(read(written(tmp_path, tar_bytes(three()) + garbage)))


@pytest.mark.parametrize(
    "content", [b"", bytes(512), bytes(10240), gzip.compress(b"", mtime=0), b"\x1f\x8b", b"PK\x05\x06" + bytes(18)]
)
def test_shard_with_nothing_in_it(tmp_path: Path, content: bytes) -> None:
    assert_is(read(written(tmp_path, content)), [])


# ------------------------------------------------------------------------------ what the manifest says, and does not


def with_manifest(folder: Path, **changed: Any) -> Path:
    write_shards([toy_fields(number) for number in range(3)], folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0].update(changed)
    path.write_text(json.dumps(manifest))
    return folder / "shard-000000.tar"


def all_ways(folder: Path, shard: Path) -> None:
    """Reading, training and scoring give the samples as they were, or name the shard."""
    (info,) = list_shards(str(folder))
    assert_is(read(info))
    training = TrainingDataModule(str(folder), batch_size=3)
    keys: list[str] = []
    try:
        for batch in training.train_dataloader():
            keys += batch.keys
            for key, latent in zip(batch.keys, batch.latents, strict=True):
                wanted = np.load(io.BytesIO(toy_fields(int(key[-5:]))["latent.npy"]))
                assert np.array_equal(latent.numpy(), wanted), f"trained on another {key}"
    except InputError as error:
        said_well(error, shard.name)
    queries = folder.parent / "queries"
    write_shards([toy_fields(7, prefix="query")], queries, name="query")
    scoring = AttributionDataModule(str(folder), str(queries), batch_size=2)
    ended = False
    try:
        scoring.setup("predict")
        for scored in scoring.predict_dataloader():
            if scored.error is not None:
                assert shard.name in scored.error
                ended = False
                continue
            for key, latent in zip(scored.keys, [] if scored.latents is None else scored.latents, strict=True):
                wanted = np.load(io.BytesIO(toy_fields(int(key[-5:]))["latent.npy"]))
                whole = np.array_equal(latent.numpy(), wanted)
                assert whole or not ended
                if not whole:
                    ended = True  # then an error must follow before the shard is said to be whole
            assert not (ended and scored.end_of_shard is not None), "a changed sample is in a shard that is whole"
    except InputError as error:
        said_well(error, shard.name)


@settings(max_examples=25)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_bits_that_flipped_under_a_manifest(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    shard = with_manifest(folder)
    content = bytearray(shard.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    shard.write_bytes(content)
    (info,) = list_shards(str(folder))
    assert_is(read(info))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_sample_that_was_replaced_in_place_under_a_manifest(tmp_path: Path, number: int) -> None:
    """Every way to read the shard says so; the file's size and its number of samples are the same."""
    shard = with_manifest(tmp_path / "shards")
    other = [toy_fields(9, prefix="sample") | {"__key__": KEYS[n]} if n == number else toy_fields(n) for n in range(3)]
    write_shards(other, tmp_path / "other")
    changed = (tmp_path / "other" / shard.name).read_bytes()
    assert len(changed) == len(shard.read_bytes())
    shard.write_bytes(changed)
    all_ways(tmp_path / "shards", shard)


@pytest.mark.parametrize(
    "said",
    [
        {"sha256": 5},
        {"sha256": ["a"]},
        {"sha256": "abc"},
        {"sha256": ""},
        {"samples": 2},
        {"samples": -1},
        {"bytes": 1},
    ],
    ids=str,
)
def test_manifest_that_says_something_else_of_a_good_shard(tmp_path: Path, said: dict[str, Any]) -> None:
    with_manifest(tmp_path, **said)
    infos: list[ShardInfo] = []
    try:
        infos = list_shards(str(tmp_path))
    except InputError as error:
        said_well(error, "manifest.json")
        return
    assert_is(read(infos[0]))


def test_sha256_in_capitals_is_the_same(tmp_path: Path) -> None:
    shard = with_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["sha256"] = manifest["shards"][0]["sha256"].upper()
    path.write_text(json.dumps(manifest))
    (info,) = list_shards(str(tmp_path))
    samples = read(info, shard.name)
    assert samples is None or len(samples) == 3


def test_shard_without_a_manifest_that_was_replaced_by_one_of_its_size_is_another(tmp_path: Path) -> None:
    shard = written(tmp_path, tar_bytes(three()))
    (before,) = list_shards(str(tmp_path))
    version = before.version
    written(tmp_path, tar_bytes([m for n in (2, 1, 0) for m in members_of(n)]))
    os.utime(shard, ns=(1, 10**18))
    (after,) = list_shards(str(tmp_path))
    assert after.bytes == before.bytes
    assert after.version != version


# -------------------------------------------------------------------------------------------------- keys and names


def use_all(use: str, shards: str, queries: str) -> None:
    """Read all samples in one way or another."""
    if use in ("training", "cached training"):
        loader = TrainingDataModule(shards, batch_size=1, samples_per_epoch=3, cache=use != "training")
        list(loader.train_dataloader())
    elif use == "queries":
        AttributionDataModule(queries, shards).setup("fit")
    else:
        module = AttributionDataModule(shards, queries)
        module.setup("predict")
        for batch in module.predict_dataloader():
            if batch.error is not None:
                raise InputError(batch.error)


@pytest.mark.parametrize(
    "members",
    [
        [*members_of(0), *members_of(1), *members_of(0)],
        [*members_of(0), *members_of(0)],
        [*members_of(0, json=None), *members_of(1), *members_of(0, latent_npy=None, text_npy=None)],
        [*members_of(0), *members_of(1), *members_of(2, key=KEYS[0])],
    ],
    ids=["again later", "twice in a row", "its json later", "another sample of its key"],
)
@pytest.mark.parametrize("use", ["training", "cached training", "scoring", "queries"])
def test_key_that_stands_twice(tmp_path: Path, members: list[Member], use: str) -> None:
    written(tmp_path / "shards", tar_bytes(members))
    write_shards([toy_fields(7, prefix="query")], tmp_path / "queries")
    shards, queries = str(tmp_path / "shards"), str(tmp_path / "queries")
    with pytest.raises(InputError) as error:
        use_all(use, shards, queries)
    said_well(error.value, KEYS[0])


NAMES: dict[str, tuple[list[str], str]] = {
    # name: (the keys that are in the tar, what a refusal has in it)
    "a dot first": ([".hidden", "b", ".c"], "x.tar"),
    "a dot first in a folder": (["a/.hidden", "a/b", "a/c"], "x.tar"),
    "two dots first": (["..a", "b", "c"], "x.tar"),
    "a file of macOS": (["._a", "a", "b"], "x.tar"),
    "a dot in the middle": (["a.1", "a.2", "b"], "'a'"),
    "a version": (["v1.5-a", "v1.5-b", "c"], "'v1'"),
    "nothing": (["", "b", "c"], "x.tar"),
    "a folder alone": (["a/", "b", "c"], "x.tar"),
}


@pytest.mark.parametrize("way", NAMES)
def test_names_with_dots(tmp_path: Path, way: str) -> None:
    keys, named = NAMES[way]
    members = [member for number, key in enumerate(keys) for member in members_of(number, key=key)]
    samples = read(written(tmp_path, tar_bytes(members)), "x.tar", named)
    if way == "a file of macOS" and samples is not None and len(samples) == 2:  # not a sample of anybody's
        assert [sample.key for sample in samples] == ["a", "b"]
        return
    assert_is(samples, keys)


@pytest.mark.parametrize("prefix", ["./", "data/", "v1.5/", "/tmp/x/", "../", "a b/", "ä/", "💡/", "x" * 200 + "/"])
def test_folders_in_names_are_part_of_the_key(tmp_path: Path, prefix: str) -> None:
    members = [(prefix + name, content) for name, content in three()]
    samples = read(written(tmp_path, tar_bytes(members)))
    if samples is not None:
        assert [sample.key.removeprefix("./").removeprefix("/") for sample in samples] == [
            (prefix + key).removeprefix("./").removeprefix("/") for key in KEYS
        ]


@pytest.mark.parametrize("order", ["by kind", "reversed by kind", "one file late"])
def test_samples_whose_files_lie_apart(tmp_path: Path, order: str) -> None:
    members = three()
    if order == "one file late":
        members = [*members[1:], members[0]]
    else:
        members = sorted(members, key=lambda m: m[0].partition(".")[2], reverse=order != "by kind")
    samples = read(
        written(tmp_path, tar_bytes(members)), "x.tar", KEYS[0] if order != "reversed by kind" else "sample-"
    )
    if samples is None:
        with pytest.raises(InputError, match=r"side by side|together|apart|beside|next to"):
            list(read_samples(ShardInfo(str(tmp_path / "x.tar"))))
    else:
        assert {sample.key for sample in samples} == set(KEYS)


def raw_name(name: bytes) -> bytes:
    """A tar whose last sample's files have a name of these bytes."""
    content = bytearray()
    for given_name, data in [*members_of(0), *members_of(1, key="K")]:
        block = bytearray(header(given_name, len(data)))
        if given_name.startswith("K"):
            new = name + given_name[1:].encode()
            block[:100] = new[:100].ljust(100, b"\0")
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
        content += bytes(block) + padded(data)
    return bytes(content) + bytes(1024)


@pytest.mark.parametrize(
    "name", [b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"a\nb", b"\x1b[31mred", b"a\rb", b"\x07", b"\xc3"]
)
def test_names_that_are_no_text(tmp_path: Path, name: bytes) -> None:
    """Latin-1, half a surrogate, line breaks and escapes: kept so that they can be written, or refused readably."""
    read(written(tmp_path, raw_name(name)))


def test_file_of_a_shard_whose_own_name_breaks_lines(tmp_path: Path) -> None:
    path = written(tmp_path, b"no tar at all" * 100, "a\nb\x1b[31m.tar")
    with pytest.raises(InputError) as error:
        list(read_samples(ShardInfo(str(path))))
    said_well(error.value)


# --------------------------------------------------------------------------------------------- headers and bombs


def chain(kind: bytes, count: int, content: bytes) -> bytes:
    return (header("././@LongLink", len(content), kind) + padded(content)) * count + tar_bytes(three())


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    text = b""
    for name, value in records.items():
        body = f" {name}={value}\n".encode()
        length = len(body) + len(str(len(body)))
        length = len(body) + len(str(length))
        text += str(length).encode() + body
    return header("pax", len(text), kind) + padded(text)


GB = 2**30
HEADERS: dict[str, bytes] = {
    "many long names": chain(tarfile.GNUTYPE_LONGNAME, 3000, b"a\0"),
    "many long links": chain(tarfile.GNUTYPE_LONGLINK, 3000, b"a\0"),
    "many pax headers": pax({"comment": "x"}) * 3000 + tar_bytes(three()),
    "many global pax headers": pax({"comment": "x"}, tarfile.XGLTYPE) * 3000 + tar_bytes(three()),
    "a long name of 2 GB": header("././@LongLink", 2 * GB, tarfile.GNUTYPE_LONGNAME) + tar_bytes(three()),
    "a pax header of 2 GB": header("pax", 2 * GB, tarfile.XHDTYPE) + tar_bytes(three()),
    "a file of 2 GB that is not there": header("a.latent.npy", 2 * GB) + bytes(512),
    "pax size no number": pax({"size": "abc"}) + tar_bytes(three()),
    "pax size negative": pax({"size": "-1"}) + tar_bytes(three()),
    "pax size of 10^18": pax({"size": "1" + "0" * 18}) + tar_bytes(three()),
    "pax records no numbers": header("pax", 9, tarfile.XHDTYPE) + padded(b"xx path=\n") + tar_bytes(three()),
    "pax record of length zero": header("pax", 9, tarfile.XHDTYPE) + padded(b"0 path=a\n") + tar_bytes(three()),
    "pax hdrcharset": pax({"hdrcharset": "BINARY", "path": "é.json"}) + tar_bytes(three()),
    "pax sparse": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(4 * GB)})
    + tar_bytes(three()),
    "pax sparse, map no numbers": pax({"GNU.sparse.map": "a,b", "GNU.sparse.size": "x"}) + tar_bytes(three()),
    "pax sparse, offsets": pax({"GNU.sparse.size": str(2 * GB), "GNU.sparse.numblocks": "1"}) + tar_bytes(three()),
    "negative size": header("a.json", 0)[:124] + b"\xff" * 12 + header("a.json", 0)[136:] + bytes(1024),
    "unknown types": header("a.json", 512, b"Z") + bytes(512) + tar_bytes(three()),
    "a device": header("a.json", 0, tarfile.CHRTYPE) + tar_bytes(three()),
    "a hard link to a sample": tar_bytes(three())[:-10240].rstrip(b"\0"),
}


def sparse(real_size: int) -> bytes:
    """GNU's old sparse header: a file of nothing but a hole."""
    block = bytearray(header("a.latent.npy", 0, tarfile.GNUTYPE_SPARSE))
    block[386:398] = b"00000000000\0"
    block[398:410] = b"00000000000\0"
    block[482] = 0
    block[483:495] = b"%011o\0" % real_size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


HEADERS["sparse of 2 GB"] = sparse(2 * GB) + tar_bytes(three())
HEADERS["sparse chain"] = sparse(512) * 2000 + tar_bytes(three())


def packed_zeros(heads: list[bytes], megabytes: int) -> bytes:
    """One gzip stream of heads that are followed by many zeros each; blocks that were flushed can be repeated."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = 64 * (squeeze.compress(bytes(2**20)) + squeeze.flush(zlib.Z_FULL_FLUSH))
    content = bytearray()
    for head in heads:
        squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
        content += squeeze.compress(head) + squeeze.flush(zlib.Z_FULL_FLUSH) + block * (megabytes // 64)
    content += zlib.compressobj(9, zlib.DEFLATED, -15).flush()
    return b"\x1f\x8b\x08" + bytes(7) + bytes(content) + bytes(8)  # who reads as far as the checksum took the bait


def file_of_zeros(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A shard of one file of 768 MB, in less than one."""
    return packed_zeros([header(name, 768 * 2**20, kind)], 768)


def bomb_png(side: int) -> bytes:
    """A grey picture of one colour, of a size that nobody has."""
    rows = zlib.compressobj(9)
    row = bytes(1 + side)
    packed = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()

    def part(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", size) + part(b"IDAT", packed) + part(b"IEND", b"")


def npy(shape: str, kind: str = "<f4", data: bytes = bytes(64), version: int = 1, order: str = "False") -> bytes:
    """An npy file that claims what it likes."""
    text = f"{{'descr': {kind if kind.startswith('[') else repr(kind)}, 'fortran_order': {order}, 'shape': {shape}, }}"
    length = 2 if version == 1 else 4
    text = text.ljust(117, " ") + "\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(length, "little") + text.encode() + data


class Touches:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


def pickled_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([[[Touches()]]], dtype=object), allow_pickle=True)
    return stream.getvalue()


ARRAYS: dict[str, bytes] = {
    "of 120 GB": npy("(3, 100000, 100000)"),
    "of 10^18 numbers": npy("(3, 1000000000, 1000000000)"),
    "beyond 64 bits": npy("(3, 99999999999, 99999999999)"),
    "negative": npy("(-3, 8, 8)"),
    "empty": npy("(3, 0, 8)"),
    "of true and false": npy("(True, 4, 4)"),
    "of a list for a shape": npy("[3, 4, 4]"),
    "of letters": npy("(1, 2, 2)", "<U4"),
    "of dates": npy("(1, 2, 2)", "<M8[s]"),
    "of complex numbers": npy("(1, 2, 2)", "<c8"),
    "of records": npy("(1, 2, 2)", "[('a', '<f4')]"),
    "of objects": npy("(1, 2, 2)", "|O"),
    "of nothing known": npy("(1, 2, 2)", "<q9"),
    "deep header": npy("(" * 4000 + ")" * 4000),
    "header of code": npy("__import__('os').system('touch was-run')"),
    "header of two gigabytes": b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{}",
    "version nine": npy("(1, 2, 2)", version=9),
    "no npy": b"latent",
    "none": b"",
    "npz": b"PK\3\4" + bytes(60),
    "pickled": pickled_npy(),
    "1e300 in float64": npy_bytes(np.full(LATENT, 1e300)),
    "infinity in float16": npy_bytes(np.full(LATENT, np.inf, dtype=np.float16)),
    "one not a number": npy_bytes(np.where(np.arange(192).reshape(LATENT) == 100, np.nan, 1.0).astype(np.float32)),
    "-inf": npy_bytes(np.full(LATENT, -np.inf, dtype=np.float32)),
}

BOMBS: dict[str, Callable[[], bytes]] = {
    "a latent": lambda: file_of_zeros("a.latent.npy"),
    "a sample of many files": lambda: packed_zeros([header(f"a.x{n}.json", 128 * 2**20) for n in range(6)], 128),
    "many samples' captions": lambda: packed_zeros([header(f"a{n}.json", 192 * 2**20) for n in range(4)], 192),
    "captions": lambda: file_of_zeros("a.json"),
    "a file nobody asked for": lambda: file_of_zeros("a.bin"),
    "a long name": lambda: file_of_zeros("././@LongLink", tarfile.GNUTYPE_LONGNAME),
    "a pax header": lambda: file_of_zeros("pax", tarfile.XHDTYPE),
    "a hole": lambda: sparse(2 * GB) + bytes(1024),
    "zeros after the end": lambda: packed_zeros([tar_bytes(members_of(0))], 768),
    "a mask of 169 megapixels": lambda: tar_bytes(members_of(0, mask_png=bomb_png(13000))),
    "a picture of 169 megapixels": lambda: tar_bytes(members_of(0, png=bomb_png(13000))),
}

# Also where a sample is never asked for, nothing may be kept of it.
CHILD = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from lightning_unlearn.data.shards import ShardInfo
    from lightning_unlearn.datamodules.reading import read_samples
    from lightning_unlearn.errors import InputError
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
    for path in sys.argv[1:]:
        try:
            said = f"{len(list(read_samples(ShardInfo(path), pictures=True, masks=True)))} samples"
        except InputError as error:
            said = f"InputError {error}"
        except BaseException as error:
            said = f"{type(error).__name__}"
        print(Path(path).name, said, sep="\\t", flush=True)
    """
)


@pytest.mark.timeout(400)
def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """One process, which may take 512 MB more than it has after its imports, is given 768 MB each time."""
    paths = {way: str(written(tmp_path, make(), f"bomb{n}.tar.gz")) for n, (way, make) in enumerate(BOMBS.items())}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *paths.values()], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    said = dict(line.split("\t") for line in child.stdout.splitlines())
    wrong = []
    for way, path in paths.items():
        name = Path(path).name
        outcome = said.get(name, f"the process ended: {child.stderr[-200:]}")
        named = outcome.startswith("InputError") and name in outcome
        # A picture is kept as bytes; zeros are how an archive ends.
        fine = outcome == "1 samples" and way in ("a picture of 169 megapixels", "zeros after the end")
        if not (named or fine):
            wrong.append(f"{way}: {outcome[:150]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("way", HEADERS)
def test_headers_of_all_sorts(tmp_path: Path, way: str) -> None:
    """Whatever the first header says, what follows is read as it is, or the shard is refused; nothing disappears."""
    samples = read(written(tmp_path, HEADERS[way]))
    if samples is None or way in ("negative size", "a file of 2 GB that is not there"):
        assert samples is None, "a shard that ends in the middle"
        return
    found = [sample.key for sample in samples]
    assert found[-2:] == KEYS[-2:], f"samples are gone: {found}"


@pytest.mark.parametrize("field", ["latent_npy", "text_npy", "latent_flip_npy"])
@pytest.mark.parametrize("way", ARRAYS)
def test_arrays_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, field: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, tar_bytes([*members_of(0, **{field: ARRAYS[way]}), *members_of(1)]))
    assert read(path, "x.tar", KEYS[0]) is None
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("way", ["big-endian", "fortran", "float64", "float16", "int32"])
def test_arrays_of_other_make_are_right(tmp_path: Path, way: str) -> None:
    wanted = np.arange(192).reshape(LATENT).astype(np.float64) / 4
    array = {
        "big-endian": wanted.astype(">f4"),
        "fortran": np.asfortranarray(wanted.astype(np.float32)),
        "float64": wanted,
        "float16": wanted.astype(np.float16),
        "int32": (wanted * 4).astype(np.int32),
    }[way]
    samples = read(written(tmp_path, tar_bytes(members_of(0, latent_npy=npy_bytes(array)))), "x.tar", KEYS[0])
    if samples is not None:
        assert np.array_equal(samples[0].latent.double().numpy(), wanted * (4 if way == "int32" else 1))
    else:  # DESIGN has float16 and float32; others may be refused, but these two may not
        assert way not in ("fortran", "float16")


JSONS: dict[str, bytes] = {
    "deep": b'{"captions": ["a"], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep braces": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "half a surrogate": b'{"captions": ["a \\ud800 b"]}',
    "half a surrogate in a name": b'{"captions": ["a"], "\\udfff": 1}',
    "bytes that are no text": b'{"captions": ["caf\xe9"]}',
    "a long number": b'{"captions": ["a"], "n": ' + b"9" * 100_000 + b"}",
    "utf-16": '{"captions": ["a"]}'.encode("utf-16"),
    "no object": b"[1, 2]",
    "two objects": b'{"captions": ["a"]}{"captions": ["b"]}',
    "null": b"null",
    "nothing": b"",
    "captions of numbers": b'{"captions": [1]}',
    "captions of one string": b'{"captions": "abc"}',
    "more captions than texts": b'{"captions": ["a", "b"]}',
    "captions twice": b'{"captions": ["a"], "captions": ["b", "c"]}',
    "a zero byte": b'{"captions": ["a\0"]}',
}


@pytest.mark.parametrize("way", JSONS)
def test_json_that_is_none_or_cannot_be_written_again(tmp_path: Path, way: str) -> None:
    samples = read(written(tmp_path, tar_bytes(members_of(0, json=JSONS[way]))), "x.tar", KEYS[0])
    if samples is not None:
        assert way in ("half a surrogate", "half a surrogate in a name", "a long number", "utf-16")


def test_json_with_a_mark_of_its_order_is_read_or_refused(tmp_path: Path) -> None:
    samples = read(written(tmp_path, tar_bytes(members_of(0, json='\ufeff{"captions": ["ä"]}'.encode()))), KEYS[0])
    assert samples is None or samples[0].metadata["captions"] == ["ä"]


@pytest.mark.parametrize(
    "mask",
    [b"", b"no picture", grey_png(np.ones((8, 8)))[:-20], b"GIF89a" + bytes(30), b"\x89PNG\r\n\x1a\n" + bytes(40)],
    ids=["empty", "text", "cut", "gif", "header alone"],
)
def test_masks_that_are_no_pictures(tmp_path: Path, mask: bytes) -> None:
    assert read(written(tmp_path, tar_bytes(members_of(0, mask_png=mask))), KEYS[0], masks=True) is None


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("way", ["1e300 in float64", "one not a number", "-inf", "none", "of 10^18 numbers"])
def test_bad_sample_is_named_or_counted(tmp_path: Path, way: str, number: int, on_bad_sample: Any) -> None:
    members = [m for n in range(3) for m in members_of(n, **({"latent_npy": ARRAYS[way]} if n == number else {}))]
    shard = written(tmp_path / "shards", tar_bytes(members))
    write_shards([toy_fields(7, prefix="query")], tmp_path / "queries")
    module = AttributionDataModule(str(shard.parent), str(tmp_path / "queries"), on_bad_sample=on_bad_sample)
    if on_bad_sample == "error":
        said = ""
        try:
            module.setup("predict")
            said = "".join(batch.error or "" for batch in module.predict_dataloader())
        except InputError as error:
            said = str(error)
        assert KEYS[number] in said
        assert shard.name in said
        return
    module.setup("predict")
    batches = list(module.predict_dataloader())
    assert [batch.error for batch in batches] == [None]
    assert [key for batch in batches for key in batch.keys] == [key for n, key in enumerate(KEYS) if n != number]
    assert sum(batch.skipped for batch in batches) == 1
    assert all(batch.latents is None or batch.latents.isfinite().all() for batch in batches)


# ----------------------------------------------------------------------------------------- files in a folder


def keys_in(folder: str) -> list[str] | None:
    """The keys of all shards that a name stands for; none if one sentence refuses it."""
    refused: InputError | None = None
    keys: list[str] = []
    try:
        keys = [sample.key for info in list_shards(folder) for sample in read_samples(info)]
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(refused)
        return None
    return sorted(keys)


COMMANDS = [
    "pipe:touch was-run; cat a.tar #.tar",
    "pipe:touch was-run # .tar.gz",
    "pipe:touch was-run; cat a.tar # {a,b}.tar",
    "pipe:.tar",
]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["folder as .", "folder by path", "manifest", "file by path", "allowed"])
def test_file_whose_name_is_a_command_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    """Whatever a file is called, and if commands are allowed too: only what a user typed is one."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, tar_bytes(members_of(0)), "a.tar")
    written(tmp_path, tar_bytes(members_of(1)), name)
    if where == "manifest":
        shards = [{"name": given_name} for given_name in ("a.tar", name)]
        (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    named = {"folder by path": str(tmp_path), "file by path": str(tmp_path / name)}.get(where, ".")
    refused: InputError | None = None
    keys: list[str] = []
    try:
        infos = list_shards(named, allow_pipe=where == "allowed")
        keys = sorted(sample.key for info in infos for sample in read_samples(info))
    except InputError as error:
        refused = error
    assert not (tmp_path / "was-run").exists(), "it ran"
    if refused is not None:
        assert "pipe:" in str(refused)
    else:
        assert keys == (KEYS[1:2] if where == "file by path" else KEYS[:2])


@pytest.mark.parametrize(
    "name",
    [
        "http:x.tar",
        "file:x.tar",
        "https:..a.tar",
        "s3:a.tar",
        "x::y.tar",
        "a{b,c}.tar",
        "a{.tar",
        "x{1..3}.tar",
        "[a].tar",
        "a*.tar",
        "-rf.tar",
        "%20.tar",
        "~.tar",
        "a#b?c=d.tar",
        " .tar",
        "ä💡.tar",
    ],
)
@pytest.mark.parametrize("where", ["folder as .", "folder by path", "path", "relative path", "manifest"])
def test_name_of_a_file_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, tar_bytes(three()), name)
    if where == "manifest":
        (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"name": name}]}))
    named = {"folder as .": ".", "path": str(tmp_path / name), "relative path": f"./{name}"}.get(where, str(tmp_path))
    keys = keys_in(named)
    assert keys == KEYS, "the file lies there"


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "sub/../../a.tar", "..", "", ".", "a\0b.tar"])
def test_manifest_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    written(tmp_path, tar_bytes(three()), "a.tar")
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "sub").mkdir()
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": name}]}))
    keys = keys_in(str(folder))
    assert keys is None or (keys == KEYS and name.endswith("a.tar"))


@pytest.mark.parametrize("name", ["b.TAR", "b.Tar", "b.tar.gz", "b.tgz", "b.tar.xz", "b.tar.bz2", "b.TAR.GZ"])
def test_shard_of_another_ending_in_a_folder_is_read_or_named(tmp_path: Path, name: str) -> None:
    whole = tar_bytes(members_of(1))
    ending = name.lower().rpartition(".")[2]
    pack: Callable[[bytes], bytes] = {"gz": gzip.compress, "tgz": gzip.compress, "xz": lzma.compress}.get(
        ending, bz2.compress if ending == "bz2" else bytes
    )
    written(tmp_path, tar_bytes(members_of(0)), "a.tar")
    written(tmp_path, pack(whole), name)
    refused: InputError | None = None
    keys: list[str] = []
    try:
        keys = sorted(sample.key for info in list_shards(str(tmp_path)) for sample in read_samples(info))
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(refused, name)
    else:
        assert keys == KEYS[:2]


def test_shards_beside_a_manifest_that_it_does_not_name_are_said_or_left(tmp_path: Path) -> None:
    """A manifest says what belongs to the set."""
    with_manifest(tmp_path)
    written(tmp_path, tar_bytes(members_of(5)), "extra.tar")
    keys = keys_in(str(tmp_path))
    assert keys is None or keys == KEYS


def place(folder: Path, kind: str) -> None:
    target = folder / "b.tar"
    if kind == "directory":
        target.mkdir()
    elif kind == "directory with a tar":
        written(target, tar_bytes(three()), "inner.tar")
    elif kind == "broken link":
        target.symlink_to(folder / "nowhere")
    elif kind == "loop of links":
        target.symlink_to(target)
    elif kind == "link to itself as a folder":
        target.symlink_to(folder)
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "endless device":
        target.symlink_to("/dev/zero")
    elif kind == "random device":
        target.symlink_to("/dev/urandom")
    elif kind == "null device":
        target.symlink_to("/dev/null")


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "kind",
    [
        "directory",
        "directory with a tar",
        "broken link",
        "loop of links",
        "link to itself as a folder",
        "fifo",
        "endless device",
        "random device",
        "null device",
    ],
)
def test_what_is_no_file_in_a_folder_is_named(tmp_path: Path, kind: str) -> None:
    """Nobody waits for a pipe that nobody writes to, or reads a device to its end."""
    written(tmp_path, tar_bytes(members_of(0)), "a.tar")
    place(tmp_path, kind)
    refused: InputError | None = None
    keys: list[str] = []
    try:
        keys = [sample.key for info in list_shards(str(tmp_path)) for sample in read_samples(info)]
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(refused, "b.tar")
    else:  # a folder is no shard, so it may be passed over
        assert kind in ("directory", "directory with a tar", "link to itself as a folder")
        assert keys == KEYS[:1]


def test_link_to_a_shard_is_the_shard(tmp_path: Path) -> None:
    written(tmp_path / "store", tar_bytes(three()), "blob")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").symlink_to(tmp_path / "store" / "blob")
    assert keys_in(str(tmp_path / "set")) == KEYS


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_shard_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, tar_bytes(three()))
    path.chmod(0)
    assert read(path) is None


# ------------------------------------------------------------------------------------------- any change at all


WHOLE = tar_bytes(three())[: 512 * 40]
Change = tuple[str, float, float, bytes]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["put", "insert", "delete", "copy", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=40) | st.sampled_from([b"\xff" * 12, b"L", b"x", b"S", b"99999999999\0"]),
    ),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: list[Change], *, blocks: bool) -> bytes:
    """The content after some accidents; at the borders of blocks, where headers are, if ``blocks``."""
    for kind, first, second, data in changes:
        start = int(first * len(content))
        start -= start % 512 if blocks else 0
        size = 1 + int(second * 1500)
        size += -size % 512 if blocks else 0
        if kind == "put":
            at = start + (int(second * 257) if blocks else 0)
            content = content[:at] + data + content[at + len(data) :]
        elif kind == "insert":
            content = content[:start] + (data.ljust(512, b"\0") if blocks else data) + content[start:]
        elif kind == "delete":
            content = content[:start] + content[start + size :]
        elif kind == "copy":
            content = content[:start] + content[start : start + size] + content[start:]
        else:
            content = content[:start] + bytes(size) + content[start + size :]
    return content


@settings(max_examples=150)
@given(changes=CHANGES, blocks=st.booleans(), packed=st.booleans())
def test_any_change_under_a_manifest_is_found(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change], blocks: bool, packed: bool
) -> None:
    """The samples as they were, or a sentence."""
    folder = tmp_path_factory.mktemp("changed")
    good = tar_bytes(three())
    good = gzip.compress(good, mtime=0) if packed else good
    entry = {"name": "x.tar", "samples": 3, "bytes": len(good), "sha256": hashlib.sha256(good).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"shards": [entry]}))
    written(folder, changed(good, changes, blocks=blocks))
    infos: list[ShardInfo] = []
    try:
        infos = list_shards(str(folder))
    except InputError as error:
        said_well(error)
        return
    assert_is(read(infos[0]))


@settings(max_examples=150)
@given(changes=CHANGES, blocks=st.booleans(), packed=st.booleans())
def test_any_change_without_a_manifest_ends_in_samples_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, changes: list[Change], blocks: bool, packed: bool
) -> None:
    """What only changes numbers can't be found without a manifest; but no other exception comes out."""
    folder = tmp_path_factory.mktemp("changed")
    content = changed(WHOLE, changes, blocks=blocks)
    read(written(folder, gzip.compress(content, mtime=0) if packed else content))
