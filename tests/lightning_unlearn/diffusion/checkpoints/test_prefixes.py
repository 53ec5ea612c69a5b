"""What wrappers put before names: found where one fits, refused by name where two do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_forms import assert_weights, load_toy, toy_moved

from lightning_unlearn.errors import InputError

PIECES = ["module.", "_orig_mod.", "_forward_module.", "base_model.model.", "model.", "unet.", "network."]
CHAINS = [
    *((piece,) for piece in PIECES),
    *((first, second) for first in PIECES for second in PIECES if first != second),
    ("_forward_module.", "module.", "_orig_mod.", "model.", "unet.", "_orig_mod."),
]


@pytest.mark.parametrize("chain", CHAINS, ids="".join)
@pytest.mark.parametrize("place", [None, "state_dict", "model"])
def test_prefixes_in_any_order_are_found(tmp_path: Path, chain: tuple[str, ...], place: str | None) -> None:
    prefix = "".join(chain)
    state = {f"{prefix}{name}": value for name, value in toy_moved(1).items()}
    other = {"metric.weight": torch.zeros(3), "vae.conv_in.weight": torch.zeros(3)}
    torch.save({place: {**state, **other}, "epoch": 3} if place else {**state, **other}, tmp_path / "a.pt")
    for asked in ("", prefix, prefix.replace("_orig_mod.", "")):
        assert_weights(load_toy(tmp_path / "a.pt", asked), toy_moved(1))


def test_two_prefixes_that_fit_are_refused_by_name(tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for prefix in ("teacher.", "student.") for name, value in toy_moved(1).items()}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"more than once \('state_dict\.student\.', 'state_dict\.teacher\.'\)"):
        load_toy(tmp_path / "a.pt")
    for prefix in ("teacher.", "state_dict.teacher."):
        assert_weights(load_toy(tmp_path / "a.pt", prefix), toy_moved(1))


def test_a_files_own_names_come_before_those_of_a_part(tmp_path: Path) -> None:
    torch.save(
        {**toy_moved(1), **{f"teacher.{name}": value for name, value in toy_moved(2).items()}}, tmp_path / "a.pt"
    )
    assert_weights(load_toy(tmp_path / "a.pt"), toy_moved(1))
    assert_weights(load_toy(tmp_path / "a.pt", "teacher."), toy_moved(2))


def test_a_name_with_and_without_its_wrapper_is_refused(tmp_path: Path) -> None:
    torch.save({**toy_moved(1), "_orig_mod.conv_in.weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds conv_in\.weight twice"):
        load_toy(tmp_path / "a.pt")


def test_a_checkpoint_of_a_network_with_an_adapter_on_it_says_so(tmp_path: Path) -> None:
    state = {name.replace("text.", "text.base_layer."): value for name, value in toy_moved(1).items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match="PEFT's adapter"):
        load_toy(tmp_path / "a.pt")


@pytest.mark.parametrize("more", ["text.2.weight", "conv_in.lora_A.default.weight"])
@pytest.mark.parametrize("prefix", ["", "model.unet."])
def test_weights_that_the_network_has_no_place_for_are_refused(tmp_path: Path, more: str, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in {**toy_moved(1), more: torch.zeros(3)}.items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"1 more of its parts \(e\.g\. {more}\)"):
        load_toy(tmp_path / "a.pt")
