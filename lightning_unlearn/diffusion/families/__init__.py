"""What differs between network families; one file each, one entry here."""

from __future__ import annotations

from torch import nn

from lightning_unlearn.diffusion.families.aura_flow import AuraFlowFamily
from lightning_unlearn.diffusion.families.base import Condition, Family
from lightning_unlearn.diffusion.families.chroma import ChromaFamily
from lightning_unlearn.diffusion.families.class_unet import ClassTextUNetFamily, ClassUNetFamily
from lightning_unlearn.diffusion.families.cog_view_4 import CogView4Family
from lightning_unlearn.diffusion.families.dit import DiTFamily
from lightning_unlearn.diffusion.families.flux import FluxFamily
from lightning_unlearn.diffusion.families.flux_2 import Flux2Family
from lightning_unlearn.diffusion.families.hunyuan_dit import HunyuanDiTFamily
from lightning_unlearn.diffusion.families.kandinsky_2 import Kandinsky2Family
from lightning_unlearn.diffusion.families.lumina_2 import Lumina2Family
from lightning_unlearn.diffusion.families.pixart import PixArtFamily
from lightning_unlearn.diffusion.families.qwen_image import QwenImageFamily
from lightning_unlearn.diffusion.families.sana import SanaFamily
from lightning_unlearn.diffusion.families.stable_diffusion_3 import StableDiffusion3Family
from lightning_unlearn.diffusion.families.stable_diffusion_xl import StableDiffusionXLFamily
from lightning_unlearn.diffusion.families.unet import UNetFamily
from lightning_unlearn.diffusion.families.vaes import encode_kl, scaling_of
from lightning_unlearn.diffusion.families.wan import WanFamily
from lightning_unlearn.diffusion.families.z_image import ZImageFamily
from lightning_unlearn.errors import InputError

# Those that look into the config of a class stand before the one that takes whatever is left of it.
FAMILIES: tuple[Family, ...] = (
    StableDiffusionXLFamily(),
    Kandinsky2Family(),
    ClassTextUNetFamily(),
    UNetFamily(),
    ClassUNetFamily(),
    DiTFamily(),
    PixArtFamily(),
    HunyuanDiTFamily(),
    StableDiffusion3Family(),
    FluxFamily(),
    ChromaFamily(),
    Flux2Family(),
    AuraFlowFamily(),
    SanaFamily(),
    QwenImageFamily(),
    Lumina2Family(),
    ZImageFamily(),
    CogView4Family(),
    WanFamily(),
)

__all__ = ["FAMILIES", "Condition", "Family", "UNetFamily", "encode_kl", "family_of", "scaling_of"]


def family_of(network: nn.Module) -> Family:
    """The family of a network, by the name of its class or of one it derives from.

    Args:
        network: The denoiser.

    Returns:
        Its family.

    Raises:
        InputError: If no family knows it.
    """
    for family in FAMILIES:
        if family.knows(network):
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.class_names))
    raise InputError(
        f"No network family knows {type(network).__name__} (known: {known}); give an objective of your own, "
        "and name the weights to unlearn by patterns."
    )
