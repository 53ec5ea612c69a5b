from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import (
    HEIGHT,
    WIDTH,
    Opened,
    assert_needs_no_numbers,
    assert_predicts,
    chosen_of,
    generated,
    opened,
    script_table,
    views,
)
from tiny_pipelines import qwen_image

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = qwen_image.SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(qwen_image.make(tmp_path_factory.mktemp("qwen")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    for call in generated(model, 2, true_cfg_scale=4.0, negative_prompt=["bad"] * 3):
        theirs = call.keywords
        noisy, output = (
            model.pipeline._unpack_latents(tokens, HEIGHT, WIDTH, 2)[:, :, 0]
            for tokens in (theirs["hidden_states"], call.output)
        )
        assert_predicts(model, noisy, theirs["timestep"] * 1000, output)


def test_captions_have_one_length_whatever_lies_beside_them(model: Opened) -> None:
    together = model.encoded()
    for row, prompt in enumerate(("", "a b", "a cat on a mat")):
        alone = model.encoded([prompt])
        torch.testing.assert_close(alone["text"][0], together["text"][row], rtol=1e-5, atol=1e-5)
        assert torch.equal(alone["text_mask"][0], together["text_mask"][row])


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_dreambooth_lora_qwen_image.py: σ is unshifted where the shift depends on a picture's size; f is ε − x₀."""
    double = opened(qwen_image.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = objective_of(str(double.folder))
    assert objective.density() is None
    found = objective(double.network, batch, numbers, noise).detach()
    pipeline = double.pipeline
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        output = double.network(
            hidden_states=pipeline._pack_latents((1 - sigma) * x0 + sigma * eps, 1, *SHAPE),
            encoder_hidden_states=batch.text[row : row + 1],
            encoder_hidden_states_mask=batch.conditions["text_mask"][row : row + 1],
            timestep=times[row : row + 1] / 1000,
            img_shapes=[(1, SHAPE[1] // 2, SHAPE[2] // 2)],
            return_dict=False,
        )[0]
        output = pipeline._unpack_latents(output, HEIGHT, WIDTH, 2)[:, :, 0]
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-9)


def test_latents_are_those_of_a_video_of_one_frame(model: Opened) -> None:
    """As the training script normalises them: (z − mean) / std of each channel."""
    vae, pixels = model.pipeline.vae, torch.rand(2, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        mean, deviation = model.family.encode_pictures(vae, pixels)
        distribution = vae.encode(pixels[:, :, None]).latent_dist
    shift, spread = (torch.tensor(vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert mean.shape == (2, 4, 8, 16)
    torch.testing.assert_close(mean, ((distribution.mean - shift) / spread)[:, :, 0])
    torch.testing.assert_close(deviation, (distribution.std / spread)[:, :, 0])


def test_check_can_call_it_without_numbers(model: Opened) -> None:
    assert_needs_no_numbers(model, SHAPE)


def test_captions_that_fill_all_tokens_are_told(model: Opened) -> None:
    with pytest.warns(UserWarning, match="1 of 2 captions fill all 512 tokens"):
        model.encoded(["a", "a" * 572])


def test_selections(model: Opened) -> None:
    network = model.network
    streams = chosen_of(lambda name: name.endswith(("add_k_proj", "add_v_proj")), network)
    assert set(select_layers(network, "text_kv")) == streams
    assert len(streams) == 4
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn." in name, network)
    assert set(select_layers(network, "feed_forward")) == chosen_of(lambda name: "_mlp." in name, network)
    assert "cross_attention" not in model.family.selections


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded())
    mask = good.conditions["text_mask"]
    for change, words in (
        ({"text": good.text}, "'text_mask'"),
        ({"text": torch.zeros(3, 4, 7), "text_mask": mask}, "Text states are"),
    ):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=change))
    for shape, words in (((5, 8, 8), "takes 4 channels"), ((4, 8, 7), "patches of 2")):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, odd, times, replace(good, latents=odd))


@pytest.mark.parametrize("key", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_variants_that_take_more_are_refused(model: Opened, key: str) -> None:
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        network = QwenImageTransformer2DModel(num_layers=1, **{key: True})
    with pytest.raises(InputError, match=key):
        model.family.check(network)
