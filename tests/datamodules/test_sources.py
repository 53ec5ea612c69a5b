from __future__ import annotations

import json
from pathlib import Path

import pytest
from toys import toy_fields, toy_shards

from lightning_unlearn.data.shards import MANIFEST, ShardInfo, write_shards
from lightning_unlearn.datamodules.sources import list_shards, read_manifest
from lightning_unlearn.errors import InputError


def names(shards: list[ShardInfo]) -> list[str]:
    return [Path(shard.url).name for shard in shards]


def assert_one_sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Shards of 1, 8, 4 and 8 samples."""
    for number, count in enumerate([1, 8, 4, 8]):
        write_shards(
            [toy_fields(10 * number + each) for each in range(count)], tmp_path / "parts", name=f"part{number}"
        )
    manifests = [
        {"name": path.name, "samples": samples, "bytes": path.stat().st_size}
        for path, samples in zip(sorted((tmp_path / "parts").glob("*.tar")), [1, 8, 4, 8], strict=True)
    ]
    (tmp_path / "parts" / MANIFEST).write_text(json.dumps({"shards": manifests}))
    return tmp_path / "parts"


def test_largest_shards_come_first_then_by_address(uneven: Path) -> None:
    shards = list_shards(str(uneven))
    assert names(shards) == ["part1-000000.tar", "part3-000000.tar", "part2-000000.tar", "part0-000000.tar"]
    assert [shard.samples for shard in shards] == [8, 8, 4, 1]
    assert [shard.bytes for shard in shards] == [Path(shard.url).stat().st_size for shard in shards]


def test_every_call_gives_the_same_list_however_shards_are_named(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list_shards(str(uneven))
    assert list_shards(str(uneven)) == expected
    assert list_shards([str(uneven), str(uneven)]) == expected
    assert list_shards([str(uneven / f"part{number}-000000.tar") for number in (3, 0, 2, 1)]) == expected
    assert list_shards(str(uneven / "part{3..0}-000000.tar")) == expected
    assert list_shards(str(uneven) + "/{part2,part0,part3,part1}-000000.tar") == expected
    monkeypatch.chdir(uneven.parent)
    assert [Path(shard.url).resolve() for shard in list_shards("parts")] == [Path(shard.url) for shard in expected]


def test_a_shard_that_is_named_twice_is_listed_once(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(uneven)
    link = uneven.parent / "link"
    link.symlink_to(uneven)
    assert len(list_shards([str(uneven), ".", "part0-000000.tar", "../parts/part0-000000.tar", str(link)])) == 4


def test_home_folder_is_expanded(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(uneven.parent))
    assert list_shards("~/parts") == list_shards(str(uneven))


def test_folder_without_manifest_means_its_tar_files(uneven: Path) -> None:
    expected = names(list_shards(str(uneven)))
    (uneven / MANIFEST).unlink()
    (uneven / "notes.txt").write_text("no shard")
    shards = list_shards(str(uneven))
    assert names(shards) == expected
    assert [shard.samples for shard in shards] == [None] * 4
    assert [shard.bytes for shard in shards] == [Path(shard.url).stat().st_size for shard in shards]


def test_folder_with_manifest_means_the_shards_in_it(uneven: Path) -> None:
    (uneven / "stray.tar").write_bytes(b"left over")
    assert len(list_shards(str(uneven))) == 4


def test_manifest_describes_shards_that_are_named_alone(uneven: Path) -> None:
    (shard,) = list_shards(str(uneven / "part2-000000.tar"))
    assert shard.samples == 4


def test_manifest_that_names_missing_shards_is_an_error(uneven: Path) -> None:
    (uneven / "part1-000000.tar").unlink()
    (uneven / "part3-000000.tar").unlink()
    with pytest.raises(InputError) as error:
        list_shards(str(uneven))
    assert_one_sentence(error, str(uneven), "2 shards that are not there", "part1-000000.tar")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '"text"',
        "{}",
        '{"shards": 3}',
        '{"shards": [1]}',
        '{"shards": {"a": 1}}',
        '{"shards": [{}]}',
        '{"shards": [{"name": 3}]}',
        '{"shards": [{"name": "a.tar", "samples": "many"}]}',
        '{"shards": [{"name": "a.tar", "bytes": "many"}]}',
        "[" * 100_000,
    ],
)
def test_manifest_that_is_none_is_an_error(uneven: Path, content: str) -> None:
    (uneven / MANIFEST).write_text(content)
    with pytest.raises(InputError) as error:
        list_shards(str(uneven))
    assert_one_sentence(error, str(uneven / MANIFEST), "not a manifest of shards")


def test_manifest_keeps_what_else_it_says(tmp_path: Path) -> None:
    write_shards([toy_fields(0)], tmp_path, about={"vae": "mean"})
    assert read_manifest(tmp_path)["vae"] == "mean"
    assert read_manifest(tmp_path / "elsewhere") == {}


def test_brace_patterns_are_expanded_in_addresses() -> None:
    shards = list_shards(["https://example.org/{a,b}-{000008..000010}.tar?v=1", "http://example.org/c.tar"])
    assert [shard.url for shard in shards] == [
        "http://example.org/c.tar",
        *[f"https://example.org/{name}-{number:06d}.tar?v=1" for name in "ab" for number in (8, 9, 10)],
    ]
    assert {(shard.samples, shard.bytes) for shard in shards} == {(None, None)}


def test_broken_brace_pattern_is_an_error() -> None:
    with pytest.raises(InputError) as error:
        list_shards("data-{000..003.tar")
    assert_one_sentence(error, "data-{000..003.tar", "brace pattern")


@pytest.mark.parametrize("name", ["missing.tar", "missing", "shard-{000000..000002}.tar"])
def test_missing_shard_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    toy_shards(tmp_path, 8, 4)
    with pytest.raises(InputError) as error:
        list_shards(str(tmp_path / name))
    assert_one_sentence(error, "There is no shard at", str(tmp_path / name).replace("{000000..000002}", "000002"))


@pytest.mark.parametrize("named", [[], "empty"])
def test_no_shard_at_all_is_an_error(tmp_path: Path, named: str | list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        list_shards(named)
    assert_one_sentence(error, "No shard found")


@pytest.mark.parametrize("inside", ["a.png", "10_sks dog/b.JPG"])
def test_a_folder_of_pictures_is_told_what_makes_shards_of_it(tmp_path: Path, inside: str) -> None:
    picture = tmp_path / "pictures" / inside
    picture.parent.mkdir(parents=True)
    picture.touch()
    with pytest.raises(InputError) as error:
        list_shards(str(tmp_path / "pictures"))
    assert_one_sentence(error, picture.name, f"prepare --images {tmp_path / 'pictures'}")


def test_a_folder_without_shards_is_not_passed_over_beside_another_one(tmp_path: Path) -> None:
    toy_shards(tmp_path / "shards", 8, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        list_shards([str(tmp_path / "shards"), str(tmp_path / "empty")])
    assert_one_sentence(error, "No shard found", str(tmp_path / "empty"))


@pytest.mark.parametrize("command", ["pipe:cat x.tar", "{pipe:cat x.tar,y}", "\\pipe:cat x.tar"])
def test_command_is_refused_unless_asked_for(command: str) -> None:
    with pytest.raises(InputError) as error:
        list_shards(["https://example.org/x.tar", command])
    assert_one_sentence(error, "'pipe:cat x.tar'", "allow_pipe")


def test_command_that_is_asked_for_is_taken_as_it_is() -> None:
    (shard,) = list_shards("pipe:cat {a,b}.tar", allow_pipe=True)
    assert shard.url == "pipe:cat {a,b}.tar"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nothing://bucket/x.tar", "fsspec knows"),
        ("file:///x.tar", "give its path"),
        ("FILE:///x.tar", "give its path"),
        ("local:///x.tar", "give its path"),
        ("PIPE:curl http://x.tar", "http(s)"),
        ("simplecache::http://x.tar", "http(s)"),
    ],
)
def test_addresses_of_other_kinds_are_refused(url: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        list_shards(url, allow_pipe=True)
    assert_one_sentence(error, url, says)


@pytest.mark.parametrize(("kind", "extra"), [("s3", "s3"), ("gs", "gs"), ("hf", "hf")])
def test_package_that_is_missing_for_an_address_is_named(
    kind: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(kind: str) -> None:
        raise ImportError("Please install it")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(InputError) as error:
        list_shards(f"{kind}://me:secret@bucket/x.tar")
    assert_one_sentence(error, f"{kind}://bucket/x.tar", f"lightning-unlearn[{extra}]")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("url", [" pipe:touch made", "PIPE:touch made", "Pipe:touch made", "-", "file:made"])
def test_nothing_else_runs_a_command_or_reads_an_input(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        list_shards(url)
    assert_one_sentence(error, "There is no shard at")
    assert not (tmp_path / "made").exists()
