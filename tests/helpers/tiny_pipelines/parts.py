"""Encoders, tokenizers and VAEs with random weights, of which tiny pipelines are made."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TOKENS = 12
"""How many tokens an encoder reads, where a pipeline lets one choose."""

_LETTERS = string.ascii_lowercase


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What ``make`` makes, with weights that are a function of the seed; in eval mode, where it is a module."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make()
    return made.eval() if isinstance(made, torch.nn.Module) else made


def clip_tokenizer(length: int = TOKENS) -> Any:
    """CLIP's with letters as its only words."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=length)


def clip_encoder(width: int, *, projected: bool, length: int = TOKENS) -> Any:
    """CLIP's text model, with or without the projection of its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), width)


def t5_tokenizer(length: int = TOKENS) -> Any:
    """T5's with letters as its only pieces."""
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *_LETTERS, *(f"▁{letter}" for letter in _LETTERS)]
    vocabulary = [(piece, 0.0 if number < 3 else -2.0) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def t5_encoder(width: int) -> Any:
    """T5's encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=56, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return seeded(lambda: T5EncoderModel(config), width)


def umt5_encoder(width: int) -> Any:
    """The multilingual T5's encoder."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(vocab_size=56, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return seeded(lambda: UMT5EncoderModel(config), width)


def kl_autoencoder(channels: int, **settings: Any) -> Any:
    """A VAE that makes each side half as long."""
    from diffusers import AutoencoderKL

    return seeded(
        lambda: AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=2,
            sample_size=16,
            **settings,
        )
    )


def saved(pipeline: Any, folder: Path) -> Path:
    """The folder, in which the pipeline lies now."""
    pipeline.save_pretrained(str(folder))
    return folder
