"""The sources of latents and text that settings name."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.cached_latents import CachedLatents
from lightning_unlearn.preparation.encoders import folder_text, pipeline_text
from lightning_unlearn.preparation.family_text import family_text
from lightning_unlearn.preparation.inputs import LatentSource, PixelLatents, ReadyLatents, ReadyText, TextSource
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges
from lightning_unlearn.preparation.vae import VaeLatents

# What transformers saves of a tokenizer.
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "spiece.model")


def latent_source(
    latents: str | None,
    latents_flip: str | None,
    pipeline: str | None,
    size: int | None,
    grey: bool,
    vae_sample: str,
    seed: int,
    device: torch.device,
    tally: Tally,
) -> LatentSource:
    """Where latents come from.

    Args:
        latents: An array, or a folder of latents that kohya's trainer cached.
        latents_flip: An array of those of the mirrored pictures.
        pipeline: With a VAE.
        size: Side of the pictures, in pixels.
        grey: Whether they have one channel.
        vae_sample: What is kept of a VAE's distribution.
        seed: Of draws from it.
        device: Where it runs.
        tally: Counts cached latents that are of no use.

    Returns:
        The source.
    """
    if latents is not None and Path(latents).expanduser().is_dir():
        return CachedLatents(Path(latents).expanduser(), tally)
    if latents is not None:
        return ReadyLatents(latents, latents_flip)
    if pipeline is not None:
        return VaeLatents(Path(pipeline).expanduser(), size, vae_sample, seed, device)
    assert size is not None
    return PixelLatents(size, grey)


def text_source(
    text: str | None,
    text_encoder: str | None,
    tokens: int | None,
    pipeline: str | None,
    device: torch.device,
    batch_size: int,
    changes: TextChanges,
) -> TextSource:
    """Where text states come from.

    Args:
        text: An array.
        text_encoder: Folder of an encoder.
        tokens: Length for it.
        pipeline: With a text encoder.
        device: Where it runs.
        batch_size: Captions at a time.
        changes: Of the encoder.

    Returns:
        The source.

    Raises:
        InputError: If ready text states are to be changed.
    """
    if text is not None:
        if changes:
            raise InputError("`adapter` and `token` change text encoders, but `text` is ready; leave one of them out.")
        return ReadyText(text)
    folder = None if text_encoder is None else Path(text_encoder).expanduser()
    # A training saves a pipeline's encoder without its tokenizer, which it did not change.
    if pipeline is not None and (folder is None or not any((folder / name).is_file() for name in _TOKENIZER)):
        found = None if folder is not None else family_text(Path(pipeline).expanduser(), device, batch_size, changes)
        return found or pipeline_text(Path(pipeline).expanduser(), device, batch_size, changes, folder)
    assert folder is not None
    return folder_text(folder, tokens, device, batch_size, changes)


def device_called(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: Of torch's, or ``"auto"`` for an accelerator if there is one.

    Returns:
        The device.

    Raises:
        InputError: If it is not here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"There is no device {name!r} here ({reason}); use cpu, or auto.") from None
    return device
