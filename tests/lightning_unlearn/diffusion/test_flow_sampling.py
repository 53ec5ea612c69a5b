"""Pictures from flows: as the pipelines make them, and made again by what needs them again."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_toys import subject
from flow_pipelines import HEIGHT, PROMPTS, WIDTH, Opened, generated, opened
from tiny_pipelines import cog_view_4, flux, flux_2, stable_diffusion_3
from torch import Tensor

from lightning_unlearn.baselines.journey_trak import JourneyTRAK
from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated, trajectory
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.measuring import Measuring
from lightning_unlearn.fingerprints import generator_for

SHAPE, STEPS, SEEDS = (4, 8, 16), 5, [3, 4, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return opened(stable_diffusion_3.make(tmp_path_factory.mktemp("sd3")))


def starting_noise() -> Tensor:
    return torch.stack([torch.randn(SHAPE, generator=generator_for("sampling", seed)) for seed in SEEDS])


def rows(conditions: Conditions, chosen: list[int]) -> Conditions:
    return {name: array[chosen] for name, array in conditions.items()}


def test_pipeline_makes_the_same(model: Opened) -> None:
    objective = FlowMatchingObjective(str(model.folder))
    ours = generate(model.network, objective, model.encoded(), SHAPE, SEEDS, STEPS)
    theirs = model.pipeline(
        PROMPTS,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=starting_noise(),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_steps_fall_and_their_predictions_end_at_the_picture(model: Opened) -> None:
    objective = FlowMatchingObjective(str(model.folder))
    steps = list(trajectory(model.network, objective, model.encoded(), SHAPE, SEEDS, STEPS))
    numbers = [step.timestep for step in steps]
    assert numbers[0] == 999
    assert all(before > after for before, after in pairwise(numbers))
    # The last step leads to σ = 0, where the picture is what was predicted.
    torch.testing.assert_close(steps[-1].predicted, steps[-1].latents, rtol=1e-5, atol=1e-5)
    assert not steps[-1].latents.requires_grad


def test_picture_depends_on_its_own_seed_and_conditions_alone(model: Opened) -> None:
    objective, conditions = FlowMatchingObjective(str(model.folder)), model.encoded()
    together = generate(model.network, objective, conditions, SHAPE, SEEDS, STEPS)
    for row, seed in enumerate(SEEDS):
        alone = generate(model.network, objective, rows(conditions, [row]), SHAPE, [seed], STEPS)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)
    pooled = {**conditions, "pooled": conditions["pooled"].flip(0)}
    assert not torch.allclose(generate(model.network, objective, pooled, SHAPE, SEEDS, STEPS), together, atol=1e-4)


def test_shift_for_a_picture_s_size_and_guidance(tmp_path: Path) -> None:
    """FLUX.1 dev: exp(mu) / (exp(mu) + 1 / σ − 1), mu on the line through the scheduler's two sizes."""
    dev = opened(flux.make(tmp_path))
    dev.network.double()
    objective, conditions = FlowMatchingObjective(str(dev.folder), guidance=3.0), dev.encoded()
    ours = generate(dev.network, objective, conditions, SHAPE, SEEDS, STEPS)
    config = dev.pipeline.scheduler.config
    tokens = SHAPE[1] * SHAPE[2] / 4
    share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    shift = torch.tensor(config.base_shift + share * (config.max_shift - config.base_shift)).double().exp()
    even = torch.linspace(1, 0.001, STEPS, dtype=torch.float64)
    sigmas = [*(shift / (shift + 1 / even - 1)), torch.tensor(0.0)]
    x = starting_noise().double()
    for sigma, following in pairwise(sigmas):
        times = (sigma * 1000).float().expand(len(SEEDS))
        with torch.no_grad():
            output = dev.network(
                hidden_states=dev.pipeline._pack_latents(x, len(SEEDS), *SHAPE),
                timestep=times / 1000,
                guidance=torch.full((len(SEEDS),), 3.0),
                pooled_projections=conditions["pooled"].double(),
                encoder_hidden_states=conditions["text"].double(),
                txt_ids=torch.zeros(conditions["text"].shape[1], 3),
                img_ids=dev.pipeline._prepare_latent_image_ids(1, SHAPE[1] // 2, SHAPE[2] // 2, "cpu", torch.float64),
            ).sample
        x = x + (following - sigma) * dev.pipeline._unpack_latents(output, HEIGHT, WIDTH, dev.pipeline.vae_scale_factor)
    # diffusers keeps sigmas in float32.
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    other = generate(dev.network, objective, {**conditions, "guidance": torch.ones(3, 1)}, SHAPE, SEEDS, STEPS)
    assert (other - ours).abs().max() > 1e-5


def own_queries(model: Opened, objective: FlowMatchingObjective) -> list[Sample]:
    """Queries that the network itself made."""
    conditions = model.encoded()
    made = generate(model.network, objective, conditions, SHAPE, SEEDS, STEPS)
    return [
        Sample(
            f"own-{seed}",
            latent.clone(),
            rows(conditions, [row]),
            {"captions": [PROMPTS[row]], **how_generated(objective, seed, STEPS)},
        )
        for row, (seed, latent) in enumerate(zip(SEEDS, made, strict=True))
    ]


def by_another_sampler(queries: list[Sample]) -> list[Sample]:
    return [replace(query, metadata={**query.metadata, "scheduler": "DDIMScheduler"}) for query in queries]


def test_queries_are_made_again(model: Opened) -> None:
    objective = FlowMatchingObjective(str(model.folder))
    queries = own_queries(model, objective)
    outcomes = Measuring(queries, draws=10)(model.network, objective)
    assert all(outcome.mse is not None and outcome.mse < 1e-8 for outcome in outcomes.values())
    # Those of another sampler are not.
    others = [
        Sample(one.key, one.latent, one.conditions, {**one.metadata, "scheduler": "DDIMScheduler"}) for one in queries
    ]
    assert all(outcome.mse is None for outcome in Measuring(others, draws=10)(model.network, objective).values())


def test_journey_of_a_flow(model: Opened) -> None:
    objective = FlowMatchingObjective(str(model.folder))
    network = stable_diffusion_3.transformer()
    queries = own_queries(model, objective)
    toy = subject(queries, queries[:2], Views(2), network=network, objective=objective, parameters="text_kv")
    scores = JourneyTRAK().scores(toy)
    assert scores.shape == (3, 2)
    assert bool(scores.isfinite().all())
    wrong = [
        Sample(one.key, one.latent, one.conditions, {**one.metadata, "scheduler": "DDIMScheduler"}) for one in queries
    ]
    with pytest.raises(InputError, match="scheduler 'FlowMatchEulerDiscreteScheduler'"):
        JourneyTRAK().scores(
            subject(queries, wrong, Views(2), network=network, objective=objective, parameters="text_kv")
        )


@pytest.mark.parametrize("kind", [flux, flux_2, cog_view_4], ids=["flux", "flux_2", "cog_view_4"])
def test_shift_for_a_size_is_what_the_pipeline_hands_its_scheduler(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = opened(kind.make(tmp_path))
    scheduler, seen = made.pipeline.scheduler, []
    real = scheduler.set_timesteps

    @wraps(real)
    def noted(*arguments: Any, **keywords: Any) -> Any:
        seen.append((len(keywords["sigmas"]), keywords["mu"]))
        return real(*arguments, **keywords)

    monkeypatch.setattr(scheduler, "set_timesteps", noted)
    generated(made, 2 if kind is cog_view_4 else 1)  # with and without the prompt
    ((steps, shift),) = seen
    scale = made.pipeline.vae_scale_factor
    side = 2 * scale if kind is flux_2 else scale  # pixels a latent, as the network is given it
    latents = torch.zeros(1, 4, HEIGHT // side, WIDTH // side)
    assert made.family.size_shift(made.network, scheduler.config, latents, steps) == pytest.approx(shift, rel=1e-6)
