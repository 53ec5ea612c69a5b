"""Learned tokens (textual inversion, Custom Diffusion): a tokenizer and a text encoder that know them.

Gal et al. (arXiv 2208.01618) learn the embedding of a new word; several vectors for one word are several tokens behind
each other, which diffusers calls ``<word>``, ``<word>_1``, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_unlearn.diffusion.checkpoints import read_content
from lightning_unlearn.errors import InputError

# What trainers of models with several encoders call an encoder's vectors.
_PARTS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}

_BESIDE_WEIGHTS = ("modifier_token", "modifier_tokens")


@dataclass(frozen=True)
class LearnedToken:
    """The vectors of a word.

    Attributes:
        word: As it stands in captions.
        vectors: ``(n, dim)``.
        part: The part of the pipeline that they are for; ``None`` where the file does not say.
    """

    word: str
    vectors: Tensor
    part: str | None = None


def read_learned_tokens(path: str) -> list[LearnedToken]:
    """The words of a file.

    Args:
        path: As diffusers (``learned_embeds.safetensors``), Custom Diffusion (``<new1>.bin``), kohya or AUTOMATIC1111's
            web UI write it; read without running anything in it. Where a file does not say its word, its name does.

    Returns:
        The words.

    Raises:
        InputError: If it holds no vectors.
    """
    content, stem = read_content(path), Path(path).stem
    # The paper of Custom Diffusion keeps them beside its weights.
    content = next((content[name] for name in _BESIDE_WEIGHTS if isinstance(content.get(name), Mapping)), content)
    named = content.get("string_to_param")
    if isinstance(named, Mapping):
        word = content.get("name") if isinstance(content.get("name"), str) else stem
        content = dict(zip([word], named.values(), strict=False))  # the web UI's have one word
    tokens = []
    for key, value in content.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (1, 2):
            word = stem if key in _PARTS or key == "emb_params" else str(key)
            tokens.append(LearnedToken(word, value.detach().reshape(-1, value.shape[-1]).float(), _PARTS.get(str(key))))
    if not tokens or len(tokens) < sum(isinstance(value, Tensor) for value in content.values()):
        raise InputError(
            f"{path} is no file of learned tokens, which has a vector or a table of them for each word; give the "
            "learned_embeds or <new1> that the training saved."
        )
    return tokens


def add_learned_tokens(encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], path: str) -> list[str]:
    """Make tokenizers and encoders know the words of a file, in place.

    Args:
        encoders: The part of a pipeline, e.g. ``"text_encoder_2"``, to the encoder.
        tokenizers: The same parts to their tokenizers.
        path: See :func:`read_learned_tokens`.

    Returns:
        The words.

    Raises:
        InputError: If there is a word already, or vectors fit no encoder.
    """
    tokens = read_learned_tokens(path)
    for token in tokens:
        part = _part(path, token, encoders)
        encoder: Any = encoders[part]
        tokenizer = tokenizers[part]
        names = [token.word, *(f"{token.word}_{number}" for number in range(1, len(token.vectors)))]
        known = [name for name in names if name in tokenizer.get_vocab()]
        if known:
            raise InputError(f"{path} adds {known[0]!r}, which the tokenizer has already; leave the file out.")
        tokenizer.add_tokens(names)
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        weights = encoder.get_input_embeddings().weight.data
        weights[tokenizer.convert_tokens_to_ids(names)] = token.vectors.to(weights)
    return list(dict.fromkeys(token.word for token in tokens))


def spread_words(captions: Sequence[str], tokenizer: Any) -> list[str]:
    """Captions with every vector of a learned word behind it.

    Args:
        captions: The captions.
        tokenizer: That knows the words.

    Returns:
        The captions as diffusers' pipelines hand them to their tokenizers.
    """
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    return list(TextualInversionLoaderMixin().maybe_convert_prompt(list(captions), tokenizer))


def _part(path: str, token: LearnedToken, encoders: Mapping[str, nn.Module]) -> str:
    widths = {part: _embeddings(encoder).shape[1] for part, encoder in encoders.items()}
    fitting = [part for part, width in widths.items() if width == token.vectors.shape[1]]
    if token.part is not None:
        fitting = [part for part in fitting if part == token.part]
    if len(fitting) != 1:
        said = ", ".join(f"{part} takes {width}" for part, width in widths.items())
        raise InputError(
            f"{path}: the vectors of {token.word!r} have {token.vectors.shape[1]} numbers, but {said}; the file is of "
            "another model."
        )
    return fitting[0]


def _embeddings(encoder: Any) -> Tensor:
    weight: Tensor = encoder.get_input_embeddings().weight
    return weight
