from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import stable_diffusion_3
from torch import Tensor, nn
from toys import tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.objective_choice import objective_of
from lightning_unlearn.errors import InputError

SHAPE = (stable_diffusion_3.CHANNELS, 8, 6)
VIEWS = 5


@pytest.fixture(scope="module")
def network() -> nn.Module:
    double: nn.Module = stable_diffusion_3.transformer().double()
    return double


@pytest.fixture(scope="module")
def batch() -> ViewBatch:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(VIEWS, *shape, generator=generator, dtype=torch.float64)

    mask = (normal(*SHAPE[1:]) > 0).double()
    return ViewBatch(normal(*SHAPE), {"text": normal(3, 24), "pooled": normal(20)}, mask)


NOISE = torch.randn(VIEWS, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TIMESTEPS = torch.tensor([0, 3, 500, 998, 999])


def flow(scheduler: Any = None, **settings: Any) -> FlowMatchingObjective:
    return FlowMatchingObjective(scheduler, **{"density": "uniform", **settings})


def slow(network: nn.Module, batch: ViewBatch, shift: float, weighting: str, *, preconditioned: bool) -> list[float]:
    """The loss view by view, from the formulas, in double precision but for what the network is told of σ."""
    values = []
    for row, number in enumerate(TIMESTEPS.tolist()):
        t = (number + 1) / 1000
        # The tables that training looked σ up in are float32.
        t32 = torch.tensor(t, dtype=torch.float32)
        sigma = float(shift * t32 / (1 + (shift - 1) * t32))
        assert sigma == pytest.approx(shift * t / (1 + (shift - 1) * t), rel=1e-6)
        x0, eps = batch.latents[row], NOISE[row]
        noisy = (1 - sigma) * x0 + sigma * eps
        with torch.no_grad():
            output = network(
                noisy[None],
                encoder_hidden_states=batch.text[row : row + 1],
                pooled_projections=batch.conditions["pooled"][row : row + 1],
                timestep=torch.tensor([sigma], dtype=torch.float32) * 1000,
            ).sample[0]
        error = noisy - sigma * output - x0 if preconditioned else output - (eps - x0)
        weight = {
            "none": 1.0,
            "sigma_sqrt": 1 / sigma**2,
            "cosmap": 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)),
        }[weighting]
        assert batch.mask is not None
        shares = batch.mask[row].expand_as(error)
        values.append(weight * float((error.square() * shares).sum() / shares.sum()))
    return values


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_is_the_formula(
    network: nn.Module, batch: ViewBatch, weighting: str, shift: float, preconditioned: bool
) -> None:
    objective = flow({"shift": shift}, weighting=weighting, preconditioned=preconditioned)
    found = objective(network, batch, TIMESTEPS, NOISE).tolist()
    assert found == pytest.approx(slow(network, batch, shift, weighting, preconditioned=preconditioned), rel=1e-6)


@pytest.mark.parametrize("weighting", ["none", "cosmap"])
def test_drawn_has_the_gradient_of_a_drawn_target(network: nn.Module, batch: ViewBatch, weighting: str) -> None:
    """The loss is −log p of targets with the variance D / 2 w m; with one drawn, both have one gradient."""
    objective = flow({"shift": 3.0}, weighting=weighting, preconditioned=True)
    parameter = dict(network.named_parameters())["transformer_blocks.0.attn.add_k_proj.weight"]
    normal = torch.randn(VIEWS, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    product = objective.drawn(network, batch, TIMESTEPS, NOISE, normal)
    assert batch.mask is not None
    shares = batch.mask[:, None].expand(-1, SHAPE[0], -1, -1)
    total = shares.flatten(1).sum(1)
    sigmas = objective.sigmas[TIMESTEPS].double()
    weight = sigmas**2 * (2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2)) if weighting == "cosmap" else 1)
    noisy = torch.lerp(batch.latents, NOISE, sigmas[:, None, None, None])
    output = network(
        noisy,
        encoder_hidden_states=batch.text,
        pooled_projections=batch.conditions["pooled"],
        timestep=objective.times[TIMESTEPS],
    ).sample
    spread = (total / (2 * weight))[:, None, None, None].sqrt()
    target = (output - spread * normal).detach()
    # Where the mask is 0 nothing counts; where it is 1 its root is 1.
    loss = weight * ((output - target).square() * shares).flatten(1).sum(1) / total
    for row in range(VIEWS):
        (ours,) = torch.autograd.grad(product[row], parameter, retain_graph=True)
        (theirs,) = torch.autograd.grad(loss[row], parameter, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()))


def test_loss_of_a_view_does_not_depend_on_the_others(network: nn.Module, batch: ViewBatch) -> None:
    objective = flow({"shift": 3.0})
    together = objective(network, batch, TIMESTEPS, NOISE)
    assert batch.mask is not None
    for row in range(VIEWS):
        rows = slice(row, row + 1)
        conditions = {name: array[rows] for name, array in batch.conditions.items()}
        one = ViewBatch(batch.latents[rows], conditions, batch.mask[rows])
        alone = objective(network, one, TIMESTEPS[rows], NOISE[rows])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-10, atol=0)


def test_half_precision_gives_float32(batch: ViewBatch) -> None:
    network = stable_diffusion_3.transformer().to(torch.bfloat16)
    half = batch.to(torch.device("cpu"), torch.bfloat16)
    found = flow({"shift": 3.0})(network, half, TIMESTEPS, NOISE.to(torch.bfloat16))
    assert found.dtype == torch.float32
    exact = torch.tensor(slow(stable_diffusion_3.transformer().double(), batch, 3.0, "none", preconditioned=False))
    # bfloat16 has 8 bits: what enters a sum of squares is off by up to a per cent or two.
    torch.testing.assert_close(found.double(), exact.double(), rtol=0.1, atol=0.0)


# ---------------------------------------------------------------------- the table of sigmas


@pytest.mark.parametrize(
    ("config", "shift"),
    [
        ({}, 1.0),
        ({"shift": 3.0}, 3.0),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 1.0),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 2.0}, 2.0),
        ({"shift": 3.0, "use_beta_sigmas": True, "base_shift": 0.7, "shift_terminal": 0.02}, 3.0),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "use_flow_sigmas": True,
                "prediction_type": "flow_prediction",
                "flow_shift": 4.0,
            },
            4.0,
        ),
    ],
)
def test_table_is_that_of_training(config: dict[str, Any], shift: float) -> None:
    objective = flow({"num_train_timesteps": 50, **config})
    t = torch.arange(1, 51, dtype=torch.float64) / 50
    torch.testing.assert_close(objective.sigmas.double(), shift * t / (1 + (shift - 1) * t), rtol=1e-6, atol=0)
    torch.testing.assert_close(objective.times, objective.sigmas * 50, rtol=1e-6, atol=0)
    assert objective.num_timesteps == 50
    assert objective.settings()["shift"] == shift


def test_another_shift_can_be_said() -> None:
    objective = flow({"shift": 3.0, "use_dynamic_shifting": True}, shift=3.1582)
    assert float(objective.sigmas[499]) == pytest.approx(3.1582 / (1 + 3.1582), rel=1e-6)
    assert objective.settings()["shift"] == 3.1582


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shfit": 3.0}, "'shfit'.*is it shift"),
        ({"invert_sigmas": True}, "from noise to data"),
        ({"_class_name": "DDPMScheduler"}, "no flow-matching schedule; use DenoisingObjective"),
        ({"_class_name": "FlowMatchNewScheduler"}, "FlowMatchNewScheduler, of which it is not known"),
        ({"shift": 0.0}, "shift 0.0"),
        ({"shift": "3"}, "shift '3'"),
        ({"use_dynamic_shifting": "yes"}, "use_dynamic_shifting 'yes'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"},
            "prediction_type 'epsilon'",
        ),
    ],
)
def test_what_is_not_known_of_a_scheduler_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        flow(config)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"density": None}, "with what density"),
        ({"density": "normal"}, "no density"),
        ({"weighting": "snr"}, "no weighting 'snr'"),
        ({"guidance": math.nan}, "guidance is a finite number"),
        ({"density": "logit_normal", "logit_std": -1.0}, "logit_std"),
    ],
)
def test_options_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        flow(**settings)


def test_every_option_that_changes_the_loss_changes_the_settings() -> None:
    plain = flow({"shift": 3.0})
    others = [
        flow({"shift": 2.0}),
        flow({"shift": 3.0, "num_train_timesteps": 500}),
        flow({"shift": 3.0}, density="mode"),
        flow({"shift": 3.0}, density="mode", mode_scale=1.0),
        flow({"shift": 3.0}, density="logit_normal"),
        flow({"shift": 3.0}, density="logit_normal", logit_mean=0.5),
        flow({"shift": 3.0}, density="logit_normal", logit_std=0.5),
        flow({"shift": 3.0}, weighting="cosmap"),
        flow({"shift": 3.0}, preconditioned=True),
        flow({"shift": 3.0}, guidance=1.0),
    ]
    seen = [json.dumps(objective.settings(), sort_keys=True) for objective in (plain, *others)]
    assert len(set(seen)) == len(seen)
    # What only sampling looks at, and what this density does not, change nothing.
    for alike in (flow({"shift": 3.0, "use_karras_sigmas": True}), flow({"shift": 3.0}, logit_std=0.5)):
        assert json.dumps(alike.settings(), sort_keys=True) == seen[0]
    assert plain.settings()["class"] == "lightning_unlearn.FlowMatchingObjective"


# ---------------------------------------------------------------------- the objective of a folder


def pipeline_folder(folder: Path, scheduler: dict[str, Any], network: str | None = None) -> str:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if network is not None:
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": network}))
    return str(folder)


EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


@pytest.mark.parametrize(
    ("network", "density", "preconditioned"),
    [("SD3Transformer2DModel", "logit_normal", True), ("FluxTransformer2DModel", "uniform", False)],
)
def test_folder_says_how_its_family_is_usually_trained(
    tmp_path: Path, network: str, density: str, preconditioned: bool
) -> None:
    folder = pipeline_folder(tmp_path, EULER, network)
    for objective in (objective_of(folder), FlowMatchingObjective(folder)):
        settings = objective.settings()
        assert (settings["timestep_density"], settings["preconditioned"]) == (density, preconditioned)
    # What is said goes before.
    other = FlowMatchingObjective(folder, density="mode", preconditioned=not preconditioned).settings()
    assert (other["timestep_density"], other["preconditioned"]) == ("mode", not preconditioned)


@pytest.mark.parametrize("network", [None, "OtherTransformer", "UNet2DConditionModel"])
def test_density_of_an_unknown_family_is_asked_for(tmp_path: Path, network: str | None) -> None:
    folder = pipeline_folder(tmp_path, EULER, network)
    with pytest.raises(InputError, match="with what density"):
        objective_of(folder)


def test_scheduler_says_which_objective(tmp_path: Path) -> None:
    noise = pipeline_folder(tmp_path / "noise", {"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"})
    found = objective_of(noise)
    assert isinstance(found, DenoisingObjective)
    assert found.prediction_type == "v_prediction"
    solver = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    flowing = pipeline_folder(tmp_path / "flow", {**solver, "flow_shift": 1.0}, "SD3Transformer2DModel")
    assert isinstance(objective_of(flowing), FlowMatchingObjective)


def test_shift_of_a_solver_is_not_joined_to_the_density_of_a_script_that_has_none(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    folder = pipeline_folder(tmp_path, {**solver, "prediction_type": "flow_prediction"}, "SanaTransformer2DModel")
    with pytest.raises(InputError, match=r"flow_shift of 3\.0 .* give FlowMatchingObjective its density and its shift"):
        objective_of(folder)
    # As train_dreambooth_lora_sana.py reads it, and as the solver does.
    script = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    trained = FlowMatchingObjective(folder, shift=1.0)
    assert trained.density() is None
    torch.testing.assert_close(trained.sigmas, script.sigmas.flip(0), rtol=1e-6, atol=0)
    assert FlowMatchingObjective(folder, density="logit_normal").settings()["shift"] == 3.0


def test_network_of_a_flow_without_a_folder_is_asked_for_its_objective(network: nn.Module) -> None:
    assert isinstance(objective_of(None, tiny_unet()), DenoisingObjective)
    assert isinstance(objective_of(None, nn.Linear(1, 1)), DenoisingObjective)
    with pytest.raises(InputError, match="Stable Diffusion 3 is trained by flow matching"):
        objective_of(None, network)
