from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import ASKED, HEIGHT, PROMPTS, WIDTH, Opened, assert_predicts, chosen_of, generated, opened
from tiny_pipelines import stable_diffusion_xl

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (stable_diffusion_xl.CHANNELS, 8, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(stable_diffusion_xl.make(tmp_path_factory.mktemp("sdxl")))


def sizes(model: Opened, original: tuple[int, int], crop: tuple[int, int]) -> Conditions:
    facts = model.family.facts(HEIGHT, WIDTH, original, crop)
    return {name: torch.tensor([numbers] * len(PROMPTS)) for name, numbers in facts.items()}


def test_pipeline_is_the_oracle(model: Opened) -> None:
    asked = {"original_size": (40, 50), "crops_coords_top_left": (3, 5), "guidance_scale": 4.0}
    for call in generated(model, negative_prompt=["bad"] * 3, **asked):
        noisy, time = call.arguments
        times = time.expand(len(noisy))[ASKED]
        assert_predicts(model, noisy[ASKED], times, call.output[ASKED], sizes(model, (40, 50), (3, 5)))


def test_sizes_matter(model: Opened) -> None:
    latents, times = torch.ones(3, *SHAPE), torch.full((3,), 500)
    predictions = [
        model.family.predict(model.network, latents, times, ViewBatch(latents, model.encoded() | sizes(model, *given)))
        for given in (((16, 32), (0, 0)), ((64, 32), (0, 0)), ((16, 32), (8, 0)))
    ]
    for other in predictions[1:]:
        assert (predictions[0] - other).abs().max() > 1e-4


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_text_to_image_sdxl.py: the error of the noise at √ᾱ x₀ + √(1 − ᾱ) ε, of the scaled linear schedule."""
    double = opened(stable_diffusion_xl.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, *SHAPE, generator=generator, dtype=torch.float64)
    given = {name: array.double() for name, array in double.encoded().items()} | sizes(double, (16, 32), (0, 0))
    numbers = torch.tensor([3, 500, 999])
    found = objective_of(str(double.folder))(double.network, ViewBatch(latents, given), numbers, noise)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    for row, number in enumerate(numbers.tolist()):
        one = slice(row, row + 1)
        noisy = alphas[number] ** 0.5 * latents[one] + (1 - alphas[number]) ** 0.5 * noise[one]
        ids = torch.tensor([[16, 32, 0, 0, HEIGHT, WIDTH]], dtype=torch.float64)
        output = double.network(
            noisy,
            number,
            encoder_hidden_states=given["text"][one],
            added_cond_kwargs={"text_embeds": given["pooled"][one], "time_ids": ids},
        ).sample
        # The scheduler keeps ᾱ in float32.
        assert float(found[row]) == pytest.approx(float((output - noise[one]).square().mean()), rel=1e-5)


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "text_kv")) == chosen_of(
        lambda name: ".attn2.to_k" in name or ".attn2.to_v" in name, network
    )
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn" in name, network)
    assert set(select_layers(network, "feed_forward")) == chosen_of(lambda name: ".ff." in name, network)


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500)
    good = ViewBatch(latents, model.encoded() | sizes(model, (16, 32), (0, 0)))
    for change, words in (
        ({"pooled": None}, "'pooled'"),
        ({"original_size": None}, "'original_size'"),
        ({"target_size": torch.zeros(2, 2)}, "'target_size' is"),
        ({"text": torch.zeros(3, 4, 7)}, "Text states are"),
        ({"pooled": torch.zeros(3, 99)}, "'pooled' has 99 numbers.* beside three sizes"),
        ({"crop_top_left": torch.zeros(3, 3)}, "'crop_top_left' is"),
    ):
        conditions = {name: array for name, array in {**good.conditions, **change}.items() if array is not None}
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=conditions))


def test_facts_of_a_picture(model: Opened) -> None:
    assert model.family.facts(16, 32, (100, 200), (1, 2)) == {
        "original_size": [100, 200],
        "crop_top_left": [1, 2],
        "target_size": [16, 32],
    }
