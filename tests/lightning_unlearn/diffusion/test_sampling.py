from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from toys import DIM, LATENT, TOKENS, tiny_unet

from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.fingerprints import generator_for

STEPS = 5


def texts(count: int) -> Tensor:
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return tiny_unet().double()


def made(network: nn.Module, seeds: list[int], text: Tensor | None = None, **settings: Any) -> Tensor:
    text = texts(len(seeds)) if text is None else text
    return generate(network, DenoisingObjective(settings or None), {"text": text}, LATENT, seeds, STEPS)


def test_a_seed_gives_one_picture_and_another_seed_another(network: nn.Module) -> None:
    text = texts(1).expand(3, -1, -1)
    first = made(network, [3, 4, 3], text)
    torch.testing.assert_close(first[0], first[2], rtol=1e-12, atol=1e-12)
    assert (first[0] - first[1]).abs().max() > 0.1
    assert torch.equal(made(network, [3, 4, 3], text), first)


def test_picture_does_not_depend_on_the_others_of_its_batch(network: nn.Module) -> None:
    text = texts(4)
    together = made(network, [0, 1, 2, 3], text)
    for row in range(4):
        torch.testing.assert_close(made(network, [row], text[row : row + 1])[0], together[row], rtol=1e-9, atol=1e-9)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(made(network, order, text[order]), together[order], rtol=1e-9, atol=1e-9)


def test_picture_depends_on_its_text(network: nn.Module) -> None:
    text = texts(2)
    assert not torch.allclose(made(network, [0], text[:1]), made(network, [0], text[1:]))


def test_random_state_mode_and_gradients_are_left_as_they_were(network: nn.Module) -> None:
    before = torch.random.get_rng_state()
    picture = made(network, [0])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not picture.requires_grad
    assert not network.training


def slow_ddim(network: nn.Module, text: Tensor, seed: int, alphas: Tensor, prediction: str, clip: bool) -> Tensor:
    """Song et al. (arXiv 2010.02502), Eq. 12 with σ = 0, over every (T / steps)-th timestep, from the formula."""
    stride = len(alphas) // STEPS
    x = torch.randn(LATENT, generator=generator_for("sampling", seed)).double()
    for timestep in reversed(range(0, len(alphas), stride)):
        alpha = alphas[timestep]
        alpha_next = alphas[timestep - stride] if timestep else torch.tensor(1.0, dtype=torch.float64)
        with torch.no_grad():
            output = network(x[None], torch.tensor([timestep]), encoder_hidden_states=text[None]).sample[0]
        if prediction == "epsilon":
            noise, image = output, (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
        elif prediction == "v_prediction":
            noise = alpha.sqrt() * output + (1 - alpha).sqrt() * x
            image = alpha.sqrt() * x - (1 - alpha).sqrt() * output
        else:
            noise, image = (x - alpha.sqrt() * output) / (1 - alpha).sqrt(), output
        if clip:
            image = image.clamp(-1, 1)
        x = alpha_next.sqrt() * image + (1 - alpha_next).sqrt() * noise
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_sampler_is_ddim_without_noise_of_its_own(network: nn.Module, prediction: str, clip: bool) -> None:
    text = texts(2)
    settings = {"num_train_timesteps": 20, "prediction_type": prediction, "clip_sample": clip}
    ours = made(network, [7, 8], text, **settings)
    alphas = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 20, dtype=torch.float64), 0)
    for row, seed in enumerate((7, 8)):
        theirs = slow_ddim(network, text[row], seed, alphas, prediction, clip)
        # diffusers keeps the schedule in float32.
        torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=1e-4)


def test_shipped_queries_can_be_made_again_from_their_json() -> None:
    sample = Path(str(files("lightning_unlearn.datamodules"))) / "sample"
    config = yaml.safe_load((Path(str(files("lightning_unlearn.configs"))) / "sample.yaml").read_text())
    from diffusers import UNet2DConditionModel

    network: nn.Module = UNet2DConditionModel(**config["model"]["init_args"]["network"]["init_args"])
    load_network(network, str(sample / "model.safetensors"))
    queries = [query for shard in list_shards(str(sample / "queries")) for query in read_samples(shard)]
    generated = [query for query in queries if query.metadata["kind"] == "generated"]
    assert len(generated) == 6
    facts = [query.metadata for query in generated]
    assert all(
        how_generated(DenoisingObjective(), fact["seed"], fact["steps"]).items() <= fact.items() for fact in facts
    )
    text = torch.stack([query.text[0] for query in generated])
    seeds = [fact["seed"] for fact in facts]
    shape = generated[0].latent.shape
    again = generate(network, DenoisingObjective(), {"text": text}, shape, seeds, facts[0]["steps"]).clamp(-1, 1)
    stored = torch.stack([query.latent for query in generated])
    # Stored in float16; forty steps carry on the rounding of another machine's kernels.
    torch.testing.assert_close(again, stored, rtol=0, atol=0.01)
