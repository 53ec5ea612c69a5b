"""Conditions of captions by a pipeline's own ``encode_prompt``: what its network was trained on, whichever family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from lightning_unlearn.diffusion.families import Family, family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.preparation.inputs import Array, Item
from lightning_unlearn.preparation.model_parts import (
    as_numpy,
    load_model,
    load_part,
    network_beside,
    transformers_library,
)
from lightning_unlearn.preparation.reading_length import CAPTION, watched
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges
from lightning_unlearn.weights.precision import ExactFloat32


class FamilyText:
    """Captions through all text encoders of a pipeline.

    Args:
        folder: Of the pipeline.
        family: Of its network.
        tokens: Length that captions are padded or cut to, where the pipeline lets one choose.
        device: Where the encoders run.
        batch_size: Captions at a time.
        changes: Of encoders and tokenizers.

    Raises:
        InputError: If the pipeline can't be loaded, or can't encode a caption.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        tokens: int | None,
        device: torch.device,
        batch_size: int,
        changes: TextChanges,
    ) -> None:
        self.rows: int | None = None
        self.captions: int | None = None
        self.cut = Tally()
        self.family, self.batch_size = family, batch_size
        encoders = _encoders(folder, device)
        self.pipeline = _pipeline(folder, encoders)
        self.tokenizers = {
            name.replace("tokenizer", "text_encoder"): part
            for name, part in self.pipeline.components.items()
            if name.startswith("tokenizer") and part is not None
        }
        changed = changes.apply(encoders, self.tokenizers)
        if tokens is not None and "max_sequence_length" in signature(self.pipeline.encode_prompt).parameters:
            self.pipeline.encode_prompt = partial(self.pipeline.encode_prompt, max_sequence_length=tokens)
        names = {name: name.replace("text_encoder", "tokenizer") for name in self.tokenizers}
        try:
            first, self.lengths = watched(self.pipeline, names, lambda: self._encode([CAPTION]))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            reason = (str(error).splitlines() or [""])[0][:200]
            raise InputError(f"The pipeline in {folder} can't encode a caption ({reason}); save it again.") from None
        if tokens is not None and tokens not in self.lengths.values():
            fixed = ", ".join(f"{length} of {name}" for name, length in self.lengths.items())
            raise InputError(
                f"`tokens` is for a `text_encoder`, or encoders that may read more or less; those of {family.title} "
                f"read just as many as they were trained with ({fixed}): leave it out."
            )
        self.shapes: dict[str, tuple[int, ...]] = {name: array.shape[1:] for name, array in first.items()}
        self.about: dict[str, Any] = {
            "encoder": f"{folder.resolve().name}: {', '.join(encoders)}",
            "family": family.title,
            "fingerprint": {name: tensors_digest(encoder.state_dict()) for name, encoder in encoders.items()},
            "conditions": {name: list(shape) for name, shape in self.shapes.items()},
            "padding": "as the pipeline has it",
            "tokens": self.lengths,
            **changed,
        }

    @torch.inference_mode()
    def _encode(self, captions: list[str]) -> dict[str, Array]:
        with ExactFloat32():
            conditions = self.family.encode(self.pipeline, captions)
        return {name: as_numpy(array) for name, array in conditions.items()}

    def states(self, items: Sequence[Item]) -> list[dict[str, Array]]:
        """See :class:`TextSource`."""
        captions = [caption for item in items for caption in item.record.captions]
        self._count_cut(captions)
        parts = [
            self._encode(captions[start : start + self.batch_size])
            for start in range(0, len(captions), self.batch_size)
        ]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        ends = np.cumsum([len(item.record.captions) for item in items])[:-1]
        split = {name: np.split(array, ends) for name, array in whole.items()}
        return [{name: arrays[row] for name, arrays in split.items()} for row in range(len(items))]

    def _count_cut(self, captions: list[str]) -> None:
        for name, tokenizer in self.tokenizers.items():
            length = self.lengths.get(name)
            if length is None:
                continue
            whole = tokenizer(captions, truncation=False, verbose=False)["input_ids"]
            for caption, ids in zip(captions, whole, strict=True):
                if len(ids) > length:
                    self.cut.add(f"captions are longer than the {length} tokens that {name} reads", caption[:60])


def family_text(
    folder: Path, tokens: int | None, device: torch.device, batch_size: int, changes: TextChanges
) -> FamilyText | None:
    """The text of a pipeline whose family says how its captions are encoded.

    Args:
        folder: Of the pipeline.
        tokens: Length that captions are padded or cut to; by default the pipeline's.
        device: Where encoders run.
        batch_size: Captions at a time.
        changes: Of the encoders.

    Returns:
        The source; ``None`` where the pipeline's network is not there, or its family leaves it to others.

    Raises:
        InputError: If no family knows the network, or the pipeline can't be loaded.
    """
    network = network_beside(folder)
    if network is None:
        return None
    family = family_of(network)
    own = type(family).encode is not Family.encode
    return FamilyText(folder, family, tokens, device, batch_size, changes) if own else None


def _encoders(folder: Path, device: torch.device) -> dict[str, Any]:
    """The text encoders that a pipeline names, by their names in it."""
    try:
        parts = json.loads((folder / "model_index.json").read_bytes())
        named = {name: part for name, part in parts.items() if name.startswith("text_encoder") and part[1] is not None}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise InputError(f"{folder} has no model_index.json that names its parts; save the pipeline again.") from None
    library = transformers_library()
    found: dict[str, Any] = {}
    for name, (_, class_name) in named.items():
        kind = getattr(library, str(class_name), None)
        if kind is None:
            raise InputError(f"{folder / name} is a {class_name}, which this version of transformers does not have.")
        found[name] = load_model(kind, folder / name).to(device)
    if not found:
        raise InputError(f"{folder} has no text encoder; give ready `text`.")
    return found


def _pipeline(folder: Path, encoders: dict[str, Any]) -> Any:
    # What is not needed for captions is left out, and its weights are not read.
    parts = json.loads((folder / "model_index.json").read_bytes())
    others = {
        name: None
        for name, part in parts.items()
        if isinstance(part, list) and not name.startswith(("text_encoder", "tokenizer", "scheduler"))
    }
    return load_part(diffusers.DiffusionPipeline.from_pretrained, folder, **others, **encoders)
