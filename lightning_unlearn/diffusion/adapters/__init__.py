"""Adapters: LoRA, LoCon and DoRA in the forms that people have them, put on a network.

A form is told by its keys (``keys.py``) and by the names that it has for layers (``layer_names.py``); what the code of
a family calls its layers is one file and one entry there.
"""

from lightning_unlearn.diffusion.adapters.applying import (
    LoadedAdapter,
    adapter_off,
    adapter_scales,
    has_adapter,
    load_adapter,
    merge_adapter,
)
from lightning_unlearn.diffusion.adapters.kohya_header import TrainingFolder, TrainingRecord, read_training_record
from lightning_unlearn.diffusion.adapters.training_objective import objective_of_training, warn_of_other_loss

__all__ = [
    "LoadedAdapter",
    "TrainingFolder",
    "TrainingRecord",
    "adapter_off",
    "adapter_scales",
    "has_adapter",
    "load_adapter",
    "merge_adapter",
    "objective_of_training",
    "read_training_record",
    "warn_of_other_loss",
]
