"""Language models with random weights, and a tokenizer of characters for them."""

from __future__ import annotations

import string
from typing import Any

from tiny_pipelines import parts

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
_TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def tokenizer(padding_side: str = "right") -> Any:
    """Each character is a token; a text begins with one of its own, as language models have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", *string.printable]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing("<bos> $0", special_tokens=[("<bos>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side=padding_side
    )
    wrapped.chat_template = CHAT
    return wrapped


def gemma(width: int = 8) -> Any:
    """Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(**_TINY | {"hidden_size": width, "head_dim": 4})
    return parts.seeded(lambda: Gemma2Model(config), width)


def qwen_3(width: int = 8) -> Any:
    """Qwen 3."""
    from transformers import Qwen3Config, Qwen3Model

    return parts.seeded(lambda: Qwen3Model(Qwen3Config(**_TINY | {"hidden_size": width, "head_dim": 4})), width)


def glm(width: int = 8) -> Any:
    """GLM."""
    from transformers import GlmConfig, GlmModel

    config = GlmConfig(**_TINY | {"hidden_size": width, "head_dim": 4, "eos_token_id": 1})
    return parts.seeded(lambda: GlmModel(config), width)


def qwen_2_5_vision(width: int = 8) -> Any:
    """Qwen 2.5 VL, of which text alone is asked."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rotary = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=_TINY | {"hidden_size": width, "rope_scaling": rotary},
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [0],
        },
        image_token_id=126,
        video_token_id=127,
    )
    return parts.seeded(lambda: Qwen2_5_VLForConditionalGeneration(config), width)
