"""What a fine-tuned model's text encoders are beside those of its base: an adapter's weights, and learned tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_unlearn.diffusion.adapters.learned_tokens import add_learned_tokens
from lightning_unlearn.diffusion.adapters.text_encoders import merge_text_adapter


@dataclass(frozen=True)
class TextChanges:
    """Changes of a pipeline's text encoders.

    Attributes:
        adapter: A LoRA's file or folder, which may hold nothing for text encoders.
        tokens: Files of learned tokens.
    """

    adapter: str | None = None
    tokens: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.adapter is not None or bool(self.tokens)

    def apply(self, encoders: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]) -> dict[str, Any]:
        """Change encoders and tokenizers, in place.

        Args:
            encoders: The part of a pipeline, e.g. ``"text_encoder_2"``, to the encoder.
            tokenizers: The same parts to their tokenizers.

        Returns:
            What was changed, for the manifest; empty if nothing was.

        Raises:
            InputError: If a change does not fit.
        """
        about: dict[str, Any] = {}
        if self.tokens:
            about["learned_tokens"] = [
                word for path in self.tokens for word in add_learned_tokens(encoders, tokenizers, path)
            ]
        if self.adapter is not None:
            changed = merge_text_adapter(encoders, self.adapter)
            if changed:
                about["adapter_layers"] = changed
            else:
                warnings.warn(f"{self.adapter} holds nothing for text encoders, so text states are those of the base.")
        return about
