from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flow_pipelines import (
    HEIGHT,
    PROMPTS,
    WIDTH,
    Opened,
    assert_predicts,
    chosen_of,
    generated,
    opened,
    script_table,
    views,
)
from tiny_pipelines import cog_view_4

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.cog_view_4 import TOKENS
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = cog_view_4.SHAPE
SHIFT = 0.25 + 0.75 * math.sqrt(4 * 8 / 256)  # of 4 × 8 patches, as the pipeline computes it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(cog_view_4.make(tmp_path_factory.mktemp("cog_view")))


def sizes(model: Opened, count: int) -> Conditions:
    facts = model.family.facts(HEIGHT, WIDTH, (20, 40), (2, 3))
    return {name: torch.tensor([numbers] * count) for name, numbers in facts.items()}


def test_pipeline_is_the_oracle(model: Opened) -> None:
    """Beside a prompt that fills all tokens, which is what ours are padded beside."""
    longest = "a" * (TOKENS - 1)
    settings = {"prompt": [*PROMPTS, longest], "negative_prompt": ["bad"] * 4, "max_sequence_length": TOKENS}
    settings |= {"original_size": (20, 40), "crops_coords_top_left": (2, 3)}
    for call in generated(model, 2, guidance_scale=4.0, **settings):
        theirs = {name: part[:3] for name, part in call.keywords.items() if isinstance(part, torch.Tensor)}
        torch.testing.assert_close(theirs["encoder_hidden_states"], model.encoded()["text"], rtol=1e-5, atol=1e-5)
        time = theirs["timestep"].double() / 1000
        # The noise is that of the scheduler's shifted table, the time that of the table before it was shifted.
        sigmas = SHIFT * time / (1 + (SHIFT - 1) * time)
        index = model.pipeline.scheduler.timesteps.tolist().index(float(theirs["timestep"][0]))
        assert float(sigmas[0]) == pytest.approx(float(model.pipeline.scheduler.sigmas[index]), rel=1e-6)
        assert_predicts(model, theirs["hidden_states"], 1000 * sigmas, call.output[:3], sizes(model, 3))


def test_loss_is_that_of_a_flow_whose_time_is_not_shifted(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_control_cogview4.py, without its control picture: σ = μ / (μ + 1/t − 1) and the time t; f is ε − x₀."""
    double = opened(cog_view_4.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    batch = replace(batch, conditions=batch.conditions | sizes(double, 3))
    unshifted, times, numbers = script_table(double, [0, 400, 999])
    objective = FlowMatchingObjective(str(double.folder), density="uniform", shift=SHIFT)
    found = objective(double.network, batch, numbers, noise).detach()
    for row, time in enumerate(unshifted):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        sigma = SHIFT / (SHIFT + 1 / time - 1)
        output = double.network(
            hidden_states=(1 - sigma) * x0 + sigma * eps,
            encoder_hidden_states=batch.text[row : row + 1],
            timestep=times[row : row + 1],
            original_size=torch.tensor([[20.0, 40.0]]),
            target_size=torch.tensor([[float(HEIGHT), float(WIDTH)]]),
            crop_coords=torch.tensor([[2.0, 3.0]]),
        ).sample
        # The tables hold times up to 1000 in float32, of which frequencies up to 1 are taken.
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-4)


def test_density_is_asked_for(model: Opened) -> None:
    with pytest.raises(InputError, match="density"):
        objective_of(str(model.folder))


def test_states_do_not_depend_on_what_lies_beside_them(model: Opened) -> None:
    torch.testing.assert_close(model.encoded(["a b"])["text"][0], model.encoded()["text"][1], rtol=1e-5, atol=1e-5)


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn1." in name, network)
    assert set(select_layers(network, "feed_forward")) == chosen_of(lambda name: ".ff." in name, network)
    assert {"text_kv", "cross_attention"}.isdisjoint(model.family.selections)


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded() | sizes(model, 3))
    for change, words in (({"text": good.text}, "'original_size'"), ({"text": torch.zeros(3, 4, 7)}, "Text states")):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=change))
    for shape, words in (((5, 8, 8), "channels"), ((4, 8, 7), "patches of 2")):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, odd, times, replace(good, latents=odd))
