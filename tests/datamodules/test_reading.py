from __future__ import annotations

import gzip
import io
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_fields, toy_shards

from lightning_unlearn.data.shards import ShardInfo, write_shards
from lightning_unlearn.datamodules import remote
from lightning_unlearn.datamodules.reading import read_fields, read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.errors import InputError

KEYS = [f"sample-{number:05d}" for number in range(4)]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples, of three files each."""
    return toy_shards(tmp_path_factory.mktemp("shard"), 4) / "shard-000000.tar"


def keys(url: str | Path, samples: int | None = None) -> list[str]:
    return [sample.key for sample in read_samples(ShardInfo(str(url), samples))]


def refusal(url: str | Path, samples: int | None = None) -> str:
    with pytest.raises(InputError) as error:
        keys(url, samples)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert str(url) in message
    return message


def archive(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def files_of(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def ends_of_files(content: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset_data + 512 * -(-member.size // 512) for member in tar]


def test_samples_come_in_the_order_of_the_shard(shard: Path) -> None:
    assert keys(shard, 4) == KEYS


def test_pictures_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    write_shards([{**toy_fields(0), "png": b"picture", "cls": b"3"}], tmp_path)
    (info,) = list_shards(str(tmp_path))
    (plain,) = read_fields(info)
    assert set(plain) == {"__key__", "__url__", "latent.npy", "text.npy", "json"}
    (full,) = read_fields(info, pictures=True)
    assert set(full) - set(plain) == {"png"}
    (sample,) = read_samples(info, pictures=True)
    assert sample.picture == b"picture"


def test_compressed_shard_is_read(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "shard.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    assert keys(tmp_path / "shard.tar.gz", 4) == KEYS


def test_folders_and_links_in_a_shard_are_no_samples(shard: Path, tmp_path: Path) -> None:
    with tarfile.open(archive(tmp_path / "shard.tar", [(f"train/{n}", c) for n, c in files_of(shard)]), "a") as tar:
        for kind, name in ((tarfile.DIRTYPE, "other"), (tarfile.SYMTYPE, "link.json"), (tarfile.LNKTYPE, "hard.json")):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd"
            tar.addfile(info)
    assert keys(tmp_path / "shard.tar", 4) == [f"train/{key}" for key in KEYS]


def test_path_with_a_colon_is_a_path(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "run:3").mkdir()
    (tmp_path / "run:3" / "x.tar").write_bytes(shard.read_bytes())
    assert keys(tmp_path / "run:3" / "x.tar") == KEYS


def test_file_is_closed_when_reading_stops_early(shard: Path) -> None:
    reading = read_samples(ShardInfo(str(shard)))
    next(reading)
    assert open_files().count(str(shard)) == 1
    del reading
    assert open_files().count(str(shard)) == 0


def open_files() -> list[str]:
    return [str(path.resolve()) for path in Path("/proc/self/fd").iterdir()]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_shard_that_is_cut_off_anywhere_never_just_looks_shorter(shard: Path, tmp_path: Path, suffix: str) -> None:
    content = shard.read_bytes() if suffix == ".tar" else gzip.compress(shard.read_bytes())
    cuts, whole = set(range(0, len(content), 301)), len(content)
    if suffix == ".tar":
        ends = ends_of_files(content)
        assert len(ends) == 12
        cuts |= set(ends)
        # One block of zeros ends a tar file; what follows it is padding.
        whole = ends[-1] + 512
    path = tmp_path / f"cut{suffix}"
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        if cut < whole:
            refusal(path)
        else:
            assert keys(path) == KEYS


@settings(max_examples=150)
@given(place=st.integers(0, 20_000), flip=st.integers(1, 255))
def test_damaged_shard_never_just_looks_shorter(shard: Path, place: int, flip: int) -> None:
    content = bytearray(shard.read_bytes())
    content[place % len(content)] ^= flip
    path = shard.with_name("damaged.tar")
    path.write_bytes(content)
    message = ""
    try:
        count = sum(1 for _ in read_fields(ShardInfo(str(path))))
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert message or count == 4


def test_shard_that_is_no_tar_file_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"<html>Not found</html>" * 100)
    assert "no tar file" in refusal(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    assert "cut off" in refusal(tmp_path / "b.tar")
    (tmp_path / "c.tar").mkdir()
    assert "directory" in refusal(tmp_path / "c.tar")
    assert "No such file" in refusal(tmp_path / "d.tar")


def test_tar_file_without_samples_has_none(tmp_path: Path) -> None:
    assert keys(archive(tmp_path / "a.tar", []), 0) == []
    assert "holds 0 samples" in refusal(tmp_path / "a.tar", 3)


@pytest.mark.parametrize("said", [3, 5])
def test_count_must_be_the_manifests(shard: Path, said: int) -> None:
    assert f"holds 4 samples, but its manifest says {said}" in refusal(shard, said)


def test_shard_without_a_files_samples_names_what_is_missing(shard: Path, tmp_path: Path) -> None:
    files = [(name, content) for name, content in files_of(shard) if name != f"{KEYS[2]}.text.npy"]
    path = archive(tmp_path / "x.tar", files)
    with pytest.raises(InputError, match=rf"{KEYS[2]}.* lacks text.npy"):
        keys(path)


def test_file_name_that_stands_twice_is_an_error(shard: Path, tmp_path: Path) -> None:
    files = files_of(shard)
    message = refusal(archive(tmp_path / "x.tar", [*files[:4], files[3], *files[4:]]))
    assert f"{files[3][0]}: duplicate file name" in message


def test_what_was_read_before_the_damage_is_given(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(shard.read_bytes()[:-14_000])
    reading = read_samples(ShardInfo(str(tmp_path / "x.tar")))
    assert next(reading).key == KEYS[0]
    with pytest.raises(InputError, match="past its sample 1 "):
        next(reading)


def test_command_is_read(shard: Path) -> None:
    assert keys(f"pipe:cat {shard}", 4) == KEYS


@pytest.mark.parametrize("command", ["cat {}; exit 3", "head -c 9000 {}", "false", "cat {} | head -c 6144; exit 1"])
def test_command_that_fails_is_an_error(shard: Path, command: str) -> None:
    refusal("pipe:" + command.format(shard))


@pytest.mark.filterwarnings("error")
def test_command_may_still_be_writing_when_reading_stops(shard: Path) -> None:
    reading = read_samples(ShardInfo(f"pipe:exec cat {shard} /dev/zero"))
    assert next(reading).key == KEYS[0]
    reading.close()


@dataclass
class Server:
    """An http server that goes wrong in the ways that are asked for."""

    content: bytes
    address: str = ""
    ranges: bool = True
    failures: list[int] = field(default_factory=list)  # statuses of the next answers
    breaks: list[int] = field(default_factory=list)  # how many bytes of the next answers arrive
    requests: list[str | None] = field(default_factory=list)  # their ranges

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append(handler.headers["Range"])
        if self.failures:
            handler.send_error(self.failures.pop(0))
            return
        if handler.path == "/moved.tar":
            handler.send_response(302)
            handler.send_header("Location", self.address)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = 0
        if self.ranges and handler.headers["Range"]:
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        else:
            handler.send_response(200)
        handler.send_header("Content-Length", str(len(self.content) - start))
        handler.end_headers()
        arriving = self.breaks.pop(0) if self.breaks else len(self.content)
        handler.wfile.write(self.content[start:][:arriving])
        handler.wfile.flush()
        handler.close_connection = True


@pytest.fixture
def server(shard: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(shard.read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0, 0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        server.address = f"http://127.0.0.1:{http_server.server_port}/shard-000000.tar"
        yield server
        http_server.shutdown()
        thread.join()


def test_shard_is_read_over_http(server: Server) -> None:
    assert keys(server.address, 4) == KEYS
    assert server.requests == [None]
    (info,) = list_shards(server.address.replace("000000", "{000000..000000}"))
    assert [sample.key for sample in read_samples(info)] == KEYS


def test_redirection_is_followed(server: Server) -> None:
    assert keys(server.address.replace("shard-000000", "moved"), 4) == KEYS


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


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("arriving", [0, 1, 512, 5000, 10_240, 20_000])
def test_broken_connection_is_taken_up_where_it_broke(server: Server, arriving: int, ranges: bool) -> None:
    server.ranges = ranges
    server.breaks = [arriving, arriving // 2]
    assert keys(server.address, 4) == KEYS
    assert server.requests[:2] == [None, f"bytes={arriving}-" if arriving else None]


def test_connection_that_always_breaks_never_just_gives_a_shorter_shard(server: Server) -> None:
    end = ends_of_files(server.content)[5]
    server.breaks = [end] + [0] * 100
    assert f"{len(server.content) - end} bytes before the end" in refusal(server.address)
    assert len(server.requests) == 5


def test_truncated_file_on_a_server_is_an_error(server: Server) -> None:
    end = ends_of_files(server.content)[5]
    server.content = server.content[:end]
    assert "cut off" in refusal(server.address)
    assert server.requests == [None]


def test_file_that_changes_while_it_is_read_is_an_error(server: Server) -> None:
    server.breaks = [5000]
    reading = read_samples(ShardInfo(server.address))
    whole = server.content
    next(reading)
    server.content = whole + bytes(512)
    with pytest.raises(InputError, match=f"{len(whole)} bytes long, and {len(whole) + 512}"):
        list(reading)


def test_connection_is_closed_when_reading_stops_early(server: Server) -> None:
    reading = read_samples(ShardInfo(server.address))
    next(reading)
    before = len([name for name in open_files() if "socket:" in name])
    reading.close()
    assert len([name for name in open_files() if "socket:" in name]) < before


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_refused_connection_is_tried_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "refused" in refusal(f"http://127.0.0.1:{free_port()}/x.tar")
    assert waits == list(remote.WAITS)


def test_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.01,))
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        start = time.monotonic()
        assert "timed out" in refusal(f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar")
        assert time.monotonic() - start < 10


def test_nobody_waits_for_minutes() -> None:
    assert sum(remote.WAITS) <= 20
    assert sum(remote.WAITS) + remote.TIMEOUT * (len(remote.WAITS) + 1) <= 120


@pytest.mark.parametrize("url", ["http://", "http://[", "http://127.0.0.1:port/x.tar", "http://127.0.0.1/a b.tar"])
def test_address_that_is_none_is_an_error(url: str) -> None:
    refusal(url)


def test_no_process_is_started_for_an_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert keys(server.address) == KEYS
