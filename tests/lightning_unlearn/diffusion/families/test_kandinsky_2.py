"""Kandinsky 2.2's decoder against its own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import assert_same_prediction, assert_training_loss
from pipeline_oracle import first_middle_last, recorded
from tiny_pipelines import kandinsky_2 as tiny
from torch import Tensor

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import KandinskyV22Pipeline

    folder = tiny.make(tmp_path_factory.mktemp("models") / "kandinsky")
    return KandinskyV22Pipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def conditions() -> Conditions:
    return {"image": torch.randn(3, tiny.STATE, generator=torch.Generator().manual_seed(0))}


def test_network_is_given_what_its_pipeline_gives_it(pipeline: Any, conditions: Conditions) -> None:
    with recorded(pipeline.unet) as calls:
        pipeline(
            image_embeds=conditions["image"],
            negative_image_embeds=torch.zeros_like(conditions["image"]),
            num_inference_steps=3,
            height=64,
            width=64,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    for call in first_middle_last(calls):
        given = call.keywords
        assert_same_prediction(pipeline.unet, conditions, call, given["sample"], given["timestep"], slice(3, None))


def test_loss_is_that_of_the_training_script(pipeline: Any, conditions: Conditions) -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps, None, added_cond_kwargs={"image_embeds": given["image"]}).sample[:, :4]
        return out

    config = {"beta_start": 0.00085, "beta_end": 0.012, "variance_type": "learned_range"}
    assert_training_loss(pipeline.unet, conditions, config, predict, (4, 8, 8))


def test_latents_are_the_codes_before_they_are_quantised(pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents, spread = family_of(pipeline.unet).encode_pictures(pipeline.movq, pixels)
        torch.testing.assert_close(latents, pipeline.movq.encode(pixels).latents)
    assert spread is None


def test_selections_are_the_layers_they_name(pipeline: Any) -> None:
    crossing = {name for name, _ in pipeline.unet.named_modules() if name.endswith(("add_k_proj", "add_v_proj"))}
    assert set(select_layers(pipeline.unet, "cross_attention")) == crossing
    assert crossing < set(select_layers(pipeline.unet, "attention"))
    with pytest.raises(InputError, match=r"Kandinsky 2\.2 has no weights that 'text_kv' means; choose one of cross"):
        select_layers(pipeline.unet, "text_kv")


def test_state_of_another_width_is_named(pipeline: Any) -> None:
    noisy = torch.zeros(3, 4, 8, 8)
    batch = ViewBatch(noisy, {"image": torch.zeros(3, tiny.STATE + 1)})
    with pytest.raises(InputError, match=f"'image' is .*{tiny.STATE}"):
        family_of(pipeline.unet).predict(pipeline.unet, noisy, torch.zeros(3, dtype=torch.int64), batch)
