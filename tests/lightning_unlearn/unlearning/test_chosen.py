"""Which weights are unlearned where nobody says it."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import ToyDenoiser, tiny_unet

from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.fisher import DiagonalFisher
from lightning_unlearn.unlearning.chosen import chosen_weights
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_specs, select_layers


def fisher_of(parameters: str | list[str]) -> DiagonalFisher:
    return DiagonalFisher(layer_specs(select_layers(tiny_unet(), parameters)))


def test_what_is_asked_for_is_taken() -> None:
    assert chosen_weights(tiny_unet(), "linear", fisher_of("text_kv")) == ("linear", "")
    assert chosen_weights(tiny_unet(), [".*to_k"], None) == ([".*to_k"], "")


@pytest.mark.parametrize("fisher", [None, "identity", "not_there.safetensors"])
def test_without_a_fisher_as_many_as_fit(fisher: str | None) -> None:
    name, why = chosen_weights(tiny_unet(), "auto", fisher)
    assert name == "all"
    assert why.startswith("82 layers, ")


@pytest.mark.parametrize("parameters", ["text_kv", "attention", "linear", "all"])
def test_a_fisher_s_own_weights_are_chosen_by_name(parameters: str, tmp_path: Path) -> None:
    fisher = fisher_of(parameters)
    fisher.save(str(tmp_path / "fisher.safetensors"))
    for source in (fisher, str(tmp_path / "fisher.safetensors")):
        name, why = chosen_weights(tiny_unet(), "auto", source)
        assert name == parameters
        assert ("is of these alone; for more, take one with `parameters: all`" in why) == (parameters != "all")


def test_a_fisher_of_patterns_chooses_just_its_layers() -> None:
    fisher = fisher_of([r"conv_.*", r".*\.to_q"])
    module = UnlearningModule(tiny_unet(), DenoisingObjective(), fisher)
    assert list(module.layers) == list(fisher.layers)
    assert module.parameters_asked == "auto"
    assert "for more" in module.parameters_reason


def test_a_fisher_of_another_model_chooses_nothing() -> None:
    fisher = DiagonalFisher(layer_specs(select_layers(ToyDenoiser(), "all")))
    name, why = chosen_weights(tiny_unet(), "auto", fisher)
    assert (name, why) == ("all", "")


def test_a_damaged_fisher_is_left_to_who_reads_it(tmp_path: Path) -> None:
    (tmp_path / "fisher.safetensors").write_bytes(b"nothing")
    assert chosen_weights(tiny_unet(), "auto", str(tmp_path / "fisher.safetensors"))[0] == "all"
