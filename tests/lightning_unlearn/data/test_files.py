from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.data import files
from lightning_unlearn.data.files import check_folder, json_with_digest, read_json, reason_of, write_atomically
from lightning_unlearn.errors import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new content")
    assert contents(tmp_path) == {"file": b"old"}
    write_atomically(path, b"new content")
    assert contents(tmp_path) == {"file": b"new content"}


def test_a_file_is_synced_in_its_own_folder_before_it_counts_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    real = os.fsync

    def watched(descriptor: int) -> None:
        seen.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    write_atomically(path, b"content")
    (written, counted), (folder, renamed) = seen
    assert Path(written).parent == tmp_path
    assert not counted
    assert (folder, renamed) == (str(tmp_path), True)


def test_what_a_killed_process_left_goes_when_its_file_is_written_and_a_living_ones_stays(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    place = files._place()
    left = tmp_path / f".file.{place}-{killed.pid}-0123.tmp"
    living = tmp_path / f".file.{place}-{os.getpid()}-4567.tmp"
    elsewhere = tmp_path / f".file.{place}x-{killed.pid}-89ab.tmp"
    for leftover in (left, living, elsewhere):
        leftover.write_bytes(b"half")
    write_atomically(tmp_path / "file", b"whole")
    assert not left.exists()
    assert living.exists()
    assert elsewhere.exists()


def test_folder_is_made_and_left_empty_and_one_that_takes_no_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(tmp_path / "deep" / "folder", "choose another")
    assert list((tmp_path / "deep" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"folder .*file/below can't be made \(Not a directory\); choose another\."):
        check_folder(tmp_path / "file" / "below", "choose another")

    def read_only(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "write_atomically", read_only)
    with pytest.raises(InputError, match=r"can be written to .*deep \(Read-only file system\); choose another\."):
        check_folder(tmp_path / "deep", "choose another")


def test_what_a_library_says_is_one_short_line_without_escapes() -> None:
    assert reason_of(ValueError("\x1b[31mred\nmore")) == "ValueError: ?[31mred"
    assert reason_of(ValueError()) == "ValueError"
    assert len(reason_of(ValueError("x" * 999))) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text().filter(lambda name: name not in ("format", "digest")), JSON, max_size=5)


def read(path: Path) -> dict[str, Any]:
    return read_json(path, "is not a note", "write it again")


def read_or_said(path: Path) -> dict[str, Any] | str:
    try:
        return read(path)
    except InputError as error:
        return str(error)


@given(content=OBJECTS)
def test_json_comes_back_as_it_was_written(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "note.json"
    path.write_bytes(json_with_digest(content))
    found = read(path)
    assert found.pop("format") == files.FORMAT
    assert found == content


@given(content=OBJECTS, seed=st.integers(0, 10**6), flips=st.integers(1, 3))
def test_json_with_flipped_bits_or_cut_off_is_never_read_as_something_else(
    content: dict[str, Any], seed: int, flips: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "note.json"
    whole, draw = bytearray(json_with_digest(content)), random.Random(seed)
    for _ in range(flips):
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(whole[: draw.randrange(len(whole))] if seed % 3 == 0 else whole))
    found = read_or_said(path)
    if isinstance(found, str):
        assert str(path) in found
        assert found.endswith("write it again.")
    else:
        found.pop("format")
        assert found == content


@given(content=OBJECTS, name=st.sampled_from(["a", "b", "format", "digest"]), value=JSON)
def test_json_with_another_value_or_without_one_is_refused(
    content: dict[str, Any], name: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "note.json"
    written = json.loads(json_with_digest({"a": 1, "b": "two", **content}))
    for changed in ({**written, name: value}, {key: kept for key, kept in written.items() if key != name}):
        if json.dumps(changed, sort_keys=True) != json.dumps(written, sort_keys=True):
            path.write_text(json.dumps(changed))
            with pytest.raises(InputError, match="was altered after it was written; write it again"):
                read(path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe{\x00}\x00x", b"[1]", b"null", b"3", b'{"a": '])
def test_what_is_no_json_object_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "note.json").write_bytes(content)
    with pytest.raises(InputError, match=r"note\.json is not a note \(\w+\); write it again\."):
        read(tmp_path / "note.json")


def test_a_file_from_before_there_were_digests_is_read(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text('{"a": 1}')
    assert read(tmp_path / "note.json") == {"a": 1}
