"""Text encoders of ``prepare``: a pipeline's only one, or one of its own.

They are read from local folders, from safetensors alone, and run in float32, without TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_unlearn.diffusion.adapters.learned_tokens import spread_words
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.preparation.inputs import Array, Item
from lightning_unlearn.preparation.model_parts import as_numpy, config_of, load_model, load_part, transformers_library
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges


class EncodedText:
    """Captions through a frozen text encoder.

    Args:
        encoder: Of transformers, in eval mode.
        tokenizer: Its tokenizer.
        tokens: Length that captions are padded or cut to.
        masked: Whether padding is kept from the encoder and its states set to zero; Stable Diffusion's is not.
        batch_size: Captions at a time.
        name: What the manifest calls it.

    Raises:
        InputError: If the encoder can't encode a caption.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, tokens: int, masked: bool, batch_size: int, name: str
    ) -> None:
        self.rows: int | None = None
        self.captions: int | None = None
        self.cut = Tally()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.tokens, self.masked, self.batch_size = tokens, masked, batch_size
        try:
            dim = self._encode(["a caption"]).shape[-1]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise InputError(
                f"The text encoder {name} can't encode a caption in {tokens} tokens ({reason}); "
                "give another, or fewer `tokens`."
            ) from None
        self.shapes: dict[str, tuple[int, ...]] = {"text": (tokens, dim)}
        self.about: dict[str, Any] = {
            "shape": [tokens, dim],
            "encoder": name,
            "fingerprint": tensors_digest(encoder.state_dict()),
            "padding": "zero" if masked else "as encoded",
        }

    @torch.inference_mode()
    def _encode(self, captions: list[str]) -> Array:
        device = next(self.encoder.parameters()).device
        batch = self.tokenizer(
            spread_words(captions, self.tokenizer),
            padding="max_length",
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        ).to(device)
        if not self.masked:
            return as_numpy(self.encoder(batch["input_ids"])[0])  # (captions, tokens, dim)
        mask = batch["attention_mask"]
        return as_numpy(self.encoder(input_ids=batch["input_ids"], attention_mask=mask)[0] * mask[..., None])

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """See :class:`TextSource`."""
        captions = [caption for item in items for caption in item.record.captions]
        self._count_cut(captions)
        parts = [
            self._encode(captions[start : start + self.batch_size])
            for start in range(0, len(captions), self.batch_size)
        ]
        ends = np.cumsum([len(item.record.captions) for item in items])[:-1]
        return [{"text": states} for states in np.split(np.concatenate(parts), ends)]

    def _count_cut(self, captions: list[str]) -> None:
        whole = self.tokenizer(spread_words(captions, self.tokenizer), truncation=False, verbose=False)["input_ids"]
        for caption, ids in zip(captions, whole, strict=True):
            if len(ids) > self.tokens:
                self.cut.add(f"captions are longer than the {self.tokens} tokens that are read", caption[:60])


def pipeline_text(
    folder: Path, device: torch.device, batch_size: int, changes: TextChanges, tuned: Path | None = None
) -> EncodedText:
    """The text encoder of a Stable Diffusion 1 or 2 pipeline, used as its training does.

    Args:
        folder: Of the pipeline.
        device: Where it runs.
        batch_size: Captions at a time.
        changes: Of the encoder and its tokenizer.
        tuned: Folder of an encoder that takes the place of the pipeline's, whose tokenizer it has.

    Returns:
        The source.

    Raises:
        InputError: If the pipeline has not exactly one CLIP text encoder.
    """
    place = tuned if tuned is not None else folder / "text_encoder"
    config = config_of(place)
    # diffusers hands the encoder a mask of the padding where its config says so; Stable Diffusion's does not.
    plain = config.get("model_type") == "clip_text_model" and not config.get("use_attention_mask")
    if not plain or (folder / "text_encoder_2").exists():
        raise InputError(f"{folder} has not just one CLIP text encoder; give ready `text`, or a `text_encoder`.")
    transformers = transformers_library()
    encoder = load_model(transformers.CLIPTextModel, place).to(device)
    tokenizer = load_part(transformers.AutoTokenizer.from_pretrained, folder / "tokenizer")
    about = changes.apply({"text_encoder": encoder}, {"text_encoder": tokenizer})
    tokens = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    name = f"{place.resolve().parent.name}/{place.name}"
    return _changed(EncodedText(encoder, tokenizer, tokens, False, batch_size, name), about)


def folder_text(
    folder: Path, tokens: int | None, device: torch.device, batch_size: int, changes: TextChanges
) -> EncodedText:
    """A transformers encoder with its tokenizer in one folder; of an encoder-decoder the encoder alone.

    Args:
        folder: As ``save_pretrained`` made it.
        tokens: Length that captions are padded or cut to; by default the tokenizer's.
        device: Where it runs.
        batch_size: Captions at a time.
        changes: Of the encoder and its tokenizer.

    Returns:
        The source.

    Raises:
        InputError: If the folder can't be loaded, or the length is unknown.
    """
    config_of(folder)
    transformers = transformers_library()
    tokenizer = load_part(transformers.AutoTokenizer.from_pretrained, folder)
    length = tokens if tokens is not None else tokenizer.model_max_length
    if length > 4096:
        raise InputError(f"The tokenizer in {folder} does not say how long a caption may be; set `tokens`.")
    model = load_model(transformers.AutoModel, folder)
    # T5 saved without its decoder still loads with one (of random weights), so the config can't be asked.
    encoder = model.encoder if hasattr(model, "encoder") and hasattr(model, "decoder") else model
    about = changes.apply({"text_encoder": encoder}, {"text_encoder": tokenizer})
    return _changed(EncodedText(encoder.to(device), tokenizer, length, True, batch_size, folder.resolve().name), about)


def _changed(text: EncodedText, about: dict[str, Any]) -> EncodedText:
    # Beside the encoder's digest, which is of what it became.
    text.about |= about
    return text
