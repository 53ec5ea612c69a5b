"""The table of sigmas that a flow was trained with, from a scheduler's settings or from a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_unlearn.diffusion.noise_schedule import (
    FIXED_KEYS,
    OTHER_OBJECTIVE,
    OWN_KEYS,
    SAMPLING_KEYS,
    TRAINING_KEYS,
    nearest,
    scheduler_config,
)
from lightning_unlearn.errors import InputError

# diffusers' schedulers of flows whose settings say `shift`.
FLOW_SCHEDULERS = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
)
# What says how a flow was trained, and what says how pictures are sampled from it, and leaves its loss as it is.
FLOW_TRAINING_KEYS = frozenset({"num_train_timesteps", "shift", "use_dynamic_shifting"})
SPACING_KEYS = frozenset({"shift_terminal", "use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"})
FLOW_SAMPLING_KEYS = SPACING_KEYS | frozenset(
    {
        "base_image_seq_len",
        "base_shift",
        "max_image_seq_len",
        "max_shift",
        "scale_factors",
        "stochastic_sampling",
        "time_shift_type",
        "upscale_mode",
    }
)
FLOW_FIXED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "invert_sigmas": ((False, None), "its sigmas run from noise to data"),
}


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's settings are those of flow matching.

    Args:
        config: With ``_class_name``.

    Returns:
        By the class, or by ``use_flow_sigmas``, which lets a solver of other schedules sample a flow.
    """
    return "FlowMatch" in str(config.get("_class_name")) or bool(config.get("use_flow_sigmas"))


def load_flow_scheduler(scheduler: str | dict[str, Any] | None, shift: float | None) -> Any:
    r"""A ``FlowMatchEulerDiscreteScheduler`` whose table is the one that a model was trained with.

    :math:`σ = s t / (1 + (s - 1) t)` with t = 1/n, …, 1 and the scheduler's ``shift`` s; with ``use_dynamic_shifting``,
    which depends on a picture's size and on sampling alone, t itself, as diffusers' training scripts have it. A solver
    of other schedules that samples a flow calls its s ``flow_shift``.

    Args:
        scheduler: Its settings, the folder that holds ``scheduler_config.json``, or a pipeline's folder.
        shift: Overrides the one found.

    Returns:
        The scheduler; its ``sigmas`` and ``timesteps`` run from noise to data.

    Raises:
        InputError: If it can't be read, or is not one of a flow, or has a key or value that is not known.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config, where = scheduler_config(scheduler)
    if config and not is_flow({"_class_name": "FlowMatchEulerDiscreteScheduler", **config}):
        raise InputError(
            f"{where} are of {config['_class_name']}, which is no flow-matching schedule; use DenoisingObjective, or, "
            "if the model was trained by flow matching, its settings as `scheduler`."
        )
    _check_keys(config, where)
    if config.get("use_flow_sigmas"):
        kept = {"num_train_timesteps": config.get("num_train_timesteps", 1000)}
        config = kept | {"shift": config.get("flow_shift", 1.0)}
    if shift is not None:
        config |= {"shift": shift, "use_dynamic_shifting": False}
    _check_numbers(config, where)
    # How a sampler spaces its steps is no matter of the table, and one of these ways asks for scipy.
    config = {key: value for key, value in config.items() if key not in SPACING_KEYS}
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(config)  # type: ignore[no-untyped-call]
    except (ArithmeticError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{where} don't make a table of sigmas ({reason}); correct them.") from None


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    name, solver = config.get("_class_name", "FlowMatchEulerDiscreteScheduler"), bool(config.get("use_flow_sigmas"))
    if not solver and name not in FLOW_SCHEDULERS:
        raise InputError(
            f"{where} are of {name!s}, of which it is not known what it makes of the loss; {OTHER_OBJECTIVE}."
        )
    if solver and config.get("prediction_type") != "flow_prediction":
        raise InputError(
            f"{where} have use_flow_sigmas and the prediction_type {config.get('prediction_type')!r}, of which "
            f"FlowMatchingObjective knows nothing; {OTHER_OBJECTIVE}."
        )
    known = OWN_KEYS | (
        TRAINING_KEYS | SAMPLING_KEYS | FIXED_KEYS.keys()
        if solver
        else FLOW_TRAINING_KEYS | FLOW_SAMPLING_KEYS | FLOW_FIXED_KEYS.keys()
    )
    for key, value in config.items():
        if key not in known:
            near = nearest(str(key), known)
            raise InputError(
                f"{where} have a key {key!r} of which it is not known what it makes of the loss"
                f"{f' (is it {near}?)' if near else ''}; correct it, or leave it out if the loss does not depend on it."
            )
        values, why = FLOW_FIXED_KEYS.get(key, ((value,), ""))
        if value not in values:
            raise InputError(
                f"{where} have {key} {value!r}, of which FlowMatchingObjective knows nothing: {why}; {OTHER_OBJECTIVE}."
            )


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    steps, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"{where} have num_train_timesteps {steps!r}; it is a whole number from 1 on.")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise InputError(f"{where} have a shift {shift!r}; it is a finite number above 0.")
    if not isinstance(config.get("use_dynamic_shifting", False), bool):
        raise InputError(f"{where} have use_dynamic_shifting {config['use_dynamic_shifting']!r}; it is true or false.")
