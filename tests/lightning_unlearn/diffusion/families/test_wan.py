from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import HEIGHT, PROMPTS, WIDTH, Opened, assert_predicts, chosen_of, generated, opened, views
from tiny_pipelines import wan

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = wan.SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(wan.make(tmp_path_factory.mktemp("wan")))


def test_pipeline_is_the_oracle(model: Opened) -> None:
    settings = {"num_frames": wan.FRAMES, "negative_prompt": ["bad"] * 3, "guidance_scale": 4.0}
    for call in generated(model, 2, **settings):
        theirs = call.keywords
        assert theirs["hidden_states"].shape == (3, *SHAPE)
        assert_predicts(model, theirs["hidden_states"], theirs["timestep"], call.output)


def test_padding_is_zero(model: Opened) -> None:
    text = model.encoded()["text"]
    lengths = [len(model.pipeline.tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert [int(states.any(1).sum()) for states in text] == lengths
    assert len(set(lengths)) == 3


def test_loss_is_that_of_a_flow(tmp_path_factory: pytest.TempPathFactory) -> None:
    double = opened(wan.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    numbers = torch.tensor([0, 599, 999])
    found = FlowMatchingObjective(str(double.folder), density="uniform")(double.network, batch, numbers, noise).detach()
    for row, number in enumerate(numbers.tolist()):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        time = (number + 1) / 1000
        sigma = 3.0 * time / (1 + (3.0 - 1) * time)  # the solver's flow_shift is 3
        output = double.network(
            hidden_states=(1 - sigma) * x0 + sigma * eps,
            timestep=torch.tensor([1000 * sigma]),
            encoder_hidden_states=batch.text[row : row + 1],
        ).sample
        # The scheduler's table is float32.
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-4)


def test_density_is_asked_for(model: Opened) -> None:
    with pytest.raises(InputError, match="density"):
        objective_of(str(model.folder))


def test_latents_of_videos_and_of_pictures(model: Opened) -> None:
    vae, videos = model.pipeline.vae, torch.rand(2, 3, wan.FRAMES, HEIGHT, WIDTH) * 2 - 1
    shift, spread = (torch.tensor(vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        mean, deviation = model.family.encode_pictures(vae, videos)
        distribution = vae.encode(videos).latent_dist
        of_picture, _ = model.family.encode_pictures(vae, videos[:, :, 0])
    assert mean.shape == (2, *SHAPE)
    torch.testing.assert_close(mean, (distribution.mean - shift) / spread)
    torch.testing.assert_close(deviation, distribution.std / spread)
    assert of_picture.shape == (2, 4, 1, 8, 16)


def test_selections(model: Opened) -> None:
    network = model.network
    assert set(select_layers(network, "text_kv")) == {f"blocks.0.attn2.to_{which}" for which in "kv"}
    cross = chosen_of(lambda name: ".attn2." in name, network)
    assert set(select_layers(network, "cross_attention")) == cross
    assert set(select_layers(network, "attention")) == chosen_of(lambda name: ".attn" in name, network)
    assert set(select_layers(network, "feed_forward")) == chosen_of(lambda name: ".ffn." in name, network)


def test_what_does_not_fit_is_refused(model: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, model.encoded())
    for change, words in (({}, "'text'"), ({"text": torch.zeros(3, 4, 7)}, "Text states are")):
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, latents, times, replace(good, conditions=change))
    for shape, words in (
        ((5, 3, 8, 8), "takes 4 channels"),
        ((4, 3, 8, 7), "patches of 2"),
        ((4, 8, 8), r"\(C, F, H, W\)"),
    ):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            model.family.predict(model.network, odd, times, replace(good, latents=odd))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"image_dim": 8, "added_kv_proj_dim": 8}, "a picture from which"), ({"in_channels": 36}, "takes 36 channels")],
)
def test_networks_that_take_pictures_are_refused(model: Opened, settings: dict[str, int], words: str) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel(num_layers=1, **settings)
    with pytest.raises(InputError, match=words):
        model.family.check(network)


def test_three_dimensional_convolutions_are_left_out_of_all(model: Opened) -> None:
    with pytest.warns(UserWarning, match=r"leaves out 1 layers .*patch_embedding"):
        assert set(select_layers(model.network, "all")) == chosen_of(lambda name: True, model.network)
