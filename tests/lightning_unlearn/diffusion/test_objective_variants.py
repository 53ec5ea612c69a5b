"""Schedulers and networks of all sorts: the loss is the formula in float64, or one sentence names what is not known.

Written against issue 14 before its cures. ``alphas_cumprod`` is computed here from the settings, and the network is
called as diffusers documents it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from reference import denoising_loss
from torch import Tensor, nn
from toys import DIM, LATENT, TOKENS, tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

TIMESTEPS = torch.tensor([0, 5, 499, 999])


def batch_of(channels: int = LATENT[0], count: int = 4) -> tuple[ViewBatch, Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents, noise = (torch.randn(count, channels, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return ViewBatch(
        latents, {"text": torch.randn(count, TOKENS, DIM, generator=generator, dtype=torch.float64)}
    ), noise


def betas_of(config: dict[str, Any]) -> list[float]:
    """The schedule by its formula, in Python's numbers."""
    count = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return list(config["trained_betas"])
    if kind == "linear":
        return [start + (end - start) * step / (count - 1) for step in range(count)]
    if kind == "scaled_linear":
        low, high = math.sqrt(start), math.sqrt(end)
        return [(low + (high - low) * step / (count - 1)) ** 2 for step in range(count)]
    if kind == "squaredcos_cap_v2":

        def bar(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        return [min(1 - bar((step + 1) / count) / bar(step / count), 0.999) for step in range(count)]
    assert kind == "sigmoid"
    points = [-6 + 12 * step / (count - 1) for step in range(count)]
    return [(end - start) / (1 + math.exp(-point)) + start for point in points]


def alpha_bars(config: dict[str, Any]) -> list[float]:
    """Cumulated products of 1 - β; rescaled to end in zero if the settings say so (arXiv 2305.08891, Algorithm 1)."""
    found, product = [], 1.0
    for beta in betas_of(config):
        product *= 1 - beta
        found.append(product)
    if config.get("rescale_betas_zero_snr"):
        roots = [math.sqrt(bar) for bar in found]
        first, last = roots[0], roots[-1]
        found = [((root - last) * first / (first - last)) ** 2 for root in roots]
    return found


def unet() -> nn.Module:
    return tiny_unet().double()


def wanted(config: dict[str, Any], network: nn.Module, snr_gamma: float | None = None) -> Tensor:
    batch, noise = batch_of()
    bars, rows = alpha_bars(config), []
    for row, timestep in enumerate(TIMESTEPS.tolist()):

        def predict(noisy: Tensor, row: int = row, timestep: int = timestep) -> Tensor:
            out: Tensor = network(noisy[None], timestep, encoder_hidden_states=batch.text[row : row + 1]).sample[0]
            return out

        kind = config.get("prediction_type", "epsilon")
        rows.append(denoising_loss(predict, batch.latents[row], noise[row], bars[timestep], kind, snr_gamma))
    return torch.stack(rows)


def refused_or_loss(scheduler: Any, network: nn.Module, *names: str, **options: Any) -> Tensor | None:
    """The loss of each view; none if one sentence names the thing."""
    refused: InputError | None = None
    loss: Tensor | None = None
    try:
        objective = DenoisingObjective(scheduler, **options)
        batch, noise = batch_of()
        loss = objective(network, batch, TIMESTEPS, noise)
    except InputError as error:
        refused = error
    if refused is not None:
        text = str(refused)
        assert text.isprintable()
        assert any(name in text for name in names), f"none of {names} in {text!r}"
    return loss


def assert_close(found: Tensor, right: Tensor) -> None:
    """Diffusers keeps schedules as products of up to 1000 float32 factors: 1000 · 2⁻²⁴ of ᾱ.

    The loss has √(1 - ᾱ) in it, which at the first timestep, where 1 - ᾱ is 1e-4, turns that into
    1000 · 2⁻²⁴ / 1e-4 · √(1 - ᾱ) ≤ 6e-3 of the noise.
    """
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(found.double()[1:], right[1:], rtol=2e-3, atol=1e-4)


def saved(folder: Path, name: str, **config: Any) -> tuple[str, dict[str, Any]]:
    """A scheduler's folder as diffusers saves it, and its settings."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.save_pretrained(folder)
    return str(folder), dict(scheduler.config)


# ------------------------------------------------------------------------------------- schedules that are DDPM's

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LIKE_DDPM = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DDIMInverseScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "LCMScheduler",
    "TCDScheduler",
]


@pytest.mark.parametrize("name", LIKE_DDPM)
def test_sampler_of_a_ddpm_schedule_is_right(tmp_path: Path, name: str) -> None:
    """A pipeline's folder has the sampler that somebody likes; the noise schedule is the same."""
    network = unet()
    config = {"_class_name": name, "_diffusers_version": "0.30.0", "num_train_timesteps": 1000, **SD}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    loss = refused_or_loss(str(tmp_path), network, name)
    assert loss is not None, "a well-known sampler is refused"
    assert_close(loss, wanted(SD, network))


# As they lie on people's disks; a sampler was changed in them, and its predecessor's keys stayed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
        **SD,
    },
    "Stable Diffusion 2.1": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        **SD,
    },
    "Stable Diffusion XL": {
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
        **SD,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_as_they_were_published_are_right(tmp_path: Path, name: str) -> None:
    """A key that another sampler of diffusers knows is no mistake, and no reason to refuse half the world's models."""
    network = unet()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED[name]))
    loss = refused_or_loss(str(tmp_path), network, "scheduler")
    assert loss is not None, "refused"
    assert_close(loss, wanted(PUBLISHED[name], network))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_each_schedule_and_prediction_is_the_formula(kind: str, prediction: str, rescaled: bool) -> None:
    network = unet()
    config = {"beta_schedule": kind, "prediction_type": prediction, "rescale_betas_zero_snr": rescaled}
    loss = refused_or_loss(config, network, kind, prediction, "rescale_betas_zero_snr")
    if loss is not None:
        assert_close(loss, wanted(config, network))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedule_that_ends_in_pure_noise_is_read_from_other_samplers_too(
    tmp_path: Path, name: str, rescaled: bool
) -> None:
    """Diffusers' Euler samplers keep a last ᾱ of 2⁻²⁴ in place of zero; the schedule of the training has zero."""
    config = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": rescaled}
    folder, _ = saved(tmp_path, name, **config)
    network = unet()
    loss = refused_or_loss(folder, network, "rescale_betas_zero_snr", name)
    if loss is not None:
        assert_close(loss, wanted(config, network))


# ------------------------------------------------------------------------------------ schedules that are none

NO_DDPM = [
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "CosineDPMSolverMultistepScheduler",
    "KarrasVeScheduler",
    "VQDiffusionScheduler",
    "DDPMWuerstchenScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "CMStochasticIterativeScheduler",
    "ConsistencyDecoderScheduler",
    "IPNDMScheduler",
    "AmusedScheduler",
    "SCMScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
]


@pytest.mark.parametrize("name", NO_DDPM)
def test_schedule_of_another_kind_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """By what the folder's file says, whether this version of diffusers has the class or not."""
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": name, "_diffusers_version": "0.30.0", "num_train_timesteps": 1000})
    )
    with pytest.raises(InputError, match=name):
        DenoisingObjective(str(tmp_path))
    with pytest.raises(InputError, match=name):
        DenoisingObjective({"_class_name": name, "num_train_timesteps": 1000})


@pytest.mark.parametrize("name", ["SomebodysScheduler", "", 5, ["DDPMScheduler"], "ddpm"])
def test_schedule_of_a_class_that_nobody_knows_is_refused(tmp_path: Path, name: Any) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, "beta_schedule": "linear"}))
    with pytest.raises(InputError) as error:
        DenoisingObjective(str(tmp_path))
    assert str(name) in str(error.value) or "_class_name" in str(error.value)


FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "use_flow_sigmas of DPM-Solver": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    "use_flow_sigmas of UniPC": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
    "flow_prediction": ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
}


@pytest.mark.parametrize("way", FLOWS)
def test_flow_by_the_settings_of_a_sampler_is_refused(tmp_path: Path, way: str) -> None:
    """Wan and others keep a flow in the folder of an ordinary sampler."""
    name, settings = FLOWS[way]
    config = {"_class_name": name, "num_train_timesteps": 1000, **settings}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"flow"):
        DenoisingObjective(str(tmp_path))


@pytest.mark.parametrize(
    "key",
    [
        "beta_shedule",
        "Beta_start",
        "betaEnd",
        "num_training_timesteps",
        "predictiontype",
        "prediction-type",
        "snr",
        "beta_schedules",
        "rescale_zero_snr",
        "trained_beta",
        "",
    ],
)
def test_mistyped_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError) as error:
        DenoisingObjective({"num_train_timesteps": 1000, key: "scaled_linear"})
    assert repr(key) in str(error.value) or (key and key in str(error.value))
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, key: "scaled_linear"})
    )
    with pytest.raises(InputError) as error:
        DenoisingObjective(str(tmp_path))
    assert repr(key) in str(error.value) or (key and key in str(error.value))


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_keys_of_a_samplers_own_are_no_mistake(tmp_path: Path, name: str) -> None:
    """Each has settings that DDPM's class does not know, and an older diffusers' file has some more."""
    folder, config = saved(tmp_path, name, **SD)
    assert set(config) - set(diffusers.DDPMScheduler().config), "nothing of its own"
    DenoisingObjective(folder)


VALUES: dict[str, dict[str, Any]] = {
    "betas too few": {"trained_betas": [0.1] * 10},
    "betas too many": {"trained_betas": [0.001] * 1001},
    "no betas": {"trained_betas": []},
    "betas of text": {"trained_betas": ["a"] * 1000},
    "a beta of one": {"trained_betas": [0.001] * 999 + [1.5]},
    "a negative beta": {"trained_betas": [-0.5] + [0.001] * 999},
    "a beta that is no number": {"trained_betas": [float("nan")] * 1000},
    "no timesteps": {"num_train_timesteps": 0},
    "negative timesteps": {"num_train_timesteps": -5},
    "timesteps of text": {"num_train_timesteps": "1000"},
    "half a timestep": {"num_train_timesteps": 1000.5},
    "beta of text": {"beta_start": "0.1"},
    "betas reversed beyond one": {"beta_start": 2.0, "beta_end": 3.0},
    "a schedule that nobody knows": {"beta_schedule": "scaled_liner"},
    "a schedule of nothing": {"beta_schedule": None},
    "a prediction that nobody knows": {"prediction_type": "noise"},
    "a prediction of nothing": {"prediction_type": None},
    "a learned variance": {"variance_type": "learned_range"},
    "a variance that nobody knows": {"variance_type": "fixed"},
}


@pytest.mark.parametrize("way", VALUES)
def test_value_that_makes_no_schedule_is_named(way: str) -> None:
    """One that says of a variance what a network without it can't have may go on, if the loss is right."""
    network = unet()
    key = next(iter(VALUES[way]))
    loss = refused_or_loss(VALUES[way], network, key, "betas" if "beta" in key else key)
    if loss is not None:
        assert "variance" in way
        assert_close(loss, wanted({}, network))


@pytest.mark.parametrize("count", [10, 250, 1001])
def test_trained_betas_of_a_length_that_is_said_are_right(count: int) -> None:
    network = unet()
    config = {"trained_betas": [0.0001 + 0.01 * step / count for step in range(count)], "num_train_timesteps": count}
    objective = DenoisingObjective(config)
    assert objective.num_timesteps == count
    batch, noise = batch_of()
    timesteps = torch.tensor([0, 3, count // 2, count - 1])
    found = objective(network, batch, timesteps, noise)
    bars = alpha_bars(config)
    for row, timestep in enumerate(timesteps.tolist()):

        def predict(noisy: Tensor, row: int = row, timestep: int = timestep) -> Tensor:
            out: Tensor = network(noisy[None], timestep, encoder_hidden_states=batch.text[row : row + 1]).sample[0]
            return out

        right = denoising_loss(predict, batch.latents[row], noise[row], bars[timestep], "epsilon")
        torch.testing.assert_close(found[row].double(), right, rtol=1e-2, atol=1e-4)


FOLDERS: dict[str, bytes] = {
    "no json": b"{",
    "a list": b"[1]",
    "null": b"null",
    "a number": b"5",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "a network's": json.dumps({"_class_name": "UNet2DConditionModel", "sample_size": 8}).encode(),
    "a pipeline's": json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}).encode(),
}


@pytest.mark.parametrize("way", FOLDERS)
def test_file_that_is_no_schedulers_is_named(tmp_path: Path, way: str) -> None:
    (tmp_path / "scheduler_config.json").write_bytes(FOLDERS[way])
    with pytest.raises(InputError, match=r"scheduler_config\.json|UNet2DConditionModel|StableDiffusionPipeline"):
        DenoisingObjective(str(tmp_path))


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf"), "5"])
def test_snr_gamma_that_is_none_is_named(gamma: Any) -> None:
    network = unet()
    loss = refused_or_loss(None, network, "snr_gamma", snr_gamma=gamma)
    if loss is not None:
        assert gamma == float("inf")
        assert_close(loss, wanted({}, network))


# ------------------------------------------------------------------------------------------------------- networks


def conditional(**changed: Any) -> nn.Module:
    return tiny_unet(**changed).double()


def pixels(**changed: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        **changed,
    }
    return diffusers.UNet2DModel(**settings).double().eval()


def transformer() -> nn.Module:
    return (
        diffusers.DiTTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            in_channels=3,
            out_channels=6,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=1,
        )
        .double()
        .eval()
    )


def pixart() -> nn.Module:
    return (
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            in_channels=3,
            out_channels=6,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=8,
            caption_channels=DIM,
            norm_num_groups=1,
        )
        .double()
        .eval()
    )


def old_transformer() -> nn.Module:
    return (
        diffusers.Transformer2DModel(
            num_attention_heads=1, attention_head_dim=8, in_channels=4, norm_num_groups=1, cross_attention_dim=DIM
        )
        .double()
        .eval()
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # name: (the network, what a refusal has in it: a setting of it, or its class)
    "variance, one channel": (lambda: conditional(in_channels=1, out_channels=2), "out_channels|channels|variance"),
    "variance, three channels": (lambda: conditional(out_channels=6), "out_channels|channels|variance"),
    "one channel out of three": (lambda: conditional(out_channels=1), "out_channels|channels"),
    "inpainting": (lambda: conditional(in_channels=7), "in_channels|channels"),
    "class labels": (lambda: conditional(num_class_embeds=10), "num_class_embeds|class"),
    "class labels by timestep": (lambda: conditional(class_embed_type="timestep"), "class"),
    "class labels by projection": (
        lambda: conditional(class_embed_type="projection", projection_class_embeddings_input_dim=4),
        "class",
    ),
    "class labels, simple projection": (
        lambda: conditional(class_embed_type="simple_projection", projection_class_embeddings_input_dim=4),
        "class",
    ),
    "like SDXL": (
        lambda: conditional(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=54
        ),
        "'pooled'",
    ),
    "like Kandinsky": (
        lambda: conditional(addition_embed_type="image", encoder_hid_dim=DIM, encoder_hid_dim_type="image_proj"),
        "addition_embed_type|encoder_hid_dim_type|image",
    ),
    "added text and image": (
        lambda: conditional(addition_embed_type="text_image"),
        "addition_embed_type|text_image",
    ),
    "image projection": (
        lambda: conditional(encoder_hid_dim=DIM, encoder_hid_dim_type="image_proj"),
        "encoder_hid_dim_type|image_proj",
    ),
    "text and image projection": (
        lambda: conditional(encoder_hid_dim=DIM, encoder_hid_dim_type="text_image_proj"),
        "encoder_hid_dim_type|text_image_proj",
    ),
    "guidance embedded": (lambda: conditional(time_cond_proj_dim=8), "time_cond_proj_dim|guidance"),
    "GLIGEN": (lambda: conditional(attention_type="gated"), "attention_type|gated"),
    "pixels without text": (pixels, "UNet2DModel"),
    "pixels with a variance": (lambda: pixels(out_channels=6), "UNet2DModel|out_channels"),
    "pixels with class labels": (lambda: pixels(num_class_embeds=10), "UNet2DModel|num_class_embeds"),
    "DiT": (transformer, "DiTTransformer2DModel"),
    "PixArt": (pixart, "PixArtTransformer2DModel"),
    "Transformer2D": (old_transformer, "Transformer2DModel"),
}
# With these the text alone gives a prediction, which is what diffusers' own pipelines do where nothing else is given.
MAY_GO_ON = ("guidance embedded", "GLIGEN", "pixels without text")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("way", NETWORKS)
def test_network_that_wants_or_gives_something_else(way: str, kind: str) -> None:
    """A number is right only where prediction and target have one shape and the network had all that it asks for."""
    make, named = NETWORKS[way]
    network = make()
    channels = 1 if way == "variance, one channel" else 4 if way == "Transformer2D" else LATENT[0]
    batch, noise = batch_of(channels)
    objective = DenoisingObjective({"prediction_type": kind})
    refused: InputError | None = None
    loss: Tensor | None = None
    try:
        loss = objective(network, batch, TIMESTEPS, noise)
    except InputError as error:
        refused = error
    if refused is not None:
        assert any(name in str(refused) for name in named.split("|")), f"none of {named} in {refused}"
        return
    assert loss is not None
    if way.startswith("variance"):  # the first half is the noise; only ε has that convention
        assert kind == "epsilon", "what the other half means, nobody said"
    else:
        assert way in MAY_GO_ON
    for row, (timestep, bar) in enumerate(zip(TIMESTEPS.tolist(), alpha_bars({}), strict=False)):
        bar = alpha_bars({})[timestep]

        def predict(noisy: Tensor, row: int = row, timestep: int = timestep) -> Tensor:
            text = {} if way.startswith("pixels") else {"encoder_hidden_states": batch.text[row : row + 1]}
            out: Tensor = network(noisy[None], timestep, **text).sample[0, :channels]
            return out

        right = denoising_loss(predict, batch.latents[row], noise[row], bar, kind)
        torch.testing.assert_close(loss[row].double(), right, rtol=1e-2, atol=1e-4)


EXTRA: dict[str, dict[str, Any]] = {
    "text projected": {"encoder_hid_dim": DIM, "cross_attention_dim": 8, "encoder_hid_dim_type": "text_proj"},
    "added text": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "linear projections": {"use_linear_projection": True},
    "dual cross attention": {"dual_cross_attention": False, "only_cross_attention": True},
    "GEGLU and more groups": {"norm_num_groups": 2, "act_fn": "gelu"},
    "timesteps shifted": {"freq_shift": 1, "flip_sin_to_cos": False},
    "positional time": {"time_embedding_type": "fourier"},
    "upcast": {"upcast_attention": True},
}


@pytest.mark.parametrize("way", EXTRA)
def test_network_that_needs_only_text_is_right(way: str) -> None:
    """What the network makes of its text by itself is its own affair."""
    network = conditional(**EXTRA[way])
    loss = refused_or_loss(None, network, *EXTRA[way])
    if loss is not None:
        assert_close(loss, wanted({}, network))


class Wrapped(nn.Module):
    """A network in another's clothes: compiled, parallel, or with an adapter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = network

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.module(*arguments, **keywords)


@pytest.mark.parametrize(
    "network",
    [nn.Linear(3, 3), Wrapped(nn.Identity()), nn.Identity(), nn.Conv2d(3, 3, 1), nn.Sequential()],
    ids=lambda n: type(n).__name__,
)
def test_network_of_no_family_is_refused_by_its_class(network: nn.Module) -> None:
    batch, noise = batch_of()
    with pytest.raises(InputError, match=type(network).__name__):
        DenoisingObjective()(network, batch, TIMESTEPS, noise)


def test_network_that_only_has_the_familys_name_gives_another_shape() -> None:
    """A class of somebody's, called like diffusers', that returns half of the channels: nothing is broadcast."""

    class UNet2DConditionModel(nn.Module):
        def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True) -> Any:
            return (x[:, :1],)

    batch, noise = batch_of()
    with pytest.raises(InputError, match=r"channels|shape"):
        DenoisingObjective()(UNet2DConditionModel(), batch, TIMESTEPS, noise)


@pytest.mark.parametrize("timesteps", [[1000] * 4, [0, 1, 2]])
def test_timesteps_that_the_schedule_does_not_have_are_an_error(timesteps: list[int]) -> None:
    batch, noise = batch_of()
    with pytest.raises((InputError, IndexError, RuntimeError)):
        DenoisingObjective()(unet(), batch, torch.tensor(timesteps), noise)
