"""Checkpoints in the forms that people have them: one file a form, all read without running what is in them."""

from lightning_unlearn.diffusion.checkpoints.choosing import AveragedChoice, WeightsOrigin, find_weights
from lightning_unlearn.diffusion.checkpoints.files import read_checkpoint, read_content, read_state
from lightning_unlearn.diffusion.checkpoints.model_folders import check_safetensors, variant_of

__all__ = [
    "AveragedChoice",
    "WeightsOrigin",
    "check_safetensors",
    "find_weights",
    "read_checkpoint",
    "read_content",
    "read_state",
    "variant_of",
]
