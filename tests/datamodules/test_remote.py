from __future__ import annotations

import importlib.util
import io
import os
import socket
import subprocess
import tarfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from http_manners import Server, serving
from toys import toy_fields, toy_shards

from lightning_unlearn.data.shards import ShardInfo, write_shards
from lightning_unlearn.datamodules import http_reply, remote, source
from lightning_unlearn.datamodules.reading import read_fields, read_samples
from lightning_unlearn.datamodules.sources import list_shards, with_facts
from lightning_unlearn.errors import InputError

KEYS = [f"sample-{number:05d}" for number in range(4)]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples, of three files each."""
    return toy_shards(tmp_path_factory.mktemp("shard"), 4) / "shard-000000.tar"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Two shards of one size, larger than what waits on its way."""
    folder = tmp_path_factory.mktemp("large")
    shards = [
        write_shards([toy_fields(1000 * part + each) for each in range(600)], folder / str(part)) for part in (1, 2)
    ]
    one, two = (Path(info.url).read_bytes() for (info,) in shards)
    assert len(one) == len(two) > 2 * 10**6
    return one, two


@pytest.fixture
def other(tmp_path: Path) -> bytes:
    """A shard of the same size, with other samples."""
    (info,) = write_shards([toy_fields(number) for number in range(4, 8)], tmp_path / "other")
    return Path(info.url).read_bytes()


@pytest.fixture
def server(shard: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(shard.read_bytes()) as server:
        yield server


def keys(url: str, samples: int | None = None) -> list[str]:
    return [sample.key for sample in read_samples(ShardInfo(url, samples))]


def refusal(url: str, samples: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        keys(url, samples)
    message = str(error.value)
    assert message.isprintable()
    assert message.endswith(".")
    return message


def test_shard_is_read_over_http(server: Server) -> None:
    assert keys(server.address, 4) == KEYS
    assert server.requests == [None]
    (info,) = list_shards(server.address.replace("000000", "{000000..000000}"))
    assert [sample.key for sample in read_samples(info)] == KEYS


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("etag", [True, False, 'W/"weak"'])
def test_a_server_may_say_little_of_its_file(server: Server, length: bool, etag: bool | str) -> None:
    server.length, server.etag = length, etag
    assert keys(server.address, 4) == KEYS


def test_redirection_is_followed(server: Server) -> None:
    assert keys(server.address.replace("shard-000000", "moved"), 4) == KEYS


def test_redirection_to_a_file_of_this_machine_is_refused(server: Server, shard: Path) -> None:
    server.redirect = f"file://{shard}"
    refusal(server.address.replace("shard-000000", "moved"))


def test_redirection_without_end_is_given_up(server: Server) -> None:
    server.redirect = server.address.replace("shard-000000", "moved")
    refusal(server.redirect)
    assert len(server.requests) < 100


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_answer_that_will_not_change_is_not_asked_for_again(server: Server, status: int) -> None:
    server.failures = [status]
    assert f"HTTP Error {status}" in refusal(server.address)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.failures = [status, 503]
    assert keys(server.address, 4) == KEYS
    assert len(server.requests) == 3


def test_server_that_stays_busy_is_given_up(server: Server) -> None:
    server.failures = [503] * 100
    assert "HTTP Error 503" in refusal(server.address)
    assert len(server.requests) == 5


def test_what_a_server_says_is_printed_without_what_a_terminal_obeys(server: Server) -> None:
    server.failures, server.reason = [404], "gone\x1b[2J\x9b"
    refusal(server.address)  # it is printable


# ---------------------------------------------------------------------------------- connections that break


@pytest.mark.parametrize("etag", [True, False, 'W/"weak"'])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("arriving", [0, 1, 512, 5000, 10_240, 20_000])
def test_broken_connection_is_taken_up_where_it_broke(
    server: Server, arriving: int, ranges: bool, etag: bool | str
) -> None:
    server.ranges, server.etag = ranges, etag
    server.breaks = [arriving, arriving // 2]
    assert keys(server.address, 4) == KEYS
    # All that was sent may have arrived; then the second answer may be too short to break.
    second = server.requests[1]
    start = 0 if second is None or not ranges else int(second.removeprefix("bytes=").removesuffix("-"))
    assert len(server.requests) == (3 if len(server.content) - start > arriving // 2 else 2)
    # Without a strong ETag nothing tells that the file is still the same: what was read is read again.
    assert etag is True or server.requests == [None] * 3


def test_what_has_arrived_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    content = os.urandom(3 * 2**20)
    with serving(content) as server:
        server.breaks = [2**21]
        file = remote.RemoteFile(server.address)
        found = b"".join(iter(lambda: file.read(2**18), b""))
    assert found == content
    first, second = server.requests
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").removesuffix("-")) > 2**20


def test_connection_that_always_breaks_never_just_gives_a_shorter_shard(server: Server) -> None:
    server.breaks = [7168] + [0] * 100
    assert "broke" in refusal(server.address)
    assert len(server.requests) == 5


def test_truncated_file_on_a_server_is_an_error(server: Server) -> None:
    server.content = server.content[:7168]
    assert "cut off" in refusal(server.address)
    assert server.requests == [None]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etag", [True, False])
def test_file_that_changes_where_a_connection_broke_is_no_mixture(
    server: Server, large: tuple[bytes, bytes], etag: bool, ranges: bool
) -> None:
    server.content, later = large
    server.etag, server.ranges = etag, ranges
    server.breaks, server.later = [1_500_000], [later]
    found: list[str] = []
    with pytest.raises(InputError, match="changed while it was read"):
        found.extend(sample.key for sample in read_samples(ShardInfo(server.address)))
    assert all(key.startswith("sample-01") for key in found)


@pytest.mark.parametrize("what", ["length", "time"])
def test_other_facts_are_another_file(server: Server, large: tuple[bytes, bytes], what: str) -> None:
    server.content, _ = large
    server.breaks, server.etag, server.modified = [1_500_000], '"same"', "Sat, 28 Nov 2026 07:00:00 GMT"
    file = remote.RemoteFile(server.address)
    file.read(100)
    if what == "length":
        server.content += bytes(512)
    else:
        server.modified = "Sat, 28 Nov 2026 08:00:00 GMT"
    with pytest.raises(OSError, match="changed while it was read"):
        deque(iter(lambda: file.read(2**16), b""), maxlen=0)


@pytest.mark.parametrize("unnamed", [True, False])
def test_another_part_than_was_asked_for_is_an_error(server: Server, large: tuple[bytes, bytes], unnamed: bool) -> None:
    server.content, _ = large
    server.breaks, server.wrong_part, server.unnamed_part = [1_500_000], 0 if unnamed else 512, unnamed
    assert "another part" in refusal(server.address)


def test_shard_that_was_made_anew_has_another_version(server: Server, other: bytes) -> None:
    for etag, modified in ((True, None), (False, "Sat, 28 Nov 2026 07:00:00 GMT")):
        server.etag, server.modified = etag, modified
        (before,) = with_facts([ShardInfo(server.address)])
        assert before.bytes == len(server.content)
        assert with_facts([ShardInfo(server.address)]) == [before]
        assert [sample.key for sample in read_samples(before)] == KEYS
        whole, server.content = server.content, other
        server.modified = None if modified is None else "Sat, 28 Nov 2026 08:00:00 GMT"
        (after,) = with_facts([ShardInfo(server.address)])
        assert before.version != after.version
        with pytest.raises(InputError, match="changed since this run began"):
            list(read_samples(before))
        server.content = whole


def test_server_that_cannot_be_reached_is_told_of_where_it_is_read(server: Server) -> None:
    server.failures = [404]
    assert with_facts([ShardInfo(server.address)]) == [ShardInfo(server.address)]


# ---------------------------------------------------------------------------------- servers without end


@pytest.mark.parametrize("where", ["headers", "body"])
def test_silent_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setattr(http_reply, "TIMEOUT", 0.3)
    server.hang, server.breaks = where, [5000] + [0] * 9
    assert "timed out" in refusal(server.address)
    assert len(server.requests) == 2


def test_bytes_that_come_drop_by_drop_are_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    server.drip = True
    assert "too slow" in refusal(server.address)


@pytest.mark.parametrize("tail", ["zeros", "noise", "samples"])
def test_reply_without_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch, tail: str) -> None:
    monkeypatch.setattr(source, "LONGEST_UNSAID", 2**22)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("other"), io.BytesIO())
    server.endless = {"zeros": bytes(2**16), "noise": b"x" * 2**16, "samples": stream.getvalue()}[tail]
    refusal(server.address)


def test_nobody_waits_for_minutes() -> None:
    assert sum(remote.WAITS) <= 20
    assert sum(remote.WAITS) + http_reply.TIMEOUT * (len(remote.WAITS) + 1) <= 120


def open_sockets() -> int:
    links = Path("/proc/self/fd")
    return sum("socket:" in os.readlink(link) for link in links.iterdir() if link.is_symlink())


def test_connection_is_closed_when_reading_stops_early(server: Server) -> None:
    server.endless = b"x" * 2**16
    before = open_sockets()
    file = remote.RemoteFile(server.address)
    assert file.read(10)
    assert open_sockets() > before
    file.close()
    deadline = time.monotonic() + 10
    while open_sockets() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # the server's side
    assert open_sockets() <= before


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_refused_connection_is_tried_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "refused" in refusal(f"http://127.0.0.1:{free_port()}/x.tar")
    assert waits == list(remote.WAITS)


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:port/x.tar", "http://127.0.0.1:1/a b.tar"])
def test_address_that_is_none_is_an_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    assert url in refusal(url)


def test_no_process_is_started_for_an_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert keys(server.address) == KEYS


# ---------------------------------------------------------------------------------- secrets


def test_user_and_password_are_used_and_never_printed(server: Server) -> None:
    secret = server.address.replace("http://", "http://somebody:secret1@") + "?sig=secret2"
    assert keys(secret, 4) == KEYS
    assert server.authorizations[-1] is not None
    content = server.content
    for failures in ([404], [503] * 9, []):
        server.failures = list(failures)
        server.content = server.content[:5000]
        message = refusal(secret)
        assert "secret" not in message
        assert "somebody" not in message
        assert "shard-000000.tar?sig=" in message
    server.content = content
    assert all("secret" not in fields["__url__"] for fields in read_fields(ShardInfo(secret)))


# ---------------------------------------------------------------------------------- other storages


@pytest.fixture
def stored(shard: Path) -> Iterator[str]:
    storage = fsspec.filesystem("memory")
    storage.pipe("/bucket/x.tar", shard.read_bytes())
    yield "memory://bucket/x.tar"
    storage.rm("/bucket", recursive=True)


def test_any_storage_that_fsspec_knows_is_read(stored: str) -> None:
    (info,) = with_facts(list_shards(stored))
    assert [sample.key for sample in read_samples(info)] == KEYS
    assert info.bytes is not None
    assert "folder" in refusal("memory://bucket")
    refusal("memory://bucket/nothing.tar")


def test_stored_file_that_changes_while_it_is_read_is_an_error(stored: str, other: bytes) -> None:
    reading = read_samples(ShardInfo(stored))
    assert next(reading).key == KEYS[0]
    fsspec.filesystem("memory").pipe("/bucket/x.tar", other)
    with pytest.raises(InputError, match="changed while it was read"):
        list(reading)


def test_stored_file_that_was_made_anew_has_another_version(stored: str, other: bytes) -> None:
    (before,) = with_facts([ShardInfo(stored)])
    fsspec.filesystem("memory").pipe("/bucket/x.tar", other)
    (after,) = with_facts([ShardInfo(stored)])
    assert before.version != after.version
    with pytest.raises(InputError, match="changed since this run began"):
        list(read_samples(before))


@pytest.mark.skipif(
    importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None,
    reason="moto[server] or s3fs is not installed",
)
def test_shards_are_read_from_s3(shard: Path, other: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    s3 = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    try:
        _, port = s3.get_host_and_port()
        options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "nobody", "secret": "nothing"}
        # As users give them: fsspec reads FSSPEC_S3_ENDPOINT_URL and the like when it is imported.
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        storage = fsspec.filesystem("s3")
        storage.mkdir("bucket")
        storage.pipe("bucket/x-0.tar", shard.read_bytes())
        (info,) = with_facts(list_shards("s3://bucket/x-{0..0}.tar"))
        assert [sample.key for sample in read_samples(info)] == KEYS
        storage.pipe("bucket/x-0.tar", other)
        with pytest.raises(InputError, match="changed since this run began"):
            list(read_samples(info))
        monkeypatch.setattr(remote, "WAITS", ())
        refusal("s3://bucket/nothing.tar")
    finally:
        s3.stop()
