"""The sources of latents and text that settings name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lightning_unlearn.diffusion.families import Condition, family_of
from lightning_unlearn.diffusion.families.settings import setting
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.cached_latents import CachedLatents
from lightning_unlearn.preparation.encoders import folder_text, pipeline_text
from lightning_unlearn.preparation.family_text import family_text
from lightning_unlearn.preparation.inputs import LatentSource, PixelLatents, ReadyLatents, ReadyText, TextSource
from lightning_unlearn.preparation.model_parts import network_beside, network_size
from lightning_unlearn.preparation.other_conditions import NoText, ReadyImageStates
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges
from lightning_unlearn.preparation.vae import VAES, VaeLatents

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
        folder = Path(pipeline).expanduser()
        network = network_beside(folder)
        if network is not None and not any((folder / name).exists() for name in VAES):
            return PixelLatents(size or network_size(folder, 1)[0], setting(network, "in_channels") == 1)
        return VaeLatents(folder, size, vae_sample, seed, device)
    assert size is not None
    return PixelLatents(size, grey)


def text_source(
    text: str | None,
    text_encoder: str | None,
    image_states: str | None,
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
        image_states: An array of states of pictures.
        tokens: Length for it, or for the pipeline's encoders.
        pipeline: With a text encoder.
        device: Where it runs.
        batch_size: Captions at a time.
        changes: Of the encoder.

    Returns:
        The source; without any of these, one of no text.

    Raises:
        InputError: If ready text states are to be changed, or the network takes what nothing gives.
    """
    if text is not None:
        if changes:
            raise InputError("`adapter` and `token` change text encoders, but `text` is ready; leave one of them out.")
        return ReadyText(text)
    if image_states is not None:
        return ReadyImageStates(image_states)
    if text_encoder is None:
        needs = None if pipeline is None else needs_of(Path(pipeline).expanduser())
        if needs is not None and "image" in needs:
            raise InputError(
                f"The network in {pipeline} takes the state of each picture, which no part of the pipeline makes; "
                "give them ready as `image_states`."
            )
        if pipeline is None or (needs is not None and "text" not in needs):
            return NoText()
    folder = None if text_encoder is None else Path(text_encoder).expanduser()
    # A training saves a pipeline's encoder without its tokenizer, which it did not change.
    if pipeline is not None and (folder is None or not any((folder / name).is_file() for name in _TOKENIZER)):
        place = Path(pipeline).expanduser()
        found = family_text(place, tokens, device, batch_size, changes, folder)
        if found is None and tokens is not None:
            raise InputError("`tokens` is for a `text_encoder`, or encoders that may read more or less; leave it out.")
        return found or pipeline_text(place, device, batch_size, changes, folder)
    assert folder is not None
    return folder_text(folder, tokens, device, batch_size, changes)


def needs_of(folder: Path) -> Mapping[str, Condition] | None:
    """What the network of a pipeline is conditioned on.

    Args:
        folder: Of the pipeline.

    Returns:
        Name to form; ``None`` where the folder has no network.
    """
    network = network_beside(folder)
    return None if network is None else family_of(network).needs(network)


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
