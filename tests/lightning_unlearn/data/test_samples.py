from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import DIM, LATENT, TOKENS, toy_fields

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import Sample, SampleBatch, decode_sample
from lightning_unlearn.data.shards import encode_sample, npy_bytes
from lightning_unlearn.errors import InputError


class CreatesFile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def sample(number: int, captions: int = 1, **changes: Any) -> Sample:
    return decode_sample({**toy_fields(number, captions), **changes})


def assert_one_sentence(error: pytest.ExceptionInfo[InputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_was_encoded_is_decoded(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    latent, flip = rng.standard_normal((2, *LATENT)).astype(dtype)
    text = rng.standard_normal((2, TOKENS, DIM)).astype(dtype)
    metadata = {"captions": ["ein Löwe", "a lion"], "seed": 3}
    decoded = decode_sample(
        encode_sample("lion", latent, text, metadata, latent_flip=flip, picture=b"picture", picture_format="webp")
    )
    assert decoded.key == "lion"
    assert decoded.captions == ["ein Löwe", "a lion"]
    assert decoded.metadata == metadata
    assert decoded.picture == b"picture"
    assert decoded.latent.dtype == decoded.text.dtype == torch.float32
    assert decoded.latent_flip is not None
    for got, wanted in ((decoded.latent, latent), (decoded.text, text), (decoded.latent_flip, flip)):
        assert np.array_equal(got.numpy(), wanted.astype(np.float32))


def test_flip_and_picture_may_be_absent() -> None:
    assert sample(0).latent_flip is None
    assert sample(0).picture is None


def test_array_of_objects_never_runs_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    evil = np.empty(1, dtype=object)
    evil[0] = CreatesFile(made)
    path = tmp_path / "evil.npy"
    np.save(path, evil, allow_pickle=True)
    pickled = pickle.dumps(CreatesFile(made))
    for content in (path.read_bytes(), pickled):
        for name in ("latent.npy", "text.npy", "latent_flip.npy"):
            with pytest.raises(InputError) as error:
                sample(0, **{name: content})
            assert_one_sentence(error, "sample-00000", name, "plain NumPy array")
    assert not made.exists()
    np.load(path, allow_pickle=True)  # it would have
    assert made.exists()


@pytest.mark.parametrize("name", ["latent.npy", "text.npy", "json"])
def test_missing_field_is_named(name: str) -> None:
    fields = toy_fields(0)
    del fields[name]
    with pytest.raises(InputError) as error:
        decode_sample({**fields, "__url__": "data/shard.tar"})
    assert_one_sentence(error, f"lacks {name}", "sample-00000", "data/shard.tar")


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"captions": []}',
        b'{"captions": "a lion"}',
        b'{"captions": [1]}',
        b'{"captions": null}',
    ],
)
def test_sample_without_captions_is_an_error(content: bytes) -> None:
    with pytest.raises(InputError) as error:
        sample(0, json=content)
    assert_one_sentence(error, "no captions", "sample-00000")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_unreadable_json_is_an_error(content: bytes) -> None:
    with pytest.raises(InputError) as error:
        sample(0, json=content)
    assert_one_sentence(error, "json", "sample-00000")


def test_captions_and_text_must_agree() -> None:
    with pytest.raises(InputError) as error:
        sample(0, json=json.dumps({"captions": ["one", "two"]}).encode())
    assert_one_sentence(error, "2 captions but text for 1")


@pytest.mark.parametrize("name", ["latent.npy", "text.npy", "latent_flip.npy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_number_that_is_not_finite_is_an_error(name: str, bad: float) -> None:
    array = np.zeros((1, TOKENS, DIM) if name == "text.npy" else LATENT, np.float32)
    array[0, 1, 2] = bad
    with pytest.raises(InputError) as error:
        sample(0, **{name: npy_bytes(array)})
    assert_one_sentence(error, name, "NaN or infinity")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64, np.complex64, ">f4", "U3", "M8[s]"])
def test_other_dtype_is_an_error(dtype: Any) -> None:
    with pytest.raises(InputError) as error:
        sample(0, **{"latent.npy": npy_bytes(np.zeros(LATENT, dtype))})
    assert_one_sentence(error, "latent.npy", "float16 or float32")


@pytest.mark.parametrize("shape", [(), (8,), (8, 8), (1, 1, 3, 8, 8), (3, 0, 8)])
def test_other_number_of_dimensions_or_nothing_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        sample(0, **{"latent.npy": npy_bytes(np.zeros(shape, np.float32))})
    assert_one_sentence(error, "latent.npy")


def test_flip_of_another_shape_is_an_error() -> None:
    with pytest.raises(InputError) as error:
        sample(0, **{"latent_flip.npy": npy_bytes(np.zeros((3, 8, 4), np.float32))})
    assert_one_sentence(error, "latent_flip.npy (3, 8, 4)", "differ in shape")


def test_archive_of_arrays_is_no_array() -> None:
    with pytest.raises(InputError):
        sample(0, **{"latent.npy": b"PK\x03\x04" + bytes(50)})
    with pytest.raises(InputError):
        sample(0, **{"latent.npy": b"PK\x05\x06" + bytes(18)})  # an empty .npz


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=4),
    st.one_of(st.none(), st.integers(0, 900)),
)
def test_damaged_array_is_an_input_error_or_a_sound_array(damage: list[tuple[int, int]], length: int | None) -> None:
    content = bytearray(toy_fields(0)["latent.npy"])
    for position, value in damage:
        content[position] = value
    message = ""
    try:
        latent = sample(0, **{"latent.npy": bytes(content[:length])}).latent
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert message or (latent.dim() == 3 and latent.isfinite().all())


def test_batch_stacks_samples_and_fills_up_captions_with_zeros() -> None:
    samples = [sample(0, 1), sample(1, 3), sample(2, 2)]
    batch = collate_samples("shard", samples, end_of_shard=3, skipped=1)
    assert batch.shard == "shard"
    assert batch.keys == [each.key for each in samples]
    assert len(batch) == 3
    assert batch.latents.shape == (3, *LATENT)
    assert batch.text.shape == (3, 3, TOKENS, DIM)
    assert batch.caption_counts.tolist() == [1, 3, 2]
    assert (batch.end_of_shard, batch.skipped, batch.latents_flip) == (3, 1, None)
    for row, each in enumerate(samples):
        assert torch.equal(batch.latents[row], each.latent)
        assert torch.equal(batch.text[row, : len(each.text)], each.text)
        assert not batch.text[row, len(each.text) :].any()


def test_batch_stacks_flips() -> None:
    samples = [decode_sample(toy_fields(number, flip=True)) for number in range(2)]
    batch = collate_samples("shard", samples)
    assert batch.latents_flip is not None
    for row, each in enumerate(samples):
        assert each.latent_flip is not None
        assert torch.equal(batch.latents_flip[row], each.latent_flip)


@pytest.mark.parametrize(
    "changes",
    [
        {"latent.npy": npy_bytes(np.zeros((3, 8, 4), np.float32))},
        {"text.npy": npy_bytes(np.zeros((1, TOKENS + 1, DIM), np.float32))},
        {"text.npy": npy_bytes(np.zeros((1, TOKENS, DIM + 1), np.float32))},
        {"latent_flip.npy": npy_bytes(np.zeros(LATENT, np.float32))},
    ],
)
def test_samples_that_differ_in_form_make_no_batch(changes: dict[str, bytes]) -> None:
    with pytest.raises(InputError) as error:
        collate_samples("shard", [sample(0), sample(1, **changes)])
    assert_one_sentence(error, "sample-00000", "sample-00001")


def test_batch_goes_to_a_device_with_all_its_tensors_but_the_counts() -> None:
    batch = collate_samples("shard", [decode_sample(toy_fields(0, flip=True))], end_of_shard=1)
    moved = batch.to(torch.device("meta"))
    assert moved.latents_flip is not None
    assert {moved.latents.device.type, moved.text.device.type, moved.latents_flip.device.type} == {"meta"}
    assert (moved.keys, moved.shard, moved.end_of_shard) == (batch.keys, batch.shard, 1)
    # Captions are drawn on the CPU.
    assert moved.caption_counts.device.type == "cpu"
    assert SampleBatch("shard", error="gone").to(torch.device("cpu")).error == "gone"


def test_some_of_a_batch_keep_their_own_json() -> None:
    batch = SampleBatch(
        "shard", ["a", "b"], torch.zeros(2, 1), {}, torch.ones(2, dtype=torch.int64), metadata=[{"n": 0}, {"n": 1}]
    )
    assert batch.only({"b"}).metadata == [{"n": 1}]
