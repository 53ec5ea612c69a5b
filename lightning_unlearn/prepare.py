"""From pictures and captions, or from ready arrays, to shards."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_unlearn.errors import InputError
from lightning_unlearn.inputs import Array, Item, LatentSource, PixelLatents, ReadyLatents, ReadyText, TextSource
from lightning_unlearn.pictures import crop_middle, open_picture, to_pixels, to_preview
from lightning_unlearn.records import Record, read_records
from lightning_unlearn.shards import MANIFEST, ShardInfo, encode_sample, write_shards

NAME = "shard"


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

    Latents come from the VAE of `pipeline`, from the pictures themselves (`size` without `pipeline`), or from the array
    `latents`. Text states come from the text encoder of `pipeline`, from `text_encoder`, or from the array `text`. Pictures are
    turned as their EXIF orientation says, laid over white where transparent, cut to the largest square in their middle
    and resized (bicubic, antialiased). Only local files are read, none with pickle. Nothing is left in `output` unless all of it
    is done.

    Args:
        output: Folder for the shards and their manifest.json.
        images: Folder of pictures, or a table (.csv, .jsonl, .parquet) with a column file_name relative to the table's folder.
            Captions come from a column text, caption or captions; in a folder without a metadata.csv, .jsonl or .parquet from
            a.txt beside a.png, one caption a line. Other columns go into the samples' json.
        pipeline: Folder of a diffusers pipeline (save_pretrained) with an AutoencoderKL and one CLIP text encoder.
        size: Side of the square pictures in pixels; with a pipeline by default what its network was trained on.
        grey: One channel instead of three, for a network that works on pixels.
        text_encoder: Folder of a transformers encoder with its tokenizer; states of padding are set to zero.
        tokens: Length that captions are padded or cut to for text_encoder; by default what its tokenizer says.
        latents: Ready latents, an .npy file (N, C, H, W), shifted and scaled as the network was trained on them.
        latents_flip: Ready latents of the mirrored pictures.
        text: Ready text states, an .npy file (N, captions, tokens, dim), or (N, tokens, dim) for one caption each.
        captions: Captions of ready latents without images, a row each in the arrays' order: .json (a list) or .jsonl of texts,
            lists of texts or objects with captions; .csv or .parquet; or .txt, one caption a line.
        flips: Also store the latent of the mirrored picture, which is not the mirrored latent.
        vae_sample: Keep the mean of the VAE's distribution, or a draw from it (of seed and the sample's key alone).
        seed: Of these draws.
        key: Column with a unique name for each sample; by default the picture's path without suffix, else the row's number.
        dtype: Of the latents and text states in the shards.
        picture_size: Longer side, at most, of the picture stored for people to look at; 0 stores none.
        samples_per_shard: One shard's worth of samples is held in memory.
        batch_size: Pictures, and captions, that are encoded at a time.
        device: Where encoders run, e.g. cpu or cuda; auto takes an accelerator if there is one.
        on_bad_sample: What a sample gets whose picture can't be read or that has no caption: stop, or leave it out and count.
        overwrite: Whether shards that are in the output already are made again.

    Returns:
        The shards written.

    Raises:
        InputError: If settings don't fit together, an input is missing or malformed, or the output is done already.
    """
    _at_least(1, size=size, tokens=tokens, samples_per_shard=samples_per_shard, batch_size=batch_size)
    _at_least(0, picture_size=picture_size)
    _check_together(images, pipeline, size, grey, text_encoder, tokens, latents, latents_flip, text, captions, flips, vae_sample)
    folder = Path(output).expanduser()
    _check_output(folder, overwrite)
    place = _device(device)
    latent_source: LatentSource
    text_source: TextSource
    if latents is not None:
        latent_source = ReadyLatents(latents, latents_flip)
    elif pipeline is not None:
        from lightning_unlearn.encoders import VaeLatents

        latent_source = VaeLatents(Path(pipeline).expanduser(), size, vae_sample, seed, place)
    else:
        assert size is not None
        latent_source = PixelLatents(size, grey)
    if text is not None:
        text_source = ReadyText(text)
    elif text_encoder is not None:
        from lightning_unlearn.encoders import folder_text

        text_source = folder_text(Path(text_encoder).expanduser(), tokens, place, batch_size)
    else:
        from lightning_unlearn.encoders import pipeline_text

        text_source = pipeline_text(Path(pipeline).expanduser(), place, batch_size)
    ...
