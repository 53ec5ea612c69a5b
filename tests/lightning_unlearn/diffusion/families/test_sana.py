from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import (
    ASKED,
    PROMPTS,
    Opened,
    assert_needs_no_numbers,
    assert_predicts,
    chosen_of,
    generated,
    opened,
    script_table,
    views,
)
from tiny_pipelines import sana

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(sana.make(tmp_path_factory.mktemp("sana")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    settings = {"height": sana.HEIGHT, "width": sana.WIDTH, "use_resolution_binning": False}
    for call in generated(model, guidance_scale=4.0, negative_prompt=["bad"] * 3, **settings):
        assert_predicts(model, call.arguments[0][ASKED], call.keywords["timestep"][ASKED], call.output[ASKED])


def test_states_are_behind_the_instruction_without_it(model: Opened) -> None:
    """The first of the instruction, which is no part of a caption, and what is the caption's own; padding is masked."""
    made = model.encoded()
    assert made["text"].shape == (3, 300, 8)
    assert made["text_mask"].sum(1).diff().tolist() == [len(PROMPTS[1]), len(PROMPTS[2]) - len(PROMPTS[1])]
    bare, *_ = model.pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert not torch.allclose(bare, made["text"])
    latents, times = torch.zeros(3, *sana.SHAPE), torch.full((3,), 500.0)
    with torch.no_grad():
        masked, whole = (
            model.family.predict(model.network, latents, times, ViewBatch(latents, made | {"text_mask": mask}))
            for mask in (made["text_mask"], torch.ones_like(made["text_mask"]))
        )
    assert (masked - whole).abs().max() > 1e-5


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_dreambooth_lora_sana.py: timesteps are drawn alike, f is ε − x₀."""
    double = opened(sana.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, sana.SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = objective_of(str(double.folder))
    assert objective.density() is None
    found = objective(double.network, batch, numbers, noise).detach()
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        output = double.network(
            (1 - sigma) * x0 + sigma * eps,
            encoder_hidden_states=batch.text[row : row + 1],
            encoder_attention_mask=batch.conditions["text_mask"][row : row + 1],
            timestep=times[row : row + 1],
        ).sample
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-9)


def test_latents_are_the_code_of_the_autoencoder(model: Opened) -> None:
    pixels = torch.rand(2, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        mean, deviation = model.family.encode_pictures(model.pipeline.vae, pixels)
        decoded = model.pipeline.vae.decode(mean / 0.41407).sample
        expected = model.pipeline.vae(pixels).sample
    assert mean.shape == (2, 4, 4, 8)
    assert deviation is None
    torch.testing.assert_close(decoded, expected)


def test_check_can_call_it_without_numbers(model: Opened) -> None:
    assert_needs_no_numbers(model, sana.SHAPE)


def test_captions_that_fill_all_tokens_are_told(model: Opened) -> None:
    with pytest.warns(UserWarning, match="1 of 2 captions fill all 300 tokens"):
        model.encoded(["a", "a" * 360])


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "text_kv")) == {f"transformer_blocks.0.attn2.to_{which}" for which in "kv"}
    cross = chosen_of(lambda name: ".attn2." in name, network)
    assert set(select_layers(network, "cross_attention")) == cross
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn" in name, network)
    mlps = {f"transformer_blocks.0.ff.conv_{which}" for which in ("inverted", "point")}
    assert set(select_layers(network, "feed_forward")) == mlps


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *sana.SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded())
    for change, words in (({"text": good.text}, "'text_mask'"), ({"text": torch.zeros(3, 4, 7)}, "Text states are")):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=change))
    odd = torch.zeros(3, 5, 8, 8)
    with pytest.raises(InputError, match="channels"):
        model.family.predict(model.network, odd, times, replace(good, latents=odd))


def test_sprint_is_refused(model: Opened) -> None:
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        sprint = SanaTransformer2DModel(num_layers=1, guidance_embeds=True)
    with pytest.raises(InputError, match="Sana-Sprint"):
        model.family.check(sprint)


def test_depthwise_convolutions_are_left_out_of_all_and_refused_by_name(model: Opened) -> None:
    with pytest.warns(UserWarning, match=r"leaves out 1 layers .*ff\.conv_depth"):
        assert "transformer_blocks.0.ff.conv_point" in select_layers(model.network, "all")
    with pytest.raises(InputError, match="grouped"):
        select_layers(model.network, [r".*\.ff\.conv_depth"])
