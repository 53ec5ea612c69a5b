"""The noise schedule that a model was trained with, from its settings or from a folder."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.errors import InputError


def load_scheduler(scheduler: str | dict[str, Any] | None, prediction_type: str | None) -> Any:
    """A ``DDPMScheduler`` with the noise schedule that a model was trained with.

    Args:
        scheduler: Its settings, the folder that holds ``scheduler_config.json``, or a pipeline's folder.
        prediction_type: Overrides the one found.

    Returns:
        The scheduler.

    Raises:
        InputError: If it can't be read, or has no noise schedule (flow matching).
    """
    from pathlib import Path

    from diffusers import DDPMScheduler

    if isinstance(scheduler, str):
        folder = Path(scheduler)
        folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        if not (folder / "scheduler_config.json").is_file():
            raise InputError(f"No scheduler_config.json in {folder}; name the folder of a saved scheduler or pipeline.")
        try:
            config = DDPMScheduler.load_config(str(folder), local_files_only=True)
        except OSError as error:
            raise InputError(
                f"{folder / 'scheduler_config.json'} can't be read ({error}); save the scheduler again."
            ) from None
    else:
        config = dict(scheduler or {})
    if "FlowMatch" in str(config.get("_class_name", "")):
        raise InputError(
            f"{config['_class_name']} is a flow-matching schedule, which DenoisingObjective does not cover; "
            "give your own objective."
        )
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    try:
        built: Any = DDPMScheduler.from_config(config)  # type: ignore[no-untyped-call]
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"The scheduler's settings don't make a noise schedule ({error}); correct them.") from None
    if built.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise InputError(
            f"The scheduler's prediction_type {built.config.prediction_type!r} is none of epsilon, v_prediction and "
            "sample; give the one that the model was trained with."
        )
    return built
