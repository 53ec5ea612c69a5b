"""Selections of weights in every family: what is chosen can be captured, and what can't is left out with a word."""

from __future__ import annotations

import math
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
from lightning_unlearn.diffusion.families.selections import automatic, checked
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import SELECTIONS, automatic_selection, layer_specs, select_layers

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
def test_auto_narrows_to_the_text_where_only_text_enters(family: Family) -> None:
    names = automatic(family)
    assert names[:2] == ["all", "linear"]
    text = {"text_kv", "cross_attention"} <= family.selections.keys()
    assert (names[-1] == "text_kv") == text
    assert text or "text_kv" not in names
    for selection in ("text_kv", "cross_attention", "attention", "feed_forward"):
        if selection not in family.selections:
            with pytest.raises(InputError, match=r"no weights that .* means; choose one of .*linear, all"):
                checked(family, selection)


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


def test_auto_is_all_that_is_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_unet()
    assert family_of(network).title == "Stable Diffusion 1 and 2"
    assert "auto" in SELECTIONS
    names = ("all", "linear", "attention", "cross_attention", "text_kv")
    specs = [layer_specs(select_layers(network, name)).values() for name in names]
    weights = [sum(math.prod(shape) for one in found for shape in one.parameter_shapes.values()) for found in specs]
    factors = [
        4 * sum(one.weight_shape[0] ** 2 + math.prod(one.weight_shape[1:]) ** 2 for one in found) for found in specs
    ]
    for limit, sizes in (("MOST_WEIGHTS", weights), ("MOST_FACTORS", factors)):
        for name, size in zip(names, sizes, strict=True):
            with monkeypatch.context() as context:
                context.setattr(f"lightning_unlearn.weights.parameters.{limit}", size)
                assert automatic_selection(network)[0] == name
                assert list(select_layers(network, "auto")) == list(select_layers(network, name))
        with monkeypatch.context() as context:
            context.setattr(f"lightning_unlearn.weights.parameters.{limit}", 1)
            name, why = automatic_selection(network)
            assert name == "text_kv"  # the last, whatever its size
            assert why.endswith("'all' and 'linear' and 'attention' and 'cross_attention' would be too large")
    assert automatic_selection(nn.Sequential(nn.Linear(1, 1)))[0] == "all"  # of no family
    with pytest.raises(InputError, match="No Linear or Conv2d layer of ReLU"):
        automatic_selection(nn.ReLU())
