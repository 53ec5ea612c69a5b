"""PixArt-α and Σ against their own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import assert_same_prediction, assert_training_loss, repeated
from pipeline_oracle import first_middle_last, recorded
from tiny_pipelines import pixart as tiny
from torch import Tensor, nn

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

PROMPTS = ["a red ball by the sea", "", "cat"]
SIDES = {"alpha": 256, "sigma": 16}


@pytest.fixture(scope="module", params=["alpha", "sigma"])
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

    sigma = request.param == "sigma"
    folder = tiny.make(tmp_path_factory.mktemp("models") / request.param, sigma)
    kind = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return kind.from_pretrained(folder, local_files_only=True)


def side_of(pipeline: Any) -> int:
    return SIDES["sigma" if "Sigma" in type(pipeline).__name__ else "alpha"]


@pytest.fixture
def conditions(pipeline: Any) -> Conditions:
    family, side = family_of(pipeline.transformer), side_of(pipeline)
    with torch.no_grad():
        return family.encode(pipeline, PROMPTS) | repeated(family.facts(side, side, (9, 9), (0, 0)), len(PROMPTS))


def test_network_is_given_what_its_pipeline_gives_it(pipeline: Any, conditions: Conditions) -> None:
    side = side_of(pipeline)
    with recorded(pipeline.transformer) as calls:
        pipeline(
            PROMPTS,
            num_inference_steps=3,
            height=side,
            width=side,
            guidance_scale=5.0,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    for call in first_middle_last(calls):
        rows = slice(len(PROMPTS), None)
        latents, timestep = call.arguments[0], call.keywords["timestep"]
        assert_same_prediction(pipeline.transformer, conditions, call, latents, timestep, rows)
        assert torch.equal(conditions["text_mask"].bool(), call.keywords["encoder_attention_mask"][rows].bool())
    # Padding is there, and does not count.
    assert 0 < conditions["text_mask"].mean() < 1
    given = {**conditions, "text": conditions["text"] + 9 * (1 - conditions["text_mask"][..., None])}
    call = calls[0]
    assert_same_prediction(
        pipeline.transformer, given, call, call.arguments[0], call.keywords["timestep"], slice(len(PROMPTS), None)
    )


def test_loss_is_that_of_the_training_script_for_the_noise_alone(pipeline: Any, conditions: Conditions) -> None:
    sizes = "Sigma" not in type(pipeline).__name__

    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        both = {
            "resolution": torch.tensor([[256.0, 256.0]], dtype=torch.float64) if sizes else None,
            "aspect_ratio": torch.tensor([[1.0]], dtype=torch.float64) if sizes else None,
        }
        out: Tensor = network(
            noisy,
            encoder_hidden_states=given["text"],
            encoder_attention_mask=given["text_mask"],
            timestep=timesteps,
            added_cond_kwargs=both,
        ).sample.chunk(2, 1)[0]
        return out

    assert_training_loss(pipeline.transformer, conditions, {"beta_end": 0.02}, predict, (4, 8, 8))


def test_selections_are_the_layers_they_name(pipeline: Any) -> None:
    network = pipeline.transformer
    assert list(select_layers(network, "text_kv")) == [
        f"transformer_blocks.{block}.attn2.to_{what}" for block in range(2) for what in "kv"
    ]
    assert len(select_layers(network, "cross_attention")) == 2 * 4
    assert len(select_layers(network, "attention")) == 2 * 8
    assert len(select_layers(network, "feed_forward")) == 2 * 2
    linear = {name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    by_rows = {name for name in linear if "resolution_embedder" in name}
    if by_rows:
        with pytest.warns(UserWarning, match=r"leaves out 2 layers.*resolution_embedder.*two rows of one sample"):
            assert set(select_layers(network, "linear")) == linear - by_rows
    else:
        assert set(select_layers(network, "linear")) == linear


@pytest.mark.parametrize("name", ["text", "text_mask"])
def test_a_condition_that_is_missing_is_named(pipeline: Any, conditions: Conditions, name: str) -> None:
    given = {key: array for key, array in conditions.items() if key != name}
    noisy = torch.zeros(3, 4, 8, 8)
    with pytest.raises(InputError, match=f"{name!r}, which the samples don't hold"):
        family_of(pipeline.transformer).predict(
            pipeline.transformer, noisy, torch.zeros(3, dtype=torch.int64), ViewBatch(noisy, given)
        )
