from __future__ import annotations

import pytest
import torch
from flow_pipelines import ASKED, Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import aura_flow

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (aura_flow.CHANNELS, 8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(aura_flow.make(tmp_path_factory.mktemp("aura")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    for call in generated(model, guidance_scale=4.0, negative_prompt=["bad"] * 3):
        times = call.keywords["timestep"][ASKED] * 1000
        assert_predicts(model, call.arguments[0][ASKED], times, call.output[ASKED])


def test_states_of_padding_are_zero(model: Opened) -> None:
    text = model.encoded()["text"]
    for row, prompt in enumerate(("", "a b", "a cat on a mat")):
        tokens = len(model.pipeline.tokenizer(prompt).input_ids)
        assert (text[row].abs().sum(-1) > 0).tolist() == [place < tokens for place in range(text.shape[1])]


def test_loss_is_that_of_a_flow(tmp_path_factory: pytest.TempPathFactory) -> None:
    double = opened(aura_flow.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    # σ is shifted: 1.73 t / (1 + 0.73 t), here at t = 0.6.
    assert float(sigmas[1]) == pytest.approx(1.73 * 0.6 / (1 + 0.73 * 0.6), rel=1e-6)
    objective = FlowMatchingObjective(str(double.folder), density="uniform")
    found = objective(double.network, batch, numbers, noise).detach()
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        with torch.no_grad():
            output = double.network(
                (1 - sigma) * x0 + sigma * eps,
                encoder_hidden_states=batch.text[row : row + 1],
                timestep=(times[row : row + 1] / 1000).double(),
            ).sample
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean()), rel=1e-9)


def test_selections(model: Opened) -> None:
    network = model.network
    names = {f"joint_transformer_blocks.0.attn.add_{which}_proj" for which in "kv"}
    assert set(select_layers(network, "text_kv")) == names
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn." in name, network)
    assert set(select_layers(network, "feed_forward")) == chosen_of(lambda name: ".ff" in name, network)


def test_what_is_not_said_or_does_not_fit_is_refused(model: Opened) -> None:
    with pytest.raises(InputError, match="density"):
        objective_of(str(model.folder))
    times, good = torch.full((3,), 500.0), model.encoded()
    for shape, conditions, words in (
        (SHAPE, {}, "'text'"),
        (SHAPE, {"text": torch.zeros(3, 4, 7)}, "Text states are"),
        ((4, 8, 7), good, "patches of 2"),
        ((4, 8, 18), good, "larger than the 16 × 16"),
    ):
        latents = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, ViewBatch(latents, conditions))
