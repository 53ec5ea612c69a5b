from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import denoising_loss, min_snr_weight
from torch import Tensor, nn
from toys import DIM, LATENT, TOKENS, ToyDenoiser, tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.objective import DenoisingObjective, load_scheduler
from lightning_unlearn.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def views(count: int, dtype: torch.dtype = torch.float64) -> tuple[ViewBatch, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, count, *LATENT, generator=generator, dtype=dtype)
    text = torch.randn(count, TOKENS, DIM, generator=generator, dtype=dtype)
    return ViewBatch(latents, {"text": text}), torch.randint(0, 1000, (count,), generator=generator), noise


def reference_losses(
    network: nn.Module, objective: DenoisingObjective, batch: ViewBatch, timesteps: Tensor, noise: Tensor
) -> Tensor:
    alphas_cumprod = objective.scheduler.alphas_cumprod.double()

    def loss(row: int) -> Tensor:
        def predict(noisy: Tensor) -> Tensor:
            return network(noisy[None], timesteps[row], encoder_hidden_states=batch.text[row : row + 1]).sample[0]

        alpha_bar = float(alphas_cumprod[timesteps[row]])
        return denoising_loss(
            predict, batch.latents[row], noise[row], alpha_bar, objective.prediction_type, objective.snr_gamma
        )

    return torch.stack([loss(row) for row in range(len(timesteps))])


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_of_each_view_is_the_formula(prediction_type: Any, snr_gamma: float | None) -> None:
    network = tiny_unet().double()
    objective = DenoisingObjective({"beta_schedule": "scaled_linear"}, prediction_type, snr_gamma)
    batch, timesteps, noise = views(4)
    losses = objective(network, batch, timesteps, noise)
    expected = reference_losses(network, objective, batch, timesteps, noise)
    assert losses.shape == (4,)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_the_papers_on_both_sides_of_gamma(prediction_type: Any) -> None:
    weighted = DenoisingObjective({}, prediction_type, snr_gamma=5.0)
    plain = DenoisingObjective({}, prediction_type)
    timesteps = torch.arange(0, 1000, 111)
    alphas = plain.scheduler.alphas_cumprod.double()[timesteps]
    snr = alphas / (1 - alphas)
    assert (snr > 5).any()
    assert (snr < 5).any()
    batch, _, noise = views(len(timesteps))
    network = tiny_unet().double()
    expected = torch.tensor([min_snr_weight(float(alpha), 5.0, prediction_type) for alpha in alphas]).double()
    torch.testing.assert_close(
        weighted(network, batch, timesteps, noise),
        plain(network, batch, timesteps, noise) * expected,
        rtol=1e-6,
        atol=0,
    )


def test_zero_terminal_snr_gives_a_finite_weight() -> None:
    schedule = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
    batch, _, noise = views(2)
    timesteps = torch.tensor([999, 999])
    network = tiny_unet().double()
    weighted = DenoisingObjective(schedule, "epsilon", snr_gamma=5.0)
    assert float(weighted.scheduler.alphas_cumprod[-1]) < 1e-6
    # min(SNR, γ) / SNR tends to 1 as SNR tends to 0.
    torch.testing.assert_close(
        weighted(network, batch, timesteps, noise),
        DenoisingObjective(schedule, "epsilon")(network, batch, timesteps, noise),
        rtol=1e-6,
        atol=0,
    )


def test_loss_of_a_half_precision_network_is_float32() -> None:
    batch, timesteps, noise = views(2, torch.bfloat16)
    losses = DenoisingObjective()(tiny_unet().bfloat16(), batch, timesteps, noise)
    assert losses.dtype == torch.float32
    exact = DenoisingObjective()(
        tiny_unet().double(),
        ViewBatch(batch.latents.double(), {"text": batch.text.double()}),
        timesteps,
        noise.double(),
    )
    torch.testing.assert_close(losses.double(), exact, rtol=0.05, atol=0)


def test_loss_depends_on_its_own_row_only() -> None:
    network = tiny_unet().double()
    batch, timesteps, noise = views(3)
    objective = DenoisingObjective()
    together = objective(network, batch, timesteps, noise)
    for row in range(3):
        one = slice(row, row + 1)
        alone = objective(network, ViewBatch(batch.latents[one], {"text": batch.text[one]}), timesteps[one], noise[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-9, atol=0)


def test_scheduler_is_read_from_its_own_folder_and_from_a_pipelines(tmp_path: Any) -> None:
    saved = load_scheduler({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}, None)
    saved.save_pretrained(tmp_path / "pipeline" / "scheduler")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "scheduler"):
        objective = DenoisingObjective(str(folder))
        assert objective.prediction_type == "v_prediction"
        assert torch.equal(objective.scheduler.alphas_cumprod, saved.alphas_cumprod)
    assert DenoisingObjective(str(tmp_path / "pipeline"), "sample").prediction_type == "sample"


def test_settings_tell_objectives_apart_and_are_json() -> None:
    import json

    settings = [
        DenoisingObjective(scheduler, prediction_type, snr_gamma).settings()
        for scheduler in ({}, {"beta_schedule": "scaled_linear"})
        for prediction_type in (None, "v_prediction")
        for snr_gamma in (None, 5.0)
    ]
    written = {json.dumps(one, sort_keys=True) for one in settings}
    assert len(written) == 8
    assert DenoisingObjective({}, "epsilon").settings() == DenoisingObjective().settings()


def broken_folder(tmp_path: Any) -> str:
    (tmp_path / "scheduler_config.json").write_text('{"num_train_timesteps": ')
    return str(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (lambda tmp_path: str(tmp_path / "absent"), "No scheduler_config.json in .*absent"),
        (broken_folder, "scheduler_config.json"),
        (lambda _: {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow-matching"),
        (lambda _: {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        (lambda _: {"beta_schedule": "no such"}, "no such"),
    ],
)
def test_scheduler_that_cannot_be_used_is_an_input_error(tmp_path: Any, scheduler: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        DenoisingObjective(scheduler(tmp_path))


def test_family_is_found_by_class_name_also_of_derived_classes() -> None:
    network = tiny_unet()
    derived = type("MyUNet", (type(network),), {})
    network.__class__ = derived
    assert "UNet2DConditionModel" in family_of(network).class_names


def test_network_of_no_family_is_an_input_error_that_names_it() -> None:
    with pytest.raises(InputError, match=r"ToyDenoiser.*UNet2DConditionModel"):
        family_of(ToyDenoiser())


def test_half_precision_has_the_noise_of_the_schedule() -> None:
    seen: list[Tensor] = []
    network = tiny_unet().bfloat16()
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    objective = DenoisingObjective(prediction_type="v_prediction")
    timesteps = torch.tensor([0, 1, 5, 20])
    latents = torch.zeros(4, *LATENT, dtype=torch.bfloat16)
    batch = ViewBatch(latents, {"text": torch.zeros(4, TOKENS, DIM, dtype=torch.bfloat16)})
    with torch.no_grad():
        objective(network, batch, timesteps, torch.ones_like(latents))
    expected = (1 - objective.scheduler.alphas_cumprod.double()[timesteps]).sqrt()
    assert seen[0].dtype == torch.bfloat16
    torch.testing.assert_close(seen[0].double().flatten(1).mean(1), expected, rtol=2**-8, atol=0)
    target = objective._target(latents + 1, torch.zeros_like(latents), timesteps)
    torch.testing.assert_close(target.double().flatten(1).mean(1), -expected, rtol=2**-8, atol=0)
