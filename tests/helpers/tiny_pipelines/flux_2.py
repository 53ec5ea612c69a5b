"""FLUX.2's pipelines: dev, which is guidance-distilled, and klein. Their language models are tiny but deep: states of
their 27th or 30th layer are asked for."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tiny_pipelines import parts

CHANNELS, PLACES = 4, 8
_CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_PARTS = "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"


def make(folder: Path, *, dev: bool = True) -> Path:
    """Save one with random weights."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    transformer = parts.seeded(
        lambda: Flux2Transformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=8,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=dev,
        )
    )
    vae = parts.seeded(
        lambda: AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=2,
            sample_size=16,
        )
    )
    vae.bn.running_mean.copy_(parts.seeded(lambda: 0.3 * vae.bn.running_mean.clone().normal_()))
    vae.bn.running_var.copy_(parts.seeded(lambda: 0.5 + vae.bn.running_var.clone().uniform_()))
    encoder, tokenizer = (_mistral(), _tokenizer(_PARTS)) if dev else (_qwen(), _tokenizer(_CHAT))
    pipeline = (Flux2Pipeline if dev else Flux2KleinPipeline)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return parts.saved(pipeline, folder)


def _tokenizer(template: str) -> Any:
    # dev's own processor needs torchvision for its pictures; what it makes of text is its tokenizer's.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = template
    return made


def _qwen() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return parts.seeded(lambda: Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=28, **_TINY)))


def _mistral() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={"model_type": "mistral", "num_hidden_layers": 31, **_TINY},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 4,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=1,
    )
    return parts.seeded(lambda: Mistral3ForConditionalGeneration(config))


_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
