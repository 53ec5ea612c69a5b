"""From pictures and captions, or from ready arrays, to shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from lightning_unlearn.data.shards import MANIFEST, ShardInfo
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.assembly import Assembly
from lightning_unlearn.preparation.encoders import VaeLatents, folder_text, pipeline_text
from lightning_unlearn.preparation.inputs import LatentSource, PixelLatents, ReadyLatents, ReadyText, TextSource


def prepare(
    output: str,
    images: str | None = None,
    pipeline: str | None = None,
    size: int | None = None,
    grey: bool = False,
    text_encoder: str | None = None,
    tokens: int | None = None,
    latents: str | None = None,
    latents_flip: str | None = None,
    text: str | None = None,
    captions: str | None = None,
    flips: bool = False,
    vae_sample: Literal["mean", "sample"] = "mean",
    seed: int = 0,
    key: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    picture_size: int = 256,
    samples_per_shard: int = 1000,
    batch_size: int = 16,
    device: str = "auto",
    on_bad_sample: Literal["error", "skip"] = "error",
    overwrite: bool = False,
) -> list[ShardInfo]:
    """Make shards from pictures and captions, or from latents and text embeddings that are ready.

    Latents come from the VAE of `pipeline`, from the pictures themselves (`size` without `pipeline`), or from the
    array `latents`. Text states come from the text encoder of `pipeline`, from `text_encoder`, or from the array
    `text`. Pictures are turned as their EXIF orientation says, laid over white where transparent, cut to the largest
    square in their middle and resized (bicubic, antialiased). Only local files are read, none with pickle. No shard is
    left in `output` unless all of them are done.

    Args:
        output: Folder for the shards and their manifest.json.
        images: Folder of pictures, or a table (.csv, .jsonl, .parquet) with a column file_name relative to its folder.
            Captions come from a column text, caption or captions; in a folder without a metadata.csv, .jsonl or
            .parquet from a.txt beside a.png, one caption a line. Other columns go into the samples' json.
        pipeline: Folder of a diffusers pipeline (save_pretrained) with an AutoencoderKL and one CLIP text encoder.
        size: Side of the square pictures in pixels; with a pipeline by default what its network was trained on.
        grey: One channel instead of three, for a network that works on pixels.
        text_encoder: Folder of a transformers encoder with its tokenizer; states of padding are set to zero.
        tokens: Length that captions are padded or cut to for text_encoder; by default what its tokenizer says.
        latents: Ready latents, an .npy file (N, C, H, W), shifted and scaled as the network was trained on them.
        latents_flip: Ready latents of the mirrored pictures.
        text: Ready text states, an .npy file (N, captions, tokens, dim), or (N, tokens, dim) for one caption each.
        captions: Captions of ready latents without images, in the arrays' order: .json (a list) or .jsonl of texts,
            lists of texts or objects with captions; .csv or .parquet; or .txt, one caption a line.
        flips: Also store the latent of the mirrored picture, which is not the mirrored latent.
        vae_sample: Keep the mean of the VAE's distribution, or a draw from it (of seed and the sample's key alone).
        seed: Of these draws.
        key: Column with each sample's unique name; by default the picture's path without suffix, or the row's number.
        dtype: Of the latents and text states in the shards.
        picture_size: Longer side, at most, of the picture stored for people to look at; 0 stores none.
        samples_per_shard: The largest number of samples in a shard; one shard at a time is held in memory.
        batch_size: Pictures, and captions, that are encoded at a time.
        device: Where encoders run, e.g. cpu or cuda; auto takes an accelerator if there is one.
        on_bad_sample: What to do when a picture can't be read or a caption is missing: stop, or leave it out and count.
        overwrite: Whether shards that are in the output already are made again.

    Returns:
        The shards written.

    Raises:
        InputError: If settings don't fit together, an input is missing or malformed, or the output is done already.
    """
    _at_least(1, size=size, tokens=tokens, samples_per_shard=samples_per_shard, batch_size=batch_size)
    _at_least(0, picture_size=picture_size)
    for applies, sentence in (
        (images is None and latents is None, "Nothing to prepare: name `images`, or ready `latents`."),
        (images is None and captions is None, "Ready `latents` need `captions`, or `images` in the same order."),
        (images and captions, "Captions come with `images`; leave `captions` out, or `images`."),
        (
            not (latents or pipeline or size),
            "Say where latents come from: `pipeline`, `size` for pixels, or `latents`.",
        ),
        (not (text or text_encoder or pipeline), "Say where text comes from: `pipeline`, `text_encoder`, or `text`."),
        (text and text_encoder, "Text comes from `text` or from `text_encoder`; leave one of them out."),
        (pipeline and latents and (text or text_encoder), "Latents and text are from elsewhere; leave `pipeline` out."),
        (latents_flip and not latents, "`latents_flip` goes with `latents`; name both, or set `flips` instead."),
        (latents and (size or grey), "Ready `latents` are stored as they are; leave `size` and `grey` out."),
        (latents and flips, "Ready `latents` can't be mirrored; name `latents_flip` instead of `flips`."),
        (vae_sample != "mean" and (latents or not pipeline), "`vae_sample` is for a pipeline's VAE; leave it out."),
        (pipeline and grey, "`grey` is for pixels, and a pipeline's VAE has channels of its own; leave one out."),
        (tokens and not text_encoder, "`tokens` is for a `text_encoder`; name one, or leave it out."),
    ):
        if applies:
            raise InputError(sentence)
    folder = Path(output).expanduser()
    _check_output(folder, overwrite)
    place = _device(device)
    assembly = Assembly(
        source=str(images or captions),
        with_pictures=images is not None,
        key=key,
        latents=_latent_source(latents, latents_flip, pipeline, size, grey, vae_sample, seed, place),
        text=_text_source(text, text_encoder, tokens, pipeline, place, batch_size),
        mirrored=flips or latents_flip is not None,
        dtype=dtype,
        picture_size=picture_size,
        batch_size=batch_size,
        skip=on_bad_sample == "skip",
    )
    return assembly.write(folder, samples_per_shard)


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that can't take shards, or has them.

    Args:
        folder: Where shards are to go; made if it is not there.
        overwrite: Whether shards that are there may be replaced.

    Raises:
        InputError: If it is refused.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made ({error.strerror}); choose another output.") from None
    if (folder / MANIFEST).exists() and not overwrite:
        try:
            shards = json.loads((folder / MANIFEST).read_bytes())["shards"]
            done = f"{sum(shard['samples'] for shard in shards)} samples in {len(shards)} shards"
        except (ValueError, KeyError, TypeError):
            done = "a manifest"
        raise InputError(
            f"{folder} is done already: it holds {done}; use them, choose another output, or set overwrite=true."
        )


def _latent_source(
    latents: str | None,
    latents_flip: str | None,
    pipeline: str | None,
    size: int | None,
    grey: bool,
    vae_sample: str,
    seed: int,
    device: torch.device,
) -> LatentSource:
    if latents is not None:
        return ReadyLatents(latents, latents_flip)
    if pipeline is not None:
        return VaeLatents(Path(pipeline).expanduser(), size, vae_sample, seed, device)
    assert size is not None
    return PixelLatents(size, grey)


def _text_source(
    text: str | None,
    text_encoder: str | None,
    tokens: int | None,
    pipeline: str | None,
    device: torch.device,
    batch_size: int,
) -> TextSource:
    if text is not None:
        return ReadyText(text)
    if text_encoder is not None:
        return folder_text(Path(text_encoder).expanduser(), tokens, device, batch_size)
    assert pipeline is not None
    return pipeline_text(Path(pipeline).expanduser(), device, batch_size)


def _at_least(least: int, **settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < least:
            raise InputError(f"`{name}` must be at least {least}, but is {value}.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"There is no device {name!r} here ({reason}); use cpu, or auto.") from None
    return device
