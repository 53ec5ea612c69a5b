"""Selections of weights in every family: what is chosen can be captured, and what can't is left out with a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_runs import KINDS
from flow_pipelines import opened
from tiny_pipelines import dit, flux, flux_2, hunyuan_dit, kandinsky_2, pixart
from torch import Tensor, nn
from toys import tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import FAMILIES, Family, family_of
from lightning_unlearn.diffusion.families.selections import resolved
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import SELECTIONS, select_layers

PIPELINES: dict[str, Callable[[Path], Path]] = {
    **{name: kind.make for name, kind in KINDS.items() if not name.endswith("_dev")},
    # Those without guidance of their own.
    "flux_schnell": partial(flux.make, dev=False),
    "flux_2_klein": partial(flux_2.make, dev=False),
    "pixart_alpha": pixart.make,
    "hunyuan_dit": hunyuan_dit.make,
    "kandinsky_2": kandinsky_2.make,
    "dit": dit.make,
}
ROWS = 3


def quietly(network: nn.Module, selection: str) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return select_layers(network, selection)


def conditions_of(name: str, model: Any) -> dict[str, Tensor]:
    if name == "kandinsky_2":
        return {"image": torch.randn(ROWS, kandinsky_2.STATE)}
    if name == "dit":
        return {"class_label": torch.tensor([[1], [0], [2]])}
    if name == "stable_diffusion":
        return {"text": model.pipeline.encode_prompt(["a", "", "a cat"], "cpu", 1, False)[0]}
    told = model.family.facts(16, 16, (20, 16), (0, 0))
    return {**model.encoded(), **{key: torch.tensor([numbers] * ROWS) for key, numbers in told.items()}}


@pytest.mark.parametrize("name", PIPELINES)
def test_rows_of_all_that_is_chosen_are_samples(name: str, tmp_path: Path) -> None:
    model = opened(PIPELINES[name](tmp_path / "pipeline"))
    network, family = model.network, model.family
    everything = quietly(network, "all")
    rows: dict[str, set[int]] = {layer: set() for layer in everything}
    for layer, module in everything.items():
        module.register_forward_hook(lambda _, __, output, layer=layer: rows[layer].add(len(output)))
    channels = family.latent_channels(network)
    assert channels is not None
    noisy = torch.randn(ROWS, channels, *((1, 8, 8) if family.latent_dimensions == 4 else (8, 8)))
    with torch.no_grad():
        family.predict(network, noisy, torch.full((ROWS,), 500), ViewBatch(noisy, conditions_of(name, model)))
    assert {layer: seen for layer, seen in rows.items() if seen != {ROWS}} == {}
    linear = quietly(network, "linear")
    assert set(linear) == {layer for layer, module in everything.items() if isinstance(module, nn.Linear)}
    assert set(quietly(network, "auto")) <= set(everything)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.title)
def test_auto_is_the_text_where_only_text_enters_and_more_where_streams_join(family: Family) -> None:
    names = resolved(family, "auto")
    assert names
    if {"text_kv", "cross_attention"} <= family.selections.keys():
        assert names == ["text_kv"]
    elif not family.auto:
        assert names == ["attention", "feed_forward"]
    for selection in ("text_kv", "cross_attention", "attention", "feed_forward"):
        if selection not in family.selections:
            with pytest.raises(InputError, match=r"no weights that .* means; choose one of .*linear, all"):
                resolved(family, selection)


def test_what_is_left_out_is_said_once_and_named() -> None:
    network = nn.Sequential(
        nn.Linear(4, 4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv3d(1, 1, 1), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)
    )
    says = r"'all' leaves out 2 layers of Sequential .*: 1, 2\. The first: Layer 1 is a grouped"
    with pytest.warns(UserWarning, match=says) as told:
        assert list(select_layers(network, "all")) == ["0", "3"]
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(select_layers(network, "linear")) == ["0"]
        assert list(select_layers(network, ["0"])) == ["0"]
    with pytest.raises(InputError, match="Layer 1 is a grouped"):
        select_layers(network, ["0", "1"])


def test_layers_that_share_a_weight_are_both_left_out() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    with pytest.warns(UserWarning, match=r"leaves out 2 layers.*Layers 0 and 1 share a weight"):
        assert list(select_layers(network, "all")) == ["2"]


def test_text_kv_stays_what_a_unet_s_auto_means() -> None:
    network = tiny_unet()
    assert list(select_layers(network, "auto")) == list(select_layers(network, "text_kv"))
    assert "auto" in SELECTIONS
    assert family_of(network).title == "Stable Diffusion 1 and 2"
