"""A tiny HunyuanDiT: BERT and T5, v-prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_pipelines.parts import LETTERS, t5_encoder, t5_tokenizer, vae

TEXT, TEXT_2 = 8, 16  # the pooler of T5's text has 8 heads


def network() -> Any:
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT,
        cross_attention_dim_t5=TEXT_2,
        pooled_projection_dim=8,
    ).eval()


def make(folder: Path) -> Path:
    from diffusers import DDPMScheduler, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=77,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        HunyuanDiTPipeline(
            vae=vae(),
            text_encoder=BertModel(config).eval(),
            tokenizer=BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77),
            transformer=network(),
            scheduler=DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5_encoder(TEXT_2),
            tokenizer_2=t5_tokenizer(256),
        ).save_pretrained(folder)
    return folder
