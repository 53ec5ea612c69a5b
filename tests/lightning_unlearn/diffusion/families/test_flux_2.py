from __future__ import annotations

import pytest
import torch
from flow_pipelines import Opened, assert_predicts, chosen_of, generated, opened, script_table, views
from tiny_pipelines import flux_2
from torch import Tensor

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

SHAPE = (4 * flux_2.CHANNELS, 4, 8)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(flux_2.make(tmp_path_factory.mktemp("dev")))


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(flux_2.make(tmp_path_factory.mktemp("klein"), dev=False))


@pytest.mark.parametrize("name", ["dev", "klein"])
def test_pipeline_is_the_oracle(request: pytest.FixtureRequest, name: str) -> None:
    model: Opened = request.getfixturevalue(name)
    for call in generated(model, 1 if name == "dev" else 2, guidance_scale=2.5):
        theirs = call.keywords
        noisy, output = (
            model.pipeline._unpack_latents_with_ids(tokens, theirs["img_ids"])
            for tokens in (theirs["hidden_states"], call.output)
        )
        further = {"guidance": torch.full((3, 1), 2.5)} if name == "dev" else {}
        assert_predicts(model, noisy, theirs["timestep"] * 1000, output, further)


def test_pictures_become_the_pipeline_s_latents(dev: Opened) -> None:
    pixels = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, deviation = dev.family.encode_pictures(dev.pipeline.vae, pixels)
        torch.testing.assert_close(mean, dev.pipeline._encode_vae_image(pixels, None), rtol=1e-5, atol=1e-5)
        found = dev.pipeline.vae.encode(pixels).latent_dist
    assert mean.shape == (2, *SHAPE)
    assert deviation is not None
    # One deviation more is one more after patching and normalising.
    further = dev.pipeline._patchify_latents(found.mean + found.std)
    bn = dev.pipeline.vae.bn
    normal = (bn.running_var + dev.pipeline.vae.config.batch_norm_eps).sqrt()
    expected = (further - bn.running_mean[:, None, None]) / normal[:, None, None]
    torch.testing.assert_close(mean + deviation, expected, rtol=1e-5, atol=1e-5)


def script_loss(model: Opened, batch: ViewBatch, noise: Tensor, row: int, sigma: Tensor, time: Tensor) -> float:
    """train_dreambooth_lora_flux2.py for one view."""
    pipeline, x0, eps = model.pipeline, batch.latents[row : row + 1], noise[row : row + 1]
    noisy, text = (1 - sigma) * x0 + sigma * eps, batch.text[row : row + 1]
    places = pipeline._prepare_latent_ids(noisy)
    with torch.no_grad():
        output = model.network(
            hidden_states=pipeline._pack_latents(noisy),
            timestep=time[None] / 1000,
            guidance=torch.tensor([3.5]),
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text),
            img_ids=places,
            return_dict=False,
        )[0]
    output = pipeline._unpack_latents_with_ids(output, places)
    return float((output - (eps - x0)).square().mean())


def test_loss_is_the_training_script_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    double = opened(flux_2.make(tmp_path_factory.mktemp("double")))
    double.network.double()
    batch, noise = views(double, SHAPE)
    sigmas, times, numbers = script_table(double, [0, 400, 999])
    objective = FlowMatchingObjective(str(double.folder), guidance=3.5)
    found = objective(double.network, batch, numbers, noise).detach()
    for row, (sigma, time) in enumerate(zip(sigmas, times, strict=True)):
        assert float(found[row]) == pytest.approx(script_loss(double, batch, noise, row, sigma, time), rel=1e-9)


def test_selections(dev: Opened) -> None:
    network = dev.network
    assert set(select_layers(network, "text_kv")) == {f"transformer_blocks.0.attn.add_{which}_proj" for which in "kv"}
    blocks = chosen_of(lambda name: name.startswith("transformer_blocks"), network)
    assert set(select_layers(network, "attention")) == {name for name in blocks if ".attn." in name}
    assert set(select_layers(network, "feed_forward")) == {name for name in blocks if ".ff" in name}
    assert set(select_layers(network, "attention")) | set(select_layers(network, "feed_forward")) == blocks


def test_what_is_not_said_or_does_not_fit_is_refused(dev: Opened, klein: Opened) -> None:
    with pytest.raises(InputError, match="guidance-distilled"):
        objective_of(str(dev.folder)).check_network(dev.network)
    objective_of(str(klein.folder)).check_network(klein.network)
    latents, times = torch.zeros(3, *SHAPE), torch.full((3,), 500.0)
    with pytest.raises(InputError, match="given no guidance"):
        dev.family.predict(dev.network, latents, times, ViewBatch(latents, dev.encoded()))
    with pytest.raises(InputError, match="Text states are"):
        klein.family.predict(klein.network, latents, times, ViewBatch(latents, {"text": torch.zeros(3, 4, 7)}))
    odd = torch.zeros(3, 4, 8, 8)
    with pytest.raises(InputError, match="takes 16 channels"):
        klein.family.predict(klein.network, odd, times, ViewBatch(odd, klein.encoded()))
