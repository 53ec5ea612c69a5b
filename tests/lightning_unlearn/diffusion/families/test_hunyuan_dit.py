"""HunyuanDiT against its own pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import assert_same_prediction, assert_training_loss, repeated
from pipeline_oracle import first_middle_last, recorded
from tiny_pipelines import hunyuan_dit as tiny
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

PROMPTS = ["a red ball by the sea", "", "cat"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import HunyuanDiTPipeline

    folder = tiny.make(tmp_path_factory.mktemp("models") / "hunyuan")
    return HunyuanDiTPipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def conditions(pipeline: Any) -> Conditions:
    family = family_of(pipeline.transformer)
    with torch.no_grad():
        return family.encode(pipeline, PROMPTS) | repeated(family.facts(64, 128, (30, 20), (3, 0)), len(PROMPTS))


def test_network_is_given_what_its_pipeline_gives_it(pipeline: Any, conditions: Conditions) -> None:
    with recorded(pipeline.transformer) as calls:
        pipeline(
            PROMPTS,
            num_inference_steps=3,
            height=64,
            width=128,
            guidance_scale=5.0,
            use_resolution_binning=False,
            original_size=(30, 20),
            target_size=(64, 128),
            crops_coords_top_left=(3, 0),
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    for call in first_middle_last(calls):
        rows = slice(len(PROMPTS), None)
        assert_same_prediction(pipeline.transformer, conditions, call, call.arguments[0], call.arguments[1], rows)
        assert call.keywords["image_meta_size"][rows].tolist() == [[30, 20, 64, 128, 3, 0]] * len(PROMPTS)


def test_loss_is_that_of_the_velocity_alone(pipeline: Any, conditions: Conditions) -> None:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    # 4 by 4 patches out of a base of 32 by 32, whose middle they stretch over.
    positions = get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (4, 4), output_type="pt")

    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(
            noisy,
            timesteps.double(),
            encoder_hidden_states=given["text"],
            text_embedding_mask=given["text_mask"],
            encoder_hidden_states_t5=given["text_2"],
            text_embedding_mask_t5=given["text_2_mask"],
            image_meta_size=torch.tensor([[30.0, 20, 64, 128, 3, 0]], dtype=torch.float64),
            style=torch.tensor([0]),
            image_rotary_emb=positions,
        ).sample.chunk(2, 1)[0]
        return out

    config = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}
    assert_training_loss(pipeline.transformer, conditions, config, predict, (4, 8, 8))


def test_selections_are_the_layers_they_name(pipeline: Any) -> None:
    network = pipeline.transformer
    assert list(select_layers(network, "text_kv")) == [f"blocks.{n}.attn2.to_{what}" for n in range(2) for what in "kv"]
    assert len(select_layers(network, "attention")) == 2 * 8
    assert len(select_layers(network, "feed_forward")) == 2 * 2
    linear = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    out = {name for name in linear if "pooler" in name or name.startswith("text_embedder")}
    assert len(out) == 6
    with pytest.warns(UserWarning, match="leaves out 6 layers"):
        assert set(select_layers(network, "linear")) == linear - out


def test_another_number_of_tokens_is_named(pipeline: Any, conditions: Conditions) -> None:
    noisy = torch.zeros(3, 4, 8, 8)
    given = {**conditions, "text_2": conditions["text_2"][:, :9], "text_2_mask": conditions["text_2_mask"][:, :9]}
    with pytest.raises(InputError, match=r"'text_2' has 9 tokens.*takes 256"):
        family_of(pipeline.transformer).predict(
            pipeline.transformer, noisy, torch.zeros(3, dtype=torch.int64), ViewBatch(noisy, given)
        )


def test_facts_of_a_picture_have_their_names(pipeline: Any) -> None:
    assert family_of(pipeline.transformer).facts(64, 128, (30, 20), (3, 0)) == {
        "original_size": [30, 20],
        "target_size": [64, 128],
        "crop_top_left": [3, 0],
    }
