"""Stable Diffusion 1 and 2 against their own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import assert_same_prediction, assert_training_loss
from pipeline_oracle import first_middle_last, recorded
from tiny_pipelines import stable_diffusion
from torch import Tensor

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.diffusion.objective import DenoisingObjective

PROMPTS = ["a red ball", "", "cat"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = stable_diffusion.make(tmp_path_factory.mktemp("models") / request.param)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=request.param)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.kept = folder
    return pipeline


@pytest.fixture
def conditions(pipeline: Any) -> Conditions:
    with torch.no_grad():
        return {"text": pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0]}


def test_network_is_given_what_its_pipeline_gives_it(pipeline: Any, conditions: Conditions) -> None:
    with recorded(pipeline.unet) as calls:
        pipeline(PROMPTS, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))
    for call in first_middle_last(calls):
        rows = slice(len(PROMPTS), None)
        assert_same_prediction(pipeline.unet, conditions, call, call.arguments[0], call.arguments[1], rows)


def test_loss_is_that_of_the_training_script_with_the_prediction_of_the_pipeline_s_files(
    pipeline: Any, conditions: Conditions
) -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps, given["text"]).sample
        return out

    config = dict(pipeline.scheduler.config)
    folder: Path = pipeline.kept
    assert DenoisingObjective(str(folder)).prediction_type == config["prediction_type"]
    known = {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type")}
    channels = pipeline.unet.config.in_channels
    assert_training_loss(pipeline.unet, conditions, known, predict, (channels, 8, 8))
