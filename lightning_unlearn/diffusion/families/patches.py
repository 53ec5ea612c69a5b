"""Latents as a row of patches, as some transformers take them, and what else these share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.errors import InputError


def check_patches(network: nn.Module, noisy: Tensor, side: int, most: int | None = None) -> None:
    """Refuse latents that can't be cut into whole patches, or into more than the network has places for.

    Args:
        network: For messages.
        noisy: ``(B, C, H, W)``.
        side: Of a patch.
        most: Patches along a side that the network has places for; ``None`` for any number.

    Raises:
        InputError: If so.
    """
    height, width = noisy.shape[-2:]
    if height % side or width % side:
        raise InputError(
            f"Latents of {height} × {width} can't be cut into the patches of {side} × {side} that this "
            f"{type(network).__name__} takes; prepare pictures whose sides are multiples of {side} latents."
        )
    if most is not None and max(height, width) > side * most:
        raise InputError(
            f"Latents of {height} × {width} are larger than the {side * most} × {side * most} that this "
            f"{type(network).__name__} has places for (its config's pos_embed_max_size); prepare smaller pictures."
        )


def packed(latents: Tensor) -> Tensor:
    """Patches of 2 × 2 latents, one token each.

    Args:
        latents: ``(B, C, H, W)`` with even sides.

    Returns:
        ``(B, H/2 · W/2, 4C)``.

    Example:
        >>> packed(torch.arange(8.0).reshape(1, 1, 2, 4))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    batch, channels, height, width = latents.shape
    cut = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back from :func:`packed`.

    Args:
        tokens: ``(B, H/2 · W/2, 4C)``.
        height: H.
        width: W.

    Returns:
        ``(B, C, H, W)``.
    """
    batch, _, wide = tokens.shape
    cut = tokens.reshape(batch, height // 2, width // 2, wide // 4, 2, 2)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, wide // 4, height, width)


def grid_places(height: int, width: int, like: Tensor) -> Tensor:
    """Row and column of each token of a picture, in the order of :func:`packed`, behind a zero.

    Args:
        height: In tokens.
        width: In tokens.
        like: Whose device and type they get.

    Returns:
        ``(height · width, 3)``.
    """
    axes = (torch.arange(1), torch.arange(height), torch.arange(width))
    return torch.cartesian_prod(*axes).to(like)


def distilled_guidance(network: nn.Module, batch: ViewBatch) -> Tensor | None:
    """The guidance scale that a guidance-distilled network is given.

    Args:
        network: Its config's ``guidance_embeds`` says whether it is one.
        batch: Its ``guidance`` ``(B, 1)``.

    Returns:
        ``(B,)``, or ``None`` where the network takes none.

    Raises:
        InputError: If the network takes one and has none.
    """
    if not setting(network, "guidance_embeds"):
        return None
    if "guidance" not in batch.conditions:
        raise InputError(
            f"This {type(network).__name__} is guidance-distilled, but is given no guidance; say with which it was "
            "trained, as FlowMatchingObjective's `guidance`."
        )
    return batch.conditions["guidance"][:, 0]
