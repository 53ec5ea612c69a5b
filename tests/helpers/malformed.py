"""Shards that are damaged or made to do harm, each a function of its number."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from toys import grey_png, toy_fields

Member = tuple[str, bytes]
SAMPLES = 4


def members(samples: int = SAMPLES) -> list[Member]:
    """The files of some toy samples."""
    fields = [toy_fields(number) for number in range(samples)]
    return [
        (f"{sample['__key__']}.{name}", content)
        for sample in fields
        for name, content in sample.items()
        if name != "__key__"
    ]


def tar(files: list[Member], form: int = tarfile.GNU_FORMAT, **changes: Any) -> bytes:
    """A tar file of some files; changes are made to the header of each."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for change, value in changes.items():
                setattr(info, change, value)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def header(name: str, size: int, kind: bytes) -> bytes:
    """A header that claims what it likes."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def starts() -> list[int]:
    """Where the headers of the toys' files lie."""
    with tarfile.open(fileobj=io.BytesIO(tar(members()))) as archive:
        return [member.offset for member in archive]


def _flip(rng: random.Random) -> bytes:
    content = bytearray(tar(members()))
    for _ in range(rng.randint(1, 4)):
        content[rng.choice(starts()) + rng.randrange(512)] ^= rng.randint(1, 255)
    return bytes(content)


def _zero_header(rng: random.Random) -> bytes:
    content = bytearray(tar(members()))
    start = rng.choice(starts())
    content[start : start + 512 * rng.randint(1, 2)] = bytes(512)
    return bytes(content)


def _cut(rng: random.Random) -> bytes:
    content = tar(members())
    return content[: rng.randrange(starts()[-1] + 512)]


def _hole(rng: random.Random) -> bytes:
    content = bytearray(tar(members()))
    start = rng.choice(starts())
    size = rng.choice([512, 1024, 4096, 8192])
    content[start : start + size] = bytes(size)
    return bytes(content)


def _joined(rng: random.Random) -> bytes:
    files = members()
    place = 3 * rng.randint(1, SAMPLES - 1)
    return tar(files[:place]) + bytes(512 * rng.choice([0, 0, 1, 5, 20])) + tar(files[place:])


def _garbage(rng: random.Random) -> bytes:
    return tar(members()) + rng.randbytes(rng.randint(1, 2000))


def _packed(rng: random.Random) -> bytes:
    pack = rng.choice([gzip.compress, bz2.compress, lzma.compress])
    content = bytearray(pack(tar(members())))
    if rng.random() < 0.5:
        return bytes(content[: rng.randrange(8, len(content))])
    content[rng.randrange(len(content))] ^= rng.randint(1, 255)
    return bytes(content)


def _chain(rng: random.Random) -> bytes:
    kind = rng.choice([tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
    body = b"19 comment=aaaaaaaa\n" if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else b"a.json"
    link = header("x", len(body), kind) + body + bytes(512 - len(body))
    return link * rng.choice([20, 500, 20_000]) + tar(members())


def _claim(rng: random.Random) -> bytes:
    kind = rng.choice([tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE, b"Q"])
    name = rng.choice(["a.latent.npy", "a.json", "a.other"])
    return header(name, rng.choice([2**20, 2**33, 2**40, 8**11]), kind) + tar(members())


def _kind(rng: random.Random) -> bytes:
    files = members()
    kind = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
    place = rng.randrange(len(files))
    end = tar(files[place:])
    return tar(files[:place])[: -(-starts()[place] // 512) * 512] + header("x.json", 0, kind) + end


def _pax(rng: random.Random) -> bytes:
    record = rng.choice(
        [
            {"size": "-5"},
            {"size": "9" * 30},
            {"path": "\x1b[2J.latent.npy"},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40)},
            {"GNU.sparse.map": "0,1," * 100, "GNU.sparse.size": str(2**40)},
            {"comment": "1" * 10_000},
        ]
    )
    return tar(members(), tarfile.PAX_FORMAT, pax_headers=record)


def _names(rng: random.Random) -> bytes:
    files, place = members(), rng.randrange(3 * SAMPLES)
    name, content = files[place]
    bad = rng.choice(
        ["." + name, name.replace("-", ".", 1), "\udcff" + name, "\x1b[2J" + name, name + "\n", "a" * 5000]
    )
    files[place] = (bad, content)
    return tar(files)


def _order(rng: random.Random) -> bytes:
    files = members()
    if rng.random() < 0.5:
        return tar([*files, files[rng.randrange(len(files))]])
    rng.shuffle(files)
    return tar(files)


def _array(rng: random.Random) -> bytes:
    files, place = members(), 3 * rng.randrange(SAMPLES)
    stream = io.BytesIO()
    shape = rng.choice(["(2000000000, 8, 8)", "(3, 8, 8, 8)", "(-3, 8, 8)", "(0, 8, 8)", "(3, 8, 9**99)", "(3, 8, 7)"])
    kind = rng.choice(["<f4", "<f4", "<f2", "|O", "<f8", "<U9", "|V8"])
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    stream.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(rng.choice([0, 768, 1000])))
    named = {name.partition(".")[2]: name for name, _ in files[place : place + 3]}
    target = named[rng.choice(["latent.npy", "text.npy"])]
    return tar([(name, stream.getvalue() if name == target else content) for name, content in files])


def _number(rng: random.Random) -> bytes:
    files, place = members(), rng.randrange(SAMPLES)
    key = files[3 * place][0].partition(".")[0]
    array = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
    array[1, 2, 3] = rng.choice([np.nan, np.inf, -np.inf, 3e38, -1e30, 1e9])
    stream = io.BytesIO()
    np.save(stream, array)
    return tar([(n, stream.getvalue() if n == f"{key}.latent.npy" else content) for n, content in files])


def _json(rng: random.Random) -> bytes:
    files, place = members(), rng.randrange(SAMPLES)
    key = files[3 * place][0].partition(".")[0]
    bad = rng.choice(
        [
            b"",
            b"[" * 50_000,
            b'{"captions": ["\\ud800"]}',
            b'{"captions": ["\xff"]}',
            b'{"captions": 3}',
            json.dumps({"captions": ["a"], "x": 1}).encode("utf-16"),
            b'{"captions": ["a"], "n": ' + b"9" * 9999 + b"}",
        ]
    )
    return tar([(n, bad if n == f"{key}.json" else content) for n, content in files])


def _picture(rng: random.Random) -> bytes:
    mask = bytearray(grey_png(np.ones((8, 8))))
    mask[16:24] = rng.choice([13_000, 2**31 - 1]).to_bytes(4, "big") * 2  # its header's width and height
    return tar([*members(), ("sample-00003.mask.png", bytes(mask))])


def _bomb(rng: random.Random) -> bytes:
    size = 2**28 + 2**26
    name = rng.choice(["a.latent.npy", "a.other"])
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as packed:
        packed.write(header(name, size, tarfile.REGTYPE))
        for _ in range(size // 2**22):
            packed.write(bytes(2**22))
        packed.write(tar(members()))
    return stream.getvalue()


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bits of a header": _flip,
    "a zeroed header": _zero_header,
    "a cut": _cut,
    "a hole": _hole,
    "archives joined": _joined,
    "bytes after the end": _garbage,
    "a damaged packing": _packed,
    "a chain of headers": _chain,
    "a size that is only claimed": _claim,
    "no regular file": _kind,
    "a pax header": _pax,
    "names": _names,
    "order": _order,
    "an array's header": _array,
    "a number": _number,
    "a json": _json,
    "a picture": _picture,
}
RARE = {"a bomb": _bomb}


def malformed(number: int, seed: int = 0) -> tuple[str, bytes]:
    """The kind and the bytes of a malformed shard; one in fifty unpacks to very much."""
    rng = random.Random(f"{seed} {number}")
    kinds = list((RARE if number % 50 == 49 else KINDS).items())
    kind, make = kinds[number % len(kinds)]
    return kind, make(rng)
