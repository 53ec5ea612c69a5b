"""Named conditions: decoded, checked, chosen and stacked."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import DIM, LATENT, TOKENS, toy_fields

from lightning_unlearn.data.batches import collate_samples, form_of
from lightning_unlearn.data.conditions import (
    CONDITION_FIELDS,
    cast_conditions,
    chosen_caption,
    decode_conditions,
    forms_of,
    shapes_of,
    stack_conditions,
)
from lightning_unlearn.data.groups import form_of_fields
from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.data.shards import encode_sample, npy_bytes
from lightning_unlearn.errors import InputError

Array = np.ndarray[Any, Any]


def random_array(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def made(key: str, captions: int, tokens: int, *, pooled: bool = True, numbers: Any = None, seed: int = 0) -> Sample:
    """A sample with text states of any length and their mask."""
    mask = np.zeros((captions, tokens), np.float16)
    mask[:, : max(1, tokens - 1)] = 1
    conditions = {"text": random_array(seed, captions, tokens, DIM), "text_mask": mask}
    if pooled:
        conditions["pooled"] = random_array(seed + 1, 1, 5)
    metadata: dict[str, Any] = {"captions": [f"caption {number}" for number in range(captions)]}
    if numbers is not None:
        metadata["conditions"] = numbers
    return decode_sample(encode_sample(key, random_array(seed + 2, *LATENT), conditions, metadata))


@settings(max_examples=60, deadline=None)
@given(
    captions=st.integers(1, 4),
    names=st.sets(st.sampled_from(sorted(CONDITION_FIELDS)), min_size=1, max_size=6),
    one=st.booleans(),
    half=st.booleans(),
)
def test_all_conditions_come_back_as_they_were_encoded(captions: int, names: set[str], one: bool, half: bool) -> None:
    dtype = np.float16 if half else np.float32
    arrays: dict[str, Array] = {}
    for name in (name.removesuffix(".npy") for name in names | {"text.npy"}):
        entries = 1 if one and name != "text" else captions
        shape = (entries, TOKENS, DIM) if name.startswith("text") and not name.endswith("_mask") else (entries, TOKENS)
        array = random_array(len(name), *shape, dtype=dtype)
        arrays[name] = (array > 0).astype(dtype) if name.endswith("_mask") else array
    told = {"captions": ["c"] * captions, "conditions": {"size": [512, 768], "class": 7, "ratio": 0.5}}
    sample = decode_sample(encode_sample("a", random_array(1, *LATENT), arrays, told))
    assert sample.conditions.keys() == arrays.keys() | {"size", "class", "ratio"}
    for name, array in arrays.items():
        assert sample.conditions[name].dtype == torch.float32
        assert np.array_equal(sample.conditions[name].numpy(), array.astype(np.float32))
    assert sample.conditions["size"].tolist() == [[512, 768]]
    assert sample.conditions["class"].tolist() == [[7]]
    assert (sample.conditions["size"].dtype, sample.conditions["ratio"].dtype) == (torch.int64, torch.float32)


def test_an_array_alone_is_the_text() -> None:
    text = random_array(0, 2, TOKENS, DIM)
    named = encode_sample("a", random_array(1, *LATENT), {"text": text}, {"captions": ["a", "b"]})
    assert named == encode_sample("a", random_array(1, *LATENT), text, {"captions": ["a", "b"]})


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"'a' has a condition 'txt'.*called text"):
        encode_sample("a", random_array(1, *LATENT), {"txt": random_array(0, 1, 2, 3)}, {"captions": ["a"]})


def test_numbers_alone_condition_a_network_that_knows_no_text() -> None:
    sample = decode_sample(
        encode_sample("a", random_array(1, *LATENT), {}, {"captions": ["cat"], "conditions": {"class": [3]}})
    )
    assert sample.conditions.keys() == {"class"}
    with pytest.raises(InputError, match=r"lacks text\.npy"):
        decode_sample(encode_sample("a", random_array(1, *LATENT), {}, {"captions": ["cat"]}))
    assert not decode_sample(encode_sample("a", random_array(1, *LATENT), {}, {"captions": [""]})).conditions


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pooled.npy": np.zeros((3, 5))}, "2 captions but pooled for 3"),
        ({"text.npy": np.zeros((1, TOKENS, DIM))}, "2 captions but text for 1"),
        ({"text_mask.npy": np.full((2, TOKENS), 0.5)}, "other numbers than 0 and 1"),
        ({"text_mask.npy": np.ones((2, TOKENS + 1))}, rf"text_mask\.npy is of {TOKENS + 1} tokens, but its text"),
        ({"pooled.npy": np.zeros((2, TOKENS, DIM))}, r"pooled\.npy is float32 with 3 dimensions"),
        ({"image.npy": np.full((1, 3), np.nan)}, r"image\.npy holds NaN"),
    ],
)
def test_arrays_that_do_not_fit_get_one_sentence(changes: dict[str, Array], sentence: str) -> None:
    fields = toy_fields(0, 2) | {name: npy_bytes(array.astype(np.float32)) for name, array in changes.items()}
    with pytest.raises(InputError, match=sentence) as caught:
        decode_sample({**fields, "__url__": "a.tar"})
    assert "\n" not in str(caught.value)
    assert "'sample-00000' in a.tar" in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        [1, 2],
        "512",
        {"size": []},
        {"size": [1] * 65},
        {"size": ["512"]},
        {"size": [True]},
        {"size": [float("nan")]},
        {"size": [1e30]},
        {"size": None},
        {"size": {"height": 1}},
        {"text": [1]},
    ],
)
def test_what_is_no_number_in_the_json_gets_one_sentence(said: Any) -> None:
    fields = toy_fields(0) | {"json": json.dumps({"captions": ["a"], "conditions": said}).encode()}
    with pytest.raises(InputError, match="'conditions'") as caught:
        decode_sample({**fields, "__url__": "a.tar"})
    assert str(caught.value).endswith("write it anew.")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=5))
def test_text_of_any_length_is_padded_where_it_has_a_mask_and_nowhere_else(sizes: list[tuple[int, int]]) -> None:
    samples = [made(f"s{n}", captions, tokens, seed=n) for n, (captions, tokens) in enumerate(sizes)]
    batch = collate_samples("shard", samples)
    longest, most = max(tokens for _, tokens in sizes), max(captions for captions, _ in sizes)
    assert batch.conditions["text"].shape == (len(sizes), most, longest, DIM)
    assert batch.conditions["text_mask"].shape == (len(sizes), most, longest)
    assert batch.conditions["pooled"].shape == (len(sizes), 1, 5)
    for row, (sample, (captions, tokens)) in enumerate(zip(samples, sizes, strict=True)):
        for name in ("text", "text_mask"):
            stacked = batch.conditions[name][row]
            assert torch.equal(stacked[:captions, :tokens], sample.conditions[name])
            assert not stacked[captions:].any()
            assert not stacked[:, tokens:].any()
        views = batch.views(torch.tensor([row]), torch.tensor([captions - 1]))
        assert torch.equal(views.conditions["text"][0, :tokens], sample.conditions["text"][captions - 1])
        assert torch.equal(views.conditions["pooled"][0], sample.conditions["pooled"][0])


def test_text_of_different_length_without_a_mask_makes_different_batches() -> None:
    samples = [
        decode_sample(toy_fields(0)),
        decode_sample(toy_fields(1) | {"text.npy": npy_bytes(random_array(0, 1, 7, DIM))}),
    ]
    assert form_of(samples[0]) != form_of(samples[1])
    with pytest.raises(InputError, match=r"text \(7, 6\), but .*of different length a mask"):
        collate_samples("shard", samples)


def test_a_form_is_known_from_headers_as_from_the_sample() -> None:
    told = {"captions": ["a"], "conditions": {"size": [1, 2], "class": 3}}
    conditions = {
        "text": random_array(0, 1, 4, DIM),
        "text_mask": np.ones((1, 4), np.float32),
        "pooled": random_array(0, 1, 5),
    }
    for arrays in (conditions, {"text": conditions["text"]}):
        fields = encode_sample("a", random_array(1, 3, 4, 12), arrays, told)
        assert form_of_fields(fields, told) == form_of(decode_sample(fields))
    assert form_of(made("a", 2, 5)) == form_of(made("b", 1, 3))
    assert form_of(made("a", 1, 5)) == "latent 3x8x8, pooled 5, text ?x6, text_mask ?"


def test_forms_leave_the_number_of_tokens_open_where_a_mask_has_their_name() -> None:
    shapes = {"text": (4, 6), "text_2": (7, 8), "text_2_mask": (7,), "pooled": (5,)}
    assert forms_of(shapes) == {"text": (4, 6), "text_2": (None, 8), "text_2_mask": (None,), "pooled": (5,)}


def test_a_caption_is_chosen_and_what_holds_for_all_captions_stays() -> None:
    conditions = made("a", 3, 4, numbers={"size": [5, 6]}).conditions
    one, several = chosen_caption(conditions, 2), chosen_caption(conditions, [2, 0])
    assert torch.equal(one["text"], conditions["text"][2])
    assert torch.equal(several["text"], conditions["text"][[2, 0]])
    assert one["size"].tolist() == [5, 6]
    assert several["size"].tolist() == [[5, 6], [5, 6]]
    assert shapes_of(conditions)["pooled"] == (5,)


def test_whole_numbers_stay_whole_where_the_network_is() -> None:
    moved = cast_conditions(made("a", 1, 4, numbers={"class": 3}).conditions, torch.device("cpu"), torch.float64)
    assert (moved["text"].dtype, moved["class"].dtype) == (torch.float64, torch.int64)


def test_what_is_for_all_captions_of_one_sample_is_repeated_beside_one_with_an_entry_a_caption() -> None:
    single = {"pooled": torch.ones(1, 2)}
    several = {"pooled": torch.tensor([[2.0, 2.0], [3.0, 3.0]])}
    assert stack_conditions([single, several], [2, 2])["pooled"][..., 0].tolist() == [[1, 1], [2, 3]]


def test_nothing_is_decoded_that_is_no_condition() -> None:
    fields = {"secret.npy": b"x", "pooled.npy": npy_bytes(random_array(0, 1, 2))}
    assert decode_conditions(fields, {}, 1, "a").keys() == {"pooled"}
