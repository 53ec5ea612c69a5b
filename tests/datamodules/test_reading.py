from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import toy_fields, toy_shards

from lightning_unlearn.data.shards import ShardInfo, write_shards
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


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_folders_in_a_shard_are_no_samples_and_links_are_refused(shard: Path, tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(archive(tmp_path / "shard.tar", [(f"train/{n}", c) for n, c in files_of(shard)]), "a") as tar:
        info = tarfile.TarInfo("other.json")
        info.type = kind
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    if kind == tarfile.DIRTYPE:
        assert keys(tmp_path / "shard.tar", 4) == [f"train/{key}" for key in KEYS]
    else:
        assert "'other.json'" in refusal(tmp_path / "shard.tar")


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
