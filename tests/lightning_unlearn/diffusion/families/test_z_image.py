from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import (
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
from tiny_pipelines import z_image

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = z_image.SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(z_image.make(tmp_path_factory.mktemp("z_image")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    for call in generated(model, guidance_scale=4.0, negative_prompt=["bad"] * 3):
        latents, times, _ = call.arguments
        asked = slice(len(PROMPTS))  # this pipeline has the prompts first
        noisy, output = (torch.stack(list(part[asked]))[:, :, 0] for part in (latents, call.output))
        assert_predicts(model, noisy, 1000 * (1 - times[asked]), -output)


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_dreambooth_lora_z_image.py: the time is 1 − σ, and the network's output with its sign turned is ε − x₀."""
    double = opened(z_image.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = objective_of(str(double.folder))
    assert objective.density() is None
    found = objective(double.network, batch, numbers, noise).detach()
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row], noise[row]
        states = batch.text[row, : int(batch.conditions["text_mask"][row].sum())]
        noisy = ((1 - sigma) * x0 + sigma * eps)[:, None]
        output = -double.network([noisy], (1000 - times[row : row + 1]) / 1000, [states]).sample[0][:, 0]
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-7)


def test_states_are_each_caption_s_own(model: Opened) -> None:
    made = model.encoded()
    alone, _ = model.pipeline.encode_prompt(["a b"], do_classifier_free_guidance=False)
    assert made["text_mask"].sum(1)[1] == len(alone[0])
    torch.testing.assert_close(made["text"][1, : len(alone[0])], alone[0], rtol=1e-5, atol=1e-5)


def test_check_can_call_it_without_numbers(model: Opened) -> None:
    assert_needs_no_numbers(model, SHAPE)


def test_captions_that_fill_all_tokens_are_told(model: Opened) -> None:
    with pytest.warns(UserWarning, match="captions fill all 512 tokens"):
        model.encoded(["a", "a" * 572])


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attention." in name, network)
    mlps = chosen_of(lambda name: ".feed_forward." in name, network)
    assert set(select_layers(network, "feed_forward")) == mlps
    assert len(mlps) == 9
    assert {"text_kv", "cross_attention"}.isdisjoint(model.family.selections)


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded())
    for change, words in (({"text": good.text}, "'text_mask'"), ({"text": torch.zeros(3, 4, 7)}, "Text states are")):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=change))
    for shape, words in (((5, 8, 8), "takes 4 channels"), ((4, 8, 7), "patches of 2")):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, odd, times, replace(good, latents=odd))


def test_variant_that_takes_pictures_is_refused(model: Opened) -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        network = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1, siglip_feat_dim=8)
    with pytest.raises(InputError, match="siglip_feat_dim"):
        model.family.check(network)


def test_layers_that_see_all_pictures_in_one_row_are_left_out(model: Opened) -> None:
    with pytest.warns(UserWarning, match=r"leaves out 2 layers .*all_x_embedder\.2-1, cap_embedder\.1.* enter as rows"):
        chosen = select_layers(model.network, "all")
    rest = chosen_of(lambda name: not name.startswith(("all_x_embedder", "cap_embedder")), model.network)
    assert set(chosen) == rest
