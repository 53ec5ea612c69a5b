from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from flow_pipelines import HEIGHT, WIDTH, Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import flux

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (flux.CHANNELS, 8, 16)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(flux.make(tmp_path_factory.mktemp("dev")))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(flux.make(tmp_path_factory.mktemp("schnell"), dev=False))


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_pipeline_is_the_oracle(request: pytest.FixtureRequest, name: str) -> None:
    model: Opened = request.getfixturevalue(name)
    for call in generated(model, guidance_scale=2.5):
        theirs = call.keywords
        noisy, output = (
            model.pipeline._unpack_latents(tokens, HEIGHT, WIDTH, model.pipeline.vae_scale_factor)
            for tokens in (theirs["hidden_states"], call.output)
        )
        further = {"guidance": torch.full((3, 1), 2.5)} if name == "dev" else {}
        assert_predicts(model, noisy, theirs["timestep"] * 1000, output, further)


def test_guidance_reaches_the_network(dev: Opened) -> None:
    batch, noise = views(dev, SHAPE)
    batch = batch.to(torch.device("cpu"), torch.float32)
    losses = [
        FlowMatchingObjective(str(dev.folder), guidance=guidance)(
            dev.network, batch, torch.tensor([1, 500, 999]), noise.float()
        )
        for guidance in (1.0, 3.5)
    ]
    assert (losses[0] - losses[1]).abs().max() > 1e-5


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    """train_dreambooth_lora_flux.py: σ is unshifted where the shift depends on a picture's size; f is ε − x₀."""
    double = opened(flux.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.6, 0.001]).double(), rtol=1e-6, atol=0)
    objective = FlowMatchingObjective(str(double.folder), guidance=3.5)
    assert objective.density() is None
    found = objective(double.network, batch, numbers, noise).detach()
    pipeline = double.pipeline
    for row, sigma in enumerate(sigmas):
        x0, eps = batch.latents[row : row + 1], noise[row : row + 1]
        noisy = (1 - sigma) * x0 + sigma * eps
        packed = pipeline._pack_latents(noisy, 1, *SHAPE)
        output = double.network(
            hidden_states=packed,
            timestep=times[row : row + 1] / 1000,
            guidance=torch.tensor([3.5]),
            pooled_projections=batch.conditions["pooled"][row : row + 1],
            encoder_hidden_states=batch.text[row : row + 1],
            txt_ids=torch.zeros(batch.text.shape[1], 3),
            img_ids=pipeline._prepare_latent_image_ids(1, SHAPE[1] // 2, SHAPE[2] // 2, "cpu", torch.float64),
        ).sample
        output = pipeline._unpack_latents(output, HEIGHT, WIDTH, pipeline.vae_scale_factor)
        assert float(found[row]) == pytest.approx(float((output - (eps - x0)).square().mean().detach()), rel=1e-9)


def test_selections(dev: Opened) -> None:
    network = dev.network
    streams = chosen_of(lambda name: name.endswith(("add_k_proj", "add_v_proj")), network)
    assert set(select_layers(network, "text_kv")) == streams
    assert len(streams) == 2
    attention = chosen_of(lambda name: ".attn." in name, network)
    assert set(select_layers(network, "attention")) == attention
    mlps = chosen_of(lambda name: ".ff" in name or name.endswith("proj_mlp"), network)
    assert set(select_layers(network, "feed_forward")) == mlps


def test_guidance_must_be_said_where_there_is_one_and_only_there(dev: Opened, schnell: Opened) -> None:
    with pytest.raises(InputError, match="guidance-distilled"):
        objective_of(str(dev.folder)).check_network(dev.network)
    FlowMatchingObjective(str(dev.folder), guidance=1.0).check_network(dev.network)
    objective_of(str(schnell.folder)).check_network(schnell.network)
    with pytest.raises(InputError, match="takes no guidance"):
        FlowMatchingObjective(str(schnell.folder), guidance=1.0).check_network(schnell.network)
    latents = torch.zeros(3, *SHAPE)
    with pytest.raises(InputError, match="given no guidance"):
        dev.family.predict(dev.network, latents, torch.full((3,), 500.0), ViewBatch(latents, dev.encoded()))


def test_what_does_not_fit_is_refused(schnell: Opened) -> None:
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    good = ViewBatch(latents, schnell.encoded())
    without = {"text": good.text}
    with pytest.raises(InputError, match="'pooled'"):
        schnell.family.predict(schnell.network, latents, times, replace(good, conditions=without))
    for shape, words in (((5, 8, 8), "takes 4 channels"), ((4, 8, 7), "patches of 2")):
        odd = torch.zeros(3, *shape)
        with pytest.raises(InputError, match=words):
            schnell.family.predict(schnell.network, odd, times, replace(good, latents=odd))
