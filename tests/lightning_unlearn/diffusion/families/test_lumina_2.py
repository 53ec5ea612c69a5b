from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import lumina_2

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = lumina_2.SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(lumina_2.make(tmp_path_factory.mktemp("lumina")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    settings = {"height": lumina_2.HEIGHT, "width": lumina_2.WIDTH, "negative_prompt": ["bad"] * 3}
    for call in generated(model, 2, guidance_scale=4.0, **settings):
        theirs = call.keywords
        # The pipeline turns the direction's sign before its scheduler sees it.
        assert_predicts(model, theirs["hidden_states"], 1000 * (1 - theirs["timestep"]), -call.output)


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_dreambooth_lora_lumina2.py: s x₀ + (1 − s) ε at the time s, whose target is x₀ − ε."""
    double = opened(lumina_2.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    found = FlowMatchingObjective(str(double.folder), density="uniform")(double.network, batch, numbers, noise).detach()
    for row, share in enumerate(1 - sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        output = double.network(
            hidden_states=share * x0 + (1 - share) * eps,
            timestep=1 - times[row : row + 1] / 1000,
            encoder_hidden_states=batch.text[row : row + 1],
            encoder_attention_mask=batch.conditions["text_mask"][row : row + 1].long(),
        ).sample
        assert float(found[row]) == pytest.approx(float((output - (x0 - eps)).square().mean().detach()), rel=1e-9)


def test_density_is_asked_for(model: Opened) -> None:
    with pytest.raises(InputError, match="density"):
        objective_of(str(model.folder))


def test_captions_that_fill_all_tokens_are_told(model: Opened) -> None:
    with pytest.warns(UserWarning, match="1 of 2 captions fill all 256 tokens"):
        model.encoded(["a", "a" * 316])


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn." in name, network)
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
