"""What kohya's header says of a training by flow matching, as the settings of an objective.

The keys and their meaning are those of sd-scripts' ``flux_train_network.py`` and ``library/flux_train_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_unlearn.diffusion.adapters.kohya_header import TrainingRecord
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.errors import InputError

_GIVE = "give a FlowMatchingObjective with the settings that are to be measured by"


def flow_settings(training: TrainingRecord, network: nn.Module | None = None) -> dict[str, Any]:
    """Settings of :class:`~lightning_unlearn.diffusion.flow_matching.FlowMatchingObjective` that a header stands for.

    σ is a number between 0 and 1 drawn with a density, and shifted: ``uniform`` and ``sigmoid`` (the logistic function
    of a normal number) without a shift, ``shift`` the latter and ``sigma`` any density with one.

    Args:
        training: What the adapter's file says; a key that it does not have was off.
        network: The network, which may take no guidance whatever the header says.

    Returns:
        The settings.

    Raises:
        InputError: If the training can't be followed, or the header doesn't say what it was.
    """
    said = dict(training.others or {})
    sampling = said.get("ss_timestep_sampling")
    if sampling is None:
        raise InputError(
            "The adapter's header says that kohya's trainer made it, but not how it drew timesteps and with which "
            f"shift of sigmas; {_GIVE}: its density and its shift."
        )
    if "ss_model_prediction_type" in said:
        raise InputError(
            f"The adapter was trained with model_prediction_type {said['ss_model_prediction_type']!r}, whose loss is "
            f"none of a flow's direction; {_GIVE}, whatever it was trained with."
        )
    found: dict[str, Any] = {"preconditioned": False, "shift": 1.0}
    if sampling in {"sigma", "shift"}:
        found["shift"] = _number(said, "ss_discrete_flow_shift", 1.0)
    if sampling in {"sigmoid", "shift"}:
        found |= {"density": "logit_normal", "logit_std": _number(said, "ss_sigmoid_scale", 1.0)}
    elif sampling == "sigma":
        found |= _scheme(said)
    elif sampling == "uniform":
        found["density"] = "uniform"
    else:
        raise InputError(
            f"The adapter was trained with timestep_sampling {sampling!r}, whose shift is another for each size of "
            f"picture; {_GIVE}: density logit_normal, and the shift of your size."
        )
    if network is None or setting(network, "guidance_embeds"):
        found["guidance"] = _number(said, "ss_guidance_scale", None)
    return found


def _scheme(said: Mapping[str, str]) -> dict[str, Any]:
    if said.get("ss_weighting_scheme") == "logit_normal":
        mean, deviation = _number(said, "ss_logit_mean", 0.0), _number(said, "ss_logit_std", 1.0)
        return {"density": "logit_normal", "logit_mean": mean, "logit_std": deviation}
    if said.get("ss_weighting_scheme") == "mode":
        return {"density": "mode", "mode_scale": _number(said, "ss_mode_scale", 1.29)}
    # The others weight losses, but only of a prediction type that is refused.
    return {"density": "uniform"}


def _number(said: Mapping[str, str], key: str, usual: float | None) -> float | None:
    try:
        return float(said[key]) if key in said else usual
    except ValueError:
        raise InputError(
            f"{key} in the adapter's header is {said[key][:80]!r}, not a number; take the file as the trainer wrote it."
        ) from None
