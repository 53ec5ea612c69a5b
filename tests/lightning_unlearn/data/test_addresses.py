from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import toy_shards

from lightning_unlearn.data.addresses import is_address, is_command, lasting_address, name_of, shown_address
from lightning_unlearn.data.shards import ShardInfo, shard_id
from lightning_unlearn.errors import InputError, printable
from lightning_unlearn.scores.run_record import record_run
from lightning_unlearn.unlearning.provenance import unlearning_digest

SECRET = "https://somebody:secret1@example.org/x.tar?version=2&X-Amz-Signature=secret2&X-Amz-Date=secret3"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SECRET, "https://example.org/x.tar?version=…&X-Amz-Signature=…&X-Amz-Date=…"),
        ("s3://key:secret@bucket/x.tar", "s3://bucket/x.tar"),
        ("https://somebody:p@ss@example.org/x.tar", "https://example.org/x.tar"),
        ("https://example.org/a@b.tar", "https://example.org/a@b.tar"),
        ("http://[broken@x", "http://x"),
        ("/data/a?b=c.tar", "/data/a?b=c.tar"),
        ("pipe:cat a.tar", "pipe:cat a.tar"),
    ],
)
def test_what_is_shown_of_an_address_has_no_secret(url: str, shown: str) -> None:
    assert shown_address(url) == shown


def test_identity_of_a_shard_outlives_its_signature_and_has_no_secret() -> None:
    again = SECRET.replace("secret", "other")
    assert shard_id(SECRET) == shard_id(again) == shard_id("https://example.org/x.tar?version=2")
    assert shard_id(SECRET) != shard_id(again.replace("version=2", "version=3"))
    assert shard_id("https://example.org/x?token=abc").startswith("x-")
    assert name_of("https://example.org/a/x.tar?token=a/b") == "x.tar"
    assert lasting_address(SECRET) == "https://example.org/x.tar?version=2"


def test_an_absolute_path_is_never_an_address_or_a_command() -> None:
    for name in ("/pipe:cat x", "/a/http://x", "/s3://x"):
        assert not is_address(name)
        assert not is_command(name)


def test_secrets_are_not_recorded(tmp_path: Path) -> None:
    data = SimpleNamespace(shards=[ShardInfo(SECRET)], query_patterns=[SECRET, str(tmp_path / "a.tar")])
    record_run(tmp_path / "out", {}, data, {})
    recorded = (tmp_path / "out" / "run.json").read_text()
    assert not any(f"secret{number}" in recorded for number in (1, 2, 3))
    assert json.loads(recorded)["query_shards"][1] == str(tmp_path / "a.tar")


def test_messages_hold_nothing_that_a_terminal_obeys() -> None:
    assert str(InputError("a\x1b[2J\nb\udcff\u202e.")) == "a\\x1b[2J\\nb\\udcff\\u202e."
    assert printable("ä 💡 …") == "ä 💡 …"


def test_deltas_depend_on_the_content_of_shards_without_a_manifest(tmp_path: Path) -> None:
    path = toy_shards(tmp_path, 4) / "shard-000000.tar"

    def digest(real: bool) -> str:
        data = SimpleNamespace(queries=[], draws=1, shards=[ShardInfo(str(path), bytes=path.stat().st_size)])
        return unlearning_digest({}, data, real)

    before = {real: digest(real) for real in (True, False)}
    assert digest(True) == before[True]
    stat = path.stat()
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert digest(True) != before[True]
    assert digest(False) == before[False]
