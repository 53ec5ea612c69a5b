"""Weights of samples and captions as their json says them, and what a manifest says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import told, toy_fields

from lightning_unlearn.data.batches import Forms, collate_samples
from lightning_unlearn.data.samples import decode_sample
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.data.weights import caption_weights_of, weight_of
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.errors import InputError


@pytest.mark.parametrize("said", [0, -1, "10", True, None, [1], float("nan"), float("inf")])
def test_what_is_no_weight_is_refused_where_it_counts(said: Any) -> None:
    with pytest.raises(InputError, match=r"a has .* as 'weight'.*above 0"):
        weight_of({"weight": said}, "a")
    assert decode_sample(told(toy_fields(0), weight="12 kg")).key == "sample-00000"  # a score does not depend on it


@pytest.mark.parametrize("said", [[0.5], [1, 1, 1], [0, 0], [1, -1], [1, "a"], [1, True], 1, "ab", [1, float("nan")]])
def test_what_are_no_weights_of_captions_is_refused(said: Any) -> None:
    with pytest.raises(InputError, match="'caption_weights' in its json for 2 captions"):
        decode_sample(told(toy_fields(0, 2), caption_weights=said))


def test_weights_of_captions_are_shares() -> None:
    assert caption_weights_of({"caption_weights": [3, 1]}, 2, "a") == [0.75, 0.25]
    assert caption_weights_of({"caption_weights": [3, 3]}, 2, "a") is None
    assert caption_weights_of({}, 2, "a") is None
    batch = collate_samples(
        "shard", [decode_sample(told(toy_fields(0, 2), caption_weights=[3, 1])), decode_sample(toy_fields(1, 3))]
    )
    assert batch.caption_weights == [[0.75, 0.25], [1 / 3] * 3]
    assert collate_samples("shard", [decode_sample(toy_fields(0))]).caption_weights is None
    # A Trainer's precision converts tensors, and would round them.
    assert batch.to(torch.device("cpu")).caption_weights == batch.caption_weights


def test_a_manifest_says_forms_and_weights_where_they_are_not_all_alike(tmp_path: Path) -> None:
    fields = [told(toy_fields(number), weight=weight) for number, weight in enumerate((10, 5, 5, 10))]
    write_shards(fields, tmp_path, samples_per_shard=3)
    entries = json.loads((tmp_path / "manifest.json").read_bytes())["shards"]
    form = "latent 3x8x8, text 4x6"
    assert entries[0]["groups"] == [{"form": form, "samples": 3, "weight": 20.0, "smallest": 5.0}]
    assert entries[1]["groups"] == [{"form": form, "samples": 1, "weight": 10.0, "smallest": 10.0}]
    assert [sum(group.weight for group in shard.groups) for shard in list_shards(str(tmp_path))] == [20, 10]
    write_shards([told(toy_fields(number), weight=10) for number in range(3)], tmp_path)
    assert "groups" not in json.loads((tmp_path / "manifest.json").read_bytes())["shards"][0]


@pytest.mark.parametrize(
    "groups", [[{}], "x", [{"form": "a", "samples": 0, "weight": 1, "smallest": 1}], [{"form": 1}], {"a": 1}]
)
def test_groups_that_are_none_make_no_manifest(groups: Any, tmp_path: Path) -> None:
    write_shards([toy_fields(0)], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    manifest["shards"][0]["groups"] = groups
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not a manifest of shards"):
        list_shards(str(tmp_path))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=60), st.integers(1, 5), st.integers(1, 3))
def test_what_waits_for_its_form_comes_once_in_batches_of_one_form(forms: list[str], size: int, held: int) -> None:
    waiting = Forms[tuple[str, int]](size, held)
    batches = []
    for number, form in enumerate(forms):
        if batch := waiting.add(form, (form, number)):
            batches.append(batch)
        waits = number + 1 - sum(map(len, batches))
        assert 0 < waits <= held * size  # something is left for a shard's last batch, and not more than memory has
    batches.extend(waiting.rest())
    assert sorted(item[1] for batch in batches for item in batch) == list(range(len(forms)))
    for batch in batches:
        assert len({form for form, _ in batch}) == 1
        assert 1 <= len(batch) <= size
        assert [number for _, number in batch] == sorted(number for _, number in batch)
