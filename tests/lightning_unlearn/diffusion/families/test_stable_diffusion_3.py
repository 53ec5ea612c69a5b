from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import ASKED, Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import stable_diffusion_3

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (stable_diffusion_3.CHANNELS, 8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(stable_diffusion_3.make(tmp_path_factory.mktemp("sd3")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    for call in generated(model, guidance_scale=4.0, negative_prompt=["bad"] * 3):
        theirs = call.keywords
        assert_predicts(model, theirs["hidden_states"][ASKED], theirs["timestep"][ASKED], call.output[ASKED])


@pytest.mark.parametrize("preconditioned", [True, False])
def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory, preconditioned: bool) -> None:
    """train_dreambooth_lora_sd3.py: the error of x_t − σ f as x₀, or that of f as ε − x₀."""
    double = opened(stable_diffusion_3.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = objective_of(str(double.folder))
    assert objective.settings()["preconditioned"] is True
    objective.preconditioned = preconditioned  # type: ignore[union-attr]
    found = objective(double.network, batch, numbers, noise)
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        noisy = (1 - sigma) * x0 + sigma * eps
        output = double.network(
            hidden_states=noisy,
            timestep=times[row : row + 1],
            encoder_hidden_states=batch.text[row : row + 1],
            pooled_projections=batch.conditions["pooled"][row : row + 1],
        ).sample
        error = output * (-sigma) + noisy - x0 if preconditioned else output - (eps - x0)
        assert float(found[row]) == pytest.approx(float(error.square().mean()), rel=1e-9)


def test_selections(model: Opened) -> None:
    network = model.network
    streams = chosen_of(lambda name: name.endswith(("add_k_proj", "add_v_proj")), network)
    assert set(select_layers(network, "text_kv")) == streams
    assert len(streams) == 4
    attention = chosen_of(lambda name: ".attn" in name and ".norm" not in name, network)
    assert set(select_layers(network, "attention")) == attention
    mlps = chosen_of(lambda name: ".ff." in name or ".ff_context." in name, network)
    assert set(select_layers(network, "feed_forward")) == mlps
    assert "cross_attention" not in model.family.selections


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded())
    for change, words in (
        ({"pooled": None}, "'pooled'"),
        ({"pooled": torch.zeros(3, 7)}, "'pooled' is"),
        ({"text": torch.zeros(3, 4, 7)}, "Text states are"),
    ):
        conditions = {name: array for name, array in {**good.conditions, **change}.items() if array is not None}
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=conditions))
    for shape, words in (((5, 8, 8), "channels"), ((4, 8, 7), "patches of 2"), ((4, 8, 18), "larger than the 16 × 16")):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, odd, times, replace(good, latents=odd))
