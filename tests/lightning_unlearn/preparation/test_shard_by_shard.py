"""Tars of pictures to shards, one to one, by several processes, and resumed."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prepare_toys import manifest, read

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.assembly import Assembly
from lightning_unlearn.preparation.prepare import prepare


def write_tar(path: Path, number: int, samples: int = 2, captions: bool = True) -> None:
    with tarfile.open(path, "w") as tar:
        for sample in range(samples):
            stream = io.BytesIO()
            Image.new("RGB", (4, 4), (number, sample, 0)).save(stream, "png")
            contents = {"png": stream.getvalue()}
            if captions:
                contents["json"] = json.dumps({"caption": f"{number} {sample}", "url": "somewhere"}).encode()
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{number:05d}{sample:04d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def settings(tmp_path: Path, text_encoder: Path) -> dict[str, Any]:
    (tmp_path / "laion").mkdir()
    for number in range(5):
        write_tar(tmp_path / "laion" / f"{number:05d}.tar", number)
    return {
        "output": str(tmp_path / "out"),
        "images": str(tmp_path / "laion" / "{00000..00004}.tar"),
        "size": 4,
        "text_encoder": str(text_encoder),
    }


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are encoded from now on."""
    names: list[str] = []
    encode = Assembly.encode

    def counted(self: Assembly, *arguments: Any) -> Any:
        names.append(Path(self.source).stem)
        return encode(self, *arguments)

    monkeypatch.setattr(Assembly, "encode", counted)
    return names


def test_several_processes_make_what_one_makes(settings: dict[str, Any], tmp_path: Path) -> None:
    one = prepare(**settings)
    assert [Path(shard.url).name for shard in one] == [f"{number:05d}.tar" for number in range(5)]
    several = settings | {"output": str(tmp_path / "several"), "count": 2}
    assert len(prepare(**several, index=1)) == 2
    assert not (tmp_path / "several" / "manifest.json").exists()
    assert len(prepare(**several, index=0)) == 5
    for name in (*(f"{number:05d}.tar" for number in range(5)), "manifest.json"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    samples = read(tmp_path / "several")
    assert len(samples) == 10
    assert samples["000030001"].captions == ["3 1"]
    assert samples["000030001"].metadata["url"] == "somewhere"


def test_a_second_run_makes_only_what_is_missing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "laion" / "00002.tar").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"00002\.tar can't be read"):
        prepare(**settings)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]
    write_tar(tmp_path / "laion" / "00002.tar", 2)
    names = encoded(monkeypatch)
    prepare(**settings)
    assert names == ["00002", "00003", "00004"]
    assert len(read(tmp_path / "out")) == 10
    with pytest.raises(InputError, match="done already: it holds 10 samples in 5 shards"):
        prepare(**settings)


def test_a_shard_that_is_gone_or_whose_tar_changed_is_made_again(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(**settings)
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "00001.tar").unlink()
    (tmp_path / "out" / ".done" / "00002.json").write_text("{cut")
    os.utime(tmp_path / "laion" / "00003.tar", (1, 1))
    names = encoded(monkeypatch)
    prepare(**settings)
    assert names == ["00001", "00002", "00003"]


def test_other_settings_are_not_mixed_in(settings: dict[str, Any], tmp_path: Path) -> None:
    prepare(**settings)
    (tmp_path / "out" / "manifest.json").unlink()
    for changes in ({"size": 8}, {"flips": True}, {"alpha": "drop"}, {"caption": "x"}, {"tokens": 9}):
        with pytest.raises(InputError, match=r"00000\.tar that was made with other settings"):
            prepare(**settings | changes)
    prepare(**settings, batch_size=3)  # changes nothing in the shards
    prepare(**settings | {"size": 8}, overwrite=True)
    assert read(tmp_path / "out")["000000000"].latent.shape == (3, 8, 8)


def test_what_was_left_out_of_any_is_added_up(settings: dict[str, Any], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "laion" / "00001.tar", "a") as tar:
        for name in ("x.heic", "y.md"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with tarfile.open(tmp_path / "laion" / "00003.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("z.md"), io.BytesIO())
    with pytest.warns(UserWarning, match=r"1 of 3 samples were left out.*x is a picture of a kind"):
        prepare(**settings, on_bad_sample="skip")
    about = manifest(tmp_path / "out")
    assert about["skipped"] == len(about["left_out"]["faults"]) == 1
    assert [(entry["what"], entry["count"]) for entry in about["left_out"]["counts"]] == [
        ("samples of tars have no picture", 2)
    ]
    assert str(tmp_path) not in json.dumps(about)


def test_settings_that_do_not_go_with_tars_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    for match, changes in (
        ("`index` must be below `count`", {"index": 1}),
        ("deal out tars", {"images": str(tmp_path / "laion"), "count": 2}),
        ("don't go with tars", {"latents": "l.npy", "size": None}),
        ("`count` must be at least 1", {"count": 0}),
        ("several tars called 00001", {"images": str(tmp_path / "{laion,laion}" / "00001.tar")}),
    ):
        with pytest.raises(InputError, match=match):
            prepare(**settings | changes)


def test_braces_in_a_files_own_name_are_no_pattern(settings: dict[str, Any], tmp_path: Path) -> None:
    write_tar(tmp_path / "laion" / "{0..1}.tar", 9)
    (shard,) = prepare(**settings | {"images": str(tmp_path / "laion" / "{0..1}.tar")})
    assert shard.samples == 2
