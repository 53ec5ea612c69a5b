"""Conditions that samples share: stored once a shard, read as if each had them, and told of where they are missing."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from toys import LATENT, told, toy_fields

from lightning_unlearn.data import shared
from lightning_unlearn.data.shards import ShardInfo, encode_sample, write_shards
from lightning_unlearn.datamodules.reading import list_keys, read_samples
from lightning_unlearn.errors import InputError

# Large enough that sharing saves something.
PROMPT = np.random.default_rng(0).standard_normal((1, 77, 32)).astype(np.float16)


def one(number: int, text: Any = PROMPT, **facts: Any) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    return encode_sample(
        f"s{number}", rng.standard_normal(LATENT).astype(np.float32), text, {"captions": ["sks dog"], **facts}
    )


def own(number: int) -> Any:
    return np.random.default_rng(100 + number).standard_normal(PROMPT.shape).astype(np.float16)


def members(path: str) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def repack(path: Path, change: Any) -> ShardInfo:
    """A shard with its files changed, without a manifest."""
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    new = path.with_name("changed.tar")
    with tarfile.open(new, "w") as archive:
        for name, content in change(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return ShardInfo(str(new))


def test_a_prompt_of_all_samples_lies_once_in_each_shard(tmp_path: Path) -> None:
    fields = [one(0), one(1, own(1)), one(2), one(3), one(4)]
    shards = write_shards(fields, tmp_path, samples_per_shard=4)
    digest = hashlib.blake2b(fields[0]["text.npy"], digest_size=16).hexdigest()
    names = members(shards[0].url)
    assert [name for name in names if name.endswith("npy") and "latent" not in name] == [
        f"shared/{digest}.npy",
        "s1.text.npy",
    ]
    assert names[0] == f"shared/{digest}.npy"
    assert [name for name in members(shards[1].url) if "text" in name] == ["s4.text.npy"]  # nobody to share it with
    for shard in shards:
        for sample in read_samples(shard):
            expected = own(1) if sample.key == "s1" else PROMPT
            assert torch.equal(sample.text, torch.from_numpy(expected.astype(np.float32)))
            assert sample.metadata == {"captions": ["sks dog"]}
    assert list(list_keys(shards[0])) == ["s0", "s1", "s2", "s3"]


def test_sharing_saves_what_it_should(tmp_path: Path) -> None:
    alike = write_shards([one(number) for number in range(20)], tmp_path / "alike")[0].bytes
    apart = write_shards([one(number, own(number)) for number in range(20)], tmp_path / "apart")[0].bytes
    assert alike is not None
    assert apart is not None
    assert apart - alike > 18 * PROMPT.nbytes


def test_a_shard_of_the_old_form_is_written_and_read_byte_for_byte(tmp_path: Path) -> None:
    """Packed here by hand as before: samples whose text is stored with each of them."""
    fields = [toy_fields(number, 1 + number % 2, flip=True) for number in range(3)]
    (shard,) = write_shards(fields, tmp_path)
    stream = io.BytesIO()
    with webdataset.TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
        for sample in fields:
            writer.write(dict(sample))
    content = Path(shard.url).read_bytes()
    assert content == stream.getvalue()
    manifest = {"name": "shard-000000.tar", "samples": 3, "bytes": len(content)}
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    assert json.loads((tmp_path / "manifest.json").read_bytes()) == {"shards": [manifest]}
    old = tmp_path / "old.tar"
    with tarfile.open(old, "w") as archive:  # the same prompt with each sample
        for number in range(2):
            for name, part in one(number).items():
                if name != "__key__":
                    info = tarfile.TarInfo(f"s{number}.{name}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))
    for sample in read_samples(ShardInfo(str(old))):
        assert torch.equal(sample.text, torch.from_numpy(PROMPT.astype(np.float32)))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # WebDataset's
def test_webdataset_itself_reads_a_shard_with_shared_text(tmp_path: Path) -> None:
    (shard,) = write_shards([one(0), one(1)], tmp_path)
    first, *rest = webdataset.WebDataset(shard.url, shardshuffle=False)
    assert first["__key__"].startswith("shared/")
    assert np.array_equal(np.load(io.BytesIO(first["npy"]), allow_pickle=False), PROMPT)
    assert [sample["__key__"] for sample in rest] == ["s0", "s1"]


def test_shared_text_that_is_missing_damaged_or_too_late_gets_one_sentence(tmp_path: Path) -> None:
    (shard,) = write_shards([one(0), one(1)], tmp_path)
    path = Path(shard.url)
    for change, sentence in (
        (lambda files: files[1:], r"'s0' in shard .* shares its text\.npy with others, but no shared/[0-9a-f]+\.npy"),
        (lambda files: [*files[1:], files[0]], r"but no shared/"),
        (lambda files: [(files[0][0], files[0][1][:-1] + b"x"), *files[1:]], r"shared/.*\.npy, which is damaged"),
    ):
        with pytest.raises(InputError, match=sentence) as caught:
            list(read_samples(repack(path, change)))
        assert "\n" not in str(caught.value)


def test_memory_for_shared_text_is_bounded_in_writing_and_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(one(0)["text.npy"])
    fields = [one(number, own(number // 2)) for number in range(6)]
    (shard,) = write_shards(fields, tmp_path / "all")
    monkeypatch.setattr(shared, "MOST_BYTES", 2 * size)
    with pytest.raises(InputError, match="share more than"):
        list(read_samples(shard))
    (bounded,) = write_shards(fields, tmp_path / "bounded")
    assert sum("shared/" in name for name in members(bounded.url)) == 2
    read = {sample.key: sample.text for sample in read_samples(bounded)}
    for number in range(6):
        assert torch.equal(read[f"s{number}"], torch.from_numpy(own(number // 2).astype(np.float32)))


def test_a_word_of_the_users_own_in_the_json_is_no_reference(tmp_path: Path) -> None:
    for value in ("with friends", True, {"by": "Ann"}, ["text.npy"], None):
        (shard,) = write_shards([told(toy_fields(0), shared=value)], tmp_path)
        (sample,) = read_samples(shard)
        assert sample.key == "sample-00000"
    fields = [one(0, shared="with friends"), one(1, shared="with friends")]
    (shard,) = write_shards(fields, tmp_path)
    assert not any("shared/" in name for name in members(shard.url))  # its word stays its own
    assert all(torch.equal(s.text, torch.from_numpy(PROMPT.astype(np.float32))) for s in read_samples(shard))
    assert [sample.metadata["shared"] for sample in read_samples(shard)] == ["with friends"] * 2
