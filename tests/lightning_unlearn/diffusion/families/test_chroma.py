from __future__ import annotations

import pytest
import torch
from flow_pipelines import HEIGHT, WIDTH, Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import chroma

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (chroma.CHANNELS, 8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(chroma.make(tmp_path_factory.mktemp("chroma")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    for call in generated(model, 2, guidance_scale=4.0, negative_prompt=["bad"] * 3):
        theirs = call.keywords
        noisy, output = (
            model.pipeline._unpack_latents(tokens, HEIGHT, WIDTH, model.pipeline.vae_scale_factor)
            for tokens in (theirs["hidden_states"], call.output)
        )
        assert_predicts(model, noisy, theirs["timestep"] * 1000, output)


def test_mask_keeps_the_caption_and_one_of_padding(model: Opened) -> None:
    mask = model.encoded()["text_mask"]
    tokens = [len(model.pipeline.tokenizer(prompt).input_ids) for prompt in ("", "a b", "a cat on a mat")]
    assert mask.sum(1).tolist() == [count + 1 for count in tokens]
    # And it matters.
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    times, conditions = torch.full((3,), 500.0), model.encoded()
    with torch.no_grad():
        masked, whole = (
            model.family.predict(model.network, latents, times, ViewBatch(latents, {**conditions, "text_mask": one}))
            for one in (mask, torch.ones_like(mask))
        )
    assert (masked - whole).abs().max() > 1e-4


def test_loss_is_that_of_a_flow(tmp_path_factory: pytest.TempPathFactory) -> None:
    double = opened(chroma.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = FlowMatchingObjective(str(double.folder), density="uniform")
    found = objective(double.network, batch, numbers, noise).detach()
    pipeline = double.pipeline
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        packed = pipeline._pack_latents((1 - sigma) * x0 + sigma * eps, 1, *SHAPE)
        mask = batch.conditions["text_mask"][row : row + 1]
        with torch.no_grad():
            output = double.network(
                hidden_states=packed,
                timestep=times[row : row + 1] / 1000,
                encoder_hidden_states=batch.text[row : row + 1],
                attention_mask=pipeline._prepare_attention_mask(1, packed.shape[1], torch.float64, mask),
                txt_ids=torch.zeros(batch.text.shape[1], 3),
                img_ids=pipeline._prepare_latent_image_ids(1, SHAPE[1] // 2, SHAPE[2] // 2, "cpu", torch.float64),
            ).sample
        output = pipeline._unpack_latents(output, HEIGHT, WIDTH, pipeline.vae_scale_factor)
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean()), rel=1e-9)


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "text_kv")) == {f"transformer_blocks.0.attn.add_{which}_proj" for which in "kv"}
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn." in name, network)
    mlps = chosen_of(lambda name: ".ff" in name or name.endswith("proj_mlp"), network)
    assert set(select_layers(network, "feed_forward")) == mlps


def test_what_is_not_said_or_missing_is_refused(model: Opened) -> None:
    with pytest.raises(InputError, match="density"):
        objective_of(str(model.folder))
    latents, conditions = torch.zeros(3, *SHAPE), model.encoded()
    for change, words in (
        ({"text": conditions["text"]}, "'text_mask'"),
        ({**conditions, "text": torch.zeros(3, 4, 7)}, "Text states are"),
    ):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, torch.full((3,), 500.0), ViewBatch(latents, change))
