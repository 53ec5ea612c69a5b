"""The objective of a LoRA whose header is that of kohya's FLUX trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_pipelines import flux
from torch import nn

from lightning_unlearn.diffusion.adapters import objective_of_training, read_training_record, warn_of_other_loss
from lightning_unlearn.diffusion.adapters.kohya_header import TrainingRecord
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.errors import InputError

# As the trainer writes it for `--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw
# --guidance_scale 1.0`, the setting of its guide.
HEADER = {
    "ss_network_module": "networks.lora_flux",
    "ss_apply_t5_attn_mask": "False",
    "ss_weighting_scheme": "none",
    "ss_logit_mean": "0.0",
    "ss_logit_std": "1.0",
    "ss_mode_scale": "1.29",
    "ss_guidance_scale": "1.0",
    "ss_timestep_sampling": "shift",
    "ss_sigmoid_scale": "1.0",
    "ss_model_prediction_type": "raw",
    "ss_discrete_flow_shift": "3.1582",
}


def record(**change: str | None) -> TrainingRecord:
    said = {key: value for key, value in {**HEADER, **change}.items() if value is not None}
    found = read_training_record("lora.safetensors", said)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux.make(tmp_path_factory.mktemp("flux"))


class Distilled(nn.Module):
    config: ClassVar[dict[str, Any]] = {"guidance_embeds": True}


def settings(folder: Path, network: nn.Module | None = None, **change: str | None) -> dict[str, Any]:
    return objective_of_training(str(folder), record(**change), network or Distilled()).settings()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"timestep_density": "logit_normal", "shift": 3.1582}),
        (
            {"ss_sigmoid_scale": "2.0"},
            {"density_numbers": {"logit_mean": 0.0, "logit_std": 2.0}, "shift": 3.1582},
        ),
        ({"ss_timestep_sampling": "sigmoid"}, {"timestep_density": "logit_normal", "shift": 1.0}),
        ({"ss_timestep_sampling": "uniform"}, {"timestep_density": "uniform", "shift": 1.0}),
        ({"ss_timestep_sampling": "sigma"}, {"timestep_density": "uniform", "shift": 3.1582}),
        (
            {"ss_timestep_sampling": "sigma", "ss_weighting_scheme": "logit_normal", "ss_logit_mean": "0.5"},
            {"density_numbers": {"logit_mean": 0.5, "logit_std": 1.0}, "shift": 3.1582},
        ),
        (
            {"ss_timestep_sampling": "sigma", "ss_weighting_scheme": "mode", "ss_discrete_flow_shift": "1.0"},
            {"density_numbers": {"mode_scale": 1.29}, "shift": 1.0},
        ),
    ],
)
def test_header_says_how_sigmas_were_drawn(folder: Path, change: dict[str, str], expected: dict[str, Any]) -> None:
    found = settings(folder, **change)
    assert {name: found[name] for name in expected} == expected
    assert (found["guidance"], found["weighting"], found["preconditioned"]) == (1.0, "none", False)


def test_network_without_guidance_is_given_none(folder: Path) -> None:
    assert settings(folder, nn.Identity())["guidance"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ss_timestep_sampling": "flux_shift"}, "'flux_shift', whose shift is another for each size"),
        ({"ss_timestep_sampling": None}, "not how it drew timesteps"),
        ({"ss_model_prediction_type": "sigma_scaled"}, "model_prediction_type 'sigma_scaled'"),
        ({"ss_guidance_scale": "much"}, "ss_guidance_scale in the adapter's header is 'much'"),
    ],
)
def test_what_can_t_be_followed_is_refused(folder: Path, change: dict[str, str | None], words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings(folder, **change)


def test_objective_that_is_given_is_compared(folder: Path) -> None:
    same = FlowMatchingObjective(str(folder), density="logit_normal", guidance=1.0, shift=3.1582)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_loss(same, record())
    other = FlowMatchingObjective(str(folder), density="logit_normal", guidance=3.5, shift=3.1582)
    with pytest.warns(UserWarning, match=r"guidance = 1.0, but the objective has 3.5"):
        warn_of_other_loss(other, record())
    plain = FlowMatchingObjective(str(folder), guidance=1.0)
    with pytest.warns(UserWarning, match=r"shift = 3.1582, but the objective has 1.0"):
        warn_of_other_loss(plain, record())


def test_what_is_followed_is_not_called_unfollowed() -> None:
    assert not [sentence for sentence in record().unfollowed() if "flow" in sentence or "guidance" in sentence]
    masked = record(ss_apply_t5_attn_mask="True").unfollowed()
    assert any("apply_t5_attn_mask" in sentence for sentence in masked)
