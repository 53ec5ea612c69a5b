"""The noise schedule that a model was trained with, from its settings or from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from lightning_unlearn.errors import InputError

CONFIG_FILE = "scheduler_config.json"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# diffusers' schedulers that only sample differently from a model of one and the same kind, which was trained with
# q(x_t|x_0) of betas, and with which betas each does so where its settings don't say: start, end and form.
PLAIN_BETAS = (0.0001, 0.02, "linear")
STABLE_BETAS = (0.00085, 0.012, "linear")
SCALED_BETAS = (0.00085, 0.012, "scaled_linear")
SCHEDULERS: dict[str, tuple[float, float, str]] = {
    "DDPMScheduler": PLAIN_BETAS,
    "DDPMParallelScheduler": PLAIN_BETAS,
    "DDIMScheduler": PLAIN_BETAS,
    "DDIMParallelScheduler": PLAIN_BETAS,
    "DDIMInverseScheduler": PLAIN_BETAS,
    "DEISMultistepScheduler": PLAIN_BETAS,
    "DPMSolverMultistepScheduler": PLAIN_BETAS,
    "DPMSolverMultistepInverseScheduler": PLAIN_BETAS,
    "DPMSolverSDEScheduler": STABLE_BETAS,
    "DPMSolverSinglestepScheduler": PLAIN_BETAS,
    "EulerAncestralDiscreteScheduler": PLAIN_BETAS,
    "EulerDiscreteScheduler": PLAIN_BETAS,
    "HeunDiscreteScheduler": STABLE_BETAS,
    "KDPM2AncestralDiscreteScheduler": STABLE_BETAS,
    "KDPM2DiscreteScheduler": STABLE_BETAS,
    "LCMScheduler": SCALED_BETAS,
    "LMSDiscreteScheduler": PLAIN_BETAS,
    "PNDMScheduler": PLAIN_BETAS,
    "SASolverScheduler": PLAIN_BETAS,
    "TCDScheduler": SCALED_BETAS,
    "UniPCMultistepScheduler": PLAIN_BETAS,
}
# Those that clip what the network predicts as the image to [-1, 1] where their settings don't say. None of the others
# does, and to latents it would be wrong.
CLIPPING = frozenset(
    {"DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler"}
)
# What says how a model was trained.
TRAINING_KEYS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    }
)
# What says how pictures are sampled from it, and leaves its loss as it is.
SAMPLING_KEYS = frozenset(
    {
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "sample_max_value",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "tau_func",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
    }
)
# What makes another kind of model of it where it has another value than these, and why.
FIXED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_flow_sigmas": ((False, None), "that is flow matching, which FlowMatchingObjective knows"),
    "timestep_type": (("discrete", None), "a network of it takes logarithms of sigmas in the place of timesteps"),
    "variance_type": (
        # Whether a network predicts a variance too, and where it lies, its family knows by its channels.
        ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", None),
        "what a network of it predicts is not known",
    ),
}
# What diffusers itself writes beside the settings.
OWN_KEYS = frozenset({"_class_name", "_diffusers_version", "_use_default_values"})
OTHER_OBJECTIVE = "give an objective of your own (a subclass of Objective)"


def load_scheduler(scheduler: str | dict[str, Any] | None, prediction_type: str | None) -> Any:
    """A ``DDPMScheduler`` with the noise schedule that a model was trained with.

    Nothing is guessed: a kind of scheduler, a key or a value of which it is not known what it makes of the loss is
    refused by name.

    Args:
        scheduler: Its settings, the folder that holds ``scheduler_config.json``, or a pipeline's folder.
        prediction_type: Overrides the one found.

    Returns:
        The scheduler.

    Raises:
        InputError: If it can't be read, or has no noise schedule, or one that is not known.
    """
    from diffusers import DDPMScheduler

    config, where = scheduler_config(scheduler)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    config |= _own_betas(config, where)
    if config.get("_class_name", "DDPMScheduler") not in CLIPPING:
        config.setdefault("clip_sample", False)
    _check_keys(config, where)
    _check_betas(config, where)
    try:
        built: Any = DDPMScheduler.from_config(config)  # type: ignore[no-untyped-call]
        betas: Any = built.betas.double()
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{where} don't make a noise schedule ({reason}); correct them.") from None
    if not (len(betas) and bool(((betas >= 0) & (betas <= 1)).all())):
        raise InputError(f"{where} give betas that do not all lie within 0 and 1, or none; correct them.")
    if built.config.prediction_type not in PREDICTION_TYPES:
        raise InputError(
            f"The scheduler's prediction_type {built.config.prediction_type!r} is none of epsilon, v_prediction and "
            "sample; give the one that the model was trained with."
        )
    return built


def scheduler_config(scheduler: str | dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The settings of a scheduler, whichever its class.

    Args:
        scheduler: Its settings, the folder that holds ``scheduler_config.json``, or a pipeline's folder.

    Returns:
        The settings, and what they are called in messages.

    Raises:
        InputError: If they can't be read.
    """
    if not isinstance(scheduler, str):
        if not isinstance(scheduler, Mapping | None):
            raise InputError(
                f"A scheduler is a mapping of settings or a folder, not a {type(scheduler).__name__}; give one of them."
            )
        return dict(scheduler or {}), "The scheduler's settings"
    folder = Path(scheduler)
    folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"No {CONFIG_FILE} in {folder}; name the folder of a saved scheduler or pipeline.")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} can't be read ({error}); save the scheduler again.") from None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no settings; save the scheduler again.")
    if "_class_name" not in config:
        raise InputError(f"{path} does not say of which class the scheduler is (_class_name); save it again.")
    return config, f"The settings in {path}"


def _own_betas(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The betas that the scheduler's class has where its settings don't say; refuses a class that is not known."""
    name = config.get("_class_name", "DDPMScheduler")
    if not isinstance(name, str) or name not in SCHEDULERS:
        flow = "Flow" in str(name)
        kind = "is a flow-matching schedule" if flow else "is none of the schedules of betas that it knows"
        other = "use FlowMatchingObjective" if flow else OTHER_OBJECTIVE
        raise InputError(
            f"{where} are of {name!s}, which {kind}, and DenoisingObjective does not cover it; {other}, or, "
            "if the model was trained with a DDPM schedule, its settings as `scheduler`."
        )
    own = dict(zip(("beta_start", "beta_end", "beta_schedule"), SCHEDULERS[name], strict=True))
    return {key: value for key, value in own.items() if key not in config}


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    known = TRAINING_KEYS | SAMPLING_KEYS | FIXED_KEYS.keys() | OWN_KEYS
    for key in config:
        if key not in known:
            near = nearest(str(key), known)
            raise InputError(
                f"{where} have a key {key!r} of which it is not known what it makes of the loss"
                f"{f' (is it {near}?)' if near else ''}; correct it, or leave it out if the loss does not depend on it."
            )
    for key, (values, why) in FIXED_KEYS.items():
        if key in config and config[key] not in values:
            raise InputError(
                f"{where} have {key} {config[key]!r}, of which DenoisingObjective knows nothing: {why}; "
                f"{OTHER_OBJECTIVE}."
            )


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that a mistyped one is likely to be.

    Args:
        key: As it is written.
        known: All that there are.

    Returns:
        One of them, or ``None``.
    """
    found = get_close_matches(key, sorted(known), 1)
    return found[0] if found else None


def _check_betas(config: Mapping[str, Any], where: str) -> None:
    if config["beta_schedule"] not in BETA_SCHEDULES:
        raise InputError(
            f"{where} have a beta_schedule {config['beta_schedule']!r}, which is none of {', '.join(BETA_SCHEDULES)}; "
            "give the one that the model was trained with."
        )
    for key in ("beta_start", "beta_end"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"{where} have {key} {value!r}; it is a number within 0 and 1.")
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"{where} have num_train_timesteps {steps!r}; it is a whole number from 1 on.")
    betas = config.get("trained_betas")
    if betas is None:
        return
    try:
        shape = tuple(torch.as_tensor(betas, dtype=torch.float32).shape)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"{where} have trained_betas that are no list of numbers; correct them.") from None
    if shape != (steps,):
        count = "×".join(map(str, shape)) or "no list"
        raise InputError(
            f"{where} have trained_betas of another length ({count}) than num_train_timesteps ({steps}); give one for "
            "each step, and their number as num_train_timesteps."
        )
