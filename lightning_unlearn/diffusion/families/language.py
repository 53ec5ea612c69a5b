"""States of language models, as families whose captions have lengths of their own share them."""

from __future__ import annotations

import warnings

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
    if rest == 0:
        warn_of_cut(counted)
    states = torch.nn.functional.pad(text.float() * counted[..., None], (0, 0, 0, rest))
    return {"text": states, "text_mask": torch.nn.functional.pad(counted, (0, rest))}


def warn_of_cut(mask: Tensor) -> None:
    """Say that captions fill all tokens that are kept of them: a pipeline cuts what lies beyond without a word.

    Args:
        mask: ``(n, tokens)``, which of them count.
    """
    full = int((mask > 0).all(1).sum())
    if full:
        warnings.warn(
            f"{full} of {len(mask)} captions fill all {mask.shape[1]} tokens that are kept, so that what lies beyond "
            "was cut."
        )


def without_padding(batch: ViewBatch) -> tuple[Tensor, Tensor]:
    """Text states and mask without what is padding in all views.

    Args:
        batch: With ``text`` and ``text_mask``, whose tokens come first.

    Returns:
        ``(B, most tokens, dim)`` and bool ``(B, most tokens)``.
    """
    mask = batch.conditions["text_mask"] > 0
    if mask.is_meta:  # shapes alone: nothing is known to be padding
        return batch.text, mask
    most = max(1, int(mask.sum(1).max()))
    return batch.text[:, :most], mask[:, :most]


def states_of_each(batch: ViewBatch) -> list[Tensor]:
    """Text states of each view without its padding.

    Args:
        batch: With ``text`` and ``text_mask``.

    Returns:
        ``B`` arrays ``(tokens, dim)``.
    """
    mask = batch.conditions["text_mask"] > 0
    if mask.is_meta:
        return list(batch.text.unbind())
    return [states[counted] for states, counted in zip(batch.text, mask, strict=True)]
