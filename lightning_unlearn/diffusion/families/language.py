"""States of language models, as families whose captions have lengths of their own share them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch


def padded(text: Tensor, mask: Tensor | None, tokens: int) -> Conditions:
    """States of one length, whatever other captions were encoded beside them.

    Args:
        text: ``(n, at most tokens, dim)``, each caption's states from the first on.
        mask: ``(n, at most tokens)``, which of them count; ``None`` for all.
        tokens: The length.

    Returns:
        ``text`` ``(n, tokens, dim)``, zero where none counts, and ``text_mask`` ``(n, tokens)``, float32.

    Example:
        >>> made = padded(torch.ones(1, 1, 2), None, 3)
        >>> made["text_mask"].tolist(), made["text"].shape
        ([[1.0, 0.0, 0.0]], torch.Size([1, 3, 2]))
    """
    counted = torch.ones(text.shape[:2], device=text.device) if mask is None else mask.float()
    rest = tokens - text.shape[1]
    states = torch.nn.functional.pad(text.float() * counted[..., None], (0, 0, 0, rest))
    return {"text": states, "text_mask": torch.nn.functional.pad(counted, (0, rest))}


def without_padding(batch: ViewBatch) -> tuple[Tensor, Tensor]:
    """Text states and mask without what is padding in all views.

    Args:
        batch: With ``text`` and ``text_mask``, whose tokens come first.

    Returns:
        ``(B, most tokens, dim)`` and bool ``(B, most tokens)``.
    """
    mask = batch.conditions["text_mask"] > 0
    most = max(1, int(mask.sum(1).max()))
    return batch.text[:, :most], mask[:, :most]
