"""A tiny HunyuanDiT: BERT and T5, v-prediction."""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase
from typing import Any

from tiny_pipelines.parts import saved, seeded, t5_encoder, t5_tokenizer

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


def autoencoder() -> Any:
    """One that makes each side an eighth as long, as the pipeline assumes."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )


def make(folder: Path) -> Path:
    from diffusers import DDPMScheduler, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel, BertTokenizer

    later = [f"##{letter}" for letter in ascii_lowercase]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *ascii_lowercase, *later]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=77,
    )
    pipeline = HunyuanDiTPipeline(
        vae=seeded(autoencoder),
        text_encoder=seeded(lambda: BertModel(config)),
        tokenizer=BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77),
        transformer=seeded(network),
        scheduler=DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(TEXT_2),
        tokenizer_2=t5_tokenizer(256),
    )
    return saved(pipeline, folder)
