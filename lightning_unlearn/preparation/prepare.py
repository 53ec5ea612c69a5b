"""From pictures and captions, or from ready arrays, to shards."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest
from lightning_unlearn.preparation.adapter_options import options_of_adapter
from lightning_unlearn.preparation.assembly import Assembly
from lightning_unlearn.preparation.buckets import BucketRule
from lightning_unlearn.preparation.choices import (
    Alpha,
    CaptionFor,
    CaptionLines,
    Crop,
    Exif,
    Masks,
    MissingCaption,
    Repeats,
    Resize,
    Trainer,
    choose,
)
from lightning_unlearn.preparation.output_folder import at_least, check_output
from lightning_unlearn.preparation.records import Reading
from lightning_unlearn.preparation.shard_by_shard import tars_of, write_shard_by_shard
from lightning_unlearn.preparation.sources import device_called, latent_source, needs_of, text_source
from lightning_unlearn.preparation.survey import Survey
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges


def prepare(
    output: str,
    images: str | None = None,
    pipeline: str | None = None,
    size: int | None = None,
    grey: bool = False,
    text_encoder: str | None = None,
    image_states: str | None = None,
    class_labels: str | None = None,
    tokens: int | None = None,
    latents: str | None = None,
    latents_flip: str | None = None,
    text: str | None = None,
    adapter: str | None = None,
    token: str | None = None,
    captions: str | None = None,
    flips: bool = False,
    vae_sample: Literal["mean", "sample"] = "mean",
    seed: int = 0,
    like: Trainer | None = None,
    caption: str | None = None,
    caption_for: CaptionFor | None = None,
    caption_lines: CaptionLines | None = None,
    caption_suffix: str | None = None,
    missing_caption: MissingCaption | None = None,
    caption_dropout: float | None = None,
    repeats: Repeats | None = None,
    exif: Exif | None = None,
    alpha: Alpha | None = None,
    crop: Crop | None = None,
    buckets: BucketRule | None = None,
    bucket_step: int | None = None,
    bucket_shortest: int | None = None,
    bucket_longest: int | None = None,
    resize: Resize | None = None,
    masks: Masks | None = None,
    mask_folder: str | None = None,
    picture_kinds: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str | None = None,
    key: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    picture_size: int = 256,
    samples_per_shard: int = 1000,
    batch_size: int = 16,
    device: str = "auto",
    on_bad_sample: Literal["error", "skip"] = "error",
    index: int = 0,
    count: int = 1,
    overwrite: bool = False,
) -> list[ShardInfo]:
    """Make shards from pictures and captions, or from latents and text embeddings that are ready.

    Latents come from the VAE of `pipeline`, from the pictures themselves (`size` without `pipeline`), or from
    `latents`. Text states come from the text encoder of `pipeline`, from `text_encoder`, or from the array `text`.
    Pictures are turned as their EXIF orientation says, laid over white where transparent, cut to the largest square in
    their middle and resized (bicubic, antialiased), if `like` or an option does not say otherwise. What is not taken is
    counted and named at the end. Only local files are read, none with pickle. No shard is left in `output` unless all
    of them are done; of tars, each is done alone, and a second run goes on where the first stopped.

    Args:
        output: Folder for the shards and their manifest.json.
        images: Folder of pictures with captions in a.txt or a.caption beside a.png, or called as kohya's trainer has
            them (10_sks dog); a folder with a metadata.csv, .jsonl or .parquet, or such a table; a Hugging Face data
            set on the disk; or tars as img2dataset writes them (braces stand for several: laion/{00000..00099}.tar),
            which become a shard each. Columns that have no meaning here go into the samples' json.
        pipeline: Folder of a diffusers pipeline (save_pretrained); its own text encoders and VAE are used as it uses
            them. One without a VAE works on pixels.
        size: Side of the square pictures in pixels; with a pipeline by default what its network was trained on.
        grey: One channel instead of three, for a network that works on pixels.
        text_encoder: Folder of a transformers encoder with its tokenizer; states of padding are set to zero. With a
            pipeline, one without a tokenizer (checkpoint-500/text_encoder) takes the place of the pipeline's own.
        image_states: Ready states of pictures for a network that takes them in the place of text (Kandinsky 2.2), an
            .npy file (N, dim), a row for each sample in their order.
        class_labels: Column with the number of each picture's class, for a network that takes classes. Pictures for
            networks without text need no captions.
        tokens: Length that captions are padded or cut to for text_encoder, or for a pipeline that lets one choose; by
            default what its tokenizer says, or what the pipeline takes.
        latents: Ready latents, an .npy file (N, C, H, W) or (N, C, F, H, W), shifted and scaled as the network was
            trained on them, a row for each sample in their order (see text); or a folder with *_sd.npz or *_sdxl.npz
            that kohya's trainer cached, which are scaled as it does.
        latents_flip: Ready latents of the mirrored pictures; or the same file as latents, if it has 2 N rows, of which
            the second half are theirs.
        text: Ready text states, an .npy file (N, captions, tokens, dim), or (N, tokens, dim) for one caption each. Row
            by row they go with the samples: of a folder in the order of sorted(paths) within it (a10.png before
            a2.png), of a table in that of its rows, of captions in theirs. Which sample has the first row and which the
            last is said.
        adapter: A LoRA whose weights for text encoders, if it has any, are merged into them; what its header says of
            its training's pictures (size, flips) is followed where no option says otherwise.
        token: Files of learned tokens (textual inversion, Custom Diffusion), with commas between them.
        captions: Captions of ready latents without images, in the arrays' order: .json (a list) or .jsonl of texts,
            lists of texts or objects with captions; .csv or .parquet; or .txt, one caption a line.
        flips: Also store the latent of the mirrored picture, which is not the mirrored latent.
        vae_sample: Keep the mean of the VAE's distribution, or a draw from it (of seed and the sample's key alone).
        seed: Of these draws.
        like: Trainer whose rules are followed; each option below, up to picture_kinds, takes precedence.
        caption: One caption for samples.
        caption_for: Whether it is for all samples (by default), or for those that are missing one.
        caption_lines: What lines of a caption file are: each a caption (by default), the first alone, or all joined.
        caption_suffix: Of caption files; by default .txt or .caption, whichever is there.
        missing_caption: What a sample without a caption gets: an error (by default), the empty caption, what its
            folder's name says after the number of repeats, or what default.txt in its folder says.
        caption_dropout: Share of the steps in which training had the empty caption in place of a sample's own; both are
            stored, with these weights.
        repeats: Whether a folder's number of repeats becomes the weight in its samples' json; by default if all folders
            have one, which then also name the samples that are missing a caption.
        exif: Turn pictures as their EXIF orientation says (by default), or keep them.
        alpha: Lay transparent pictures over white (by default), or drop transparency and show the colours beneath.
        crop: Take the middle of pictures (by default), or bring each to the shape of its bucket.
        buckets: Whose rule says which bucket that is; by default kohya's, or that of `like`; nearest is our own.
        bucket_step: Sides of buckets are multiples of it; by default 64, or the network's side where that is smaller.
        bucket_shortest: Shortest side of buckets in kohya's trainer (min_bucket_reso); by default 256.
        bucket_longest: Longest side likewise (max_bucket_reso); by default 1024.
        resize: As we do (bicubic), or as kohya's trainer or torchvision's Resize does.
        masks: Leave files called as masks out (by default), take them for pictures, or for where training had its loss
            (loss: a-masklabel.png beside a.png, or see mask_folder; alpha: a picture's transparency).
        mask_folder: Folder of masks, white where the loss was, each called as its picture; with masks=loss.
        picture_kinds: Suffixes of the pictures to take, with commas; by default all.
        image_column: Column with pictures or their paths; by default file_name, or a data set's one column of pictures.
        caption_column: Column, or name in a tar's json, with captions; by default captions, caption or text.
        split: Of a Hugging Face data set, where it has several.
        key: Column with each sample's unique name; by default the picture's path without suffix, or the row's number.
        dtype: Of the latents and text states in the shards.
        picture_size: Longer side, at most, of the picture stored for people to look at; 0 stores none.
        samples_per_shard: The largest number of samples in a shard; one shard at a time is held in memory.
        batch_size: Pictures, and captions, that are encoded at a time.
        device: Where encoders run, e.g. cpu or cuda; auto takes an accelerator if there is one.
        on_bad_sample: What to do when a picture can't be read or a caption is missing: stop, or leave it out and count.
        index: Which of `count` processes this is; each makes its share of the shards of tars.
        count: How many such processes there are.
        overwrite: Whether shards that are in the output already are made again.

    Returns:
        The shards written.

    Raises:
        InputError: If settings don't fit together, an input is missing or malformed, or the output is done already.
    """
    at_least(1, size=size, tokens=tokens, samples_per_shard=samples_per_shard, batch_size=batch_size, count=count)
    at_least(0, picture_size=picture_size, index=index)
    cached = latents is not None and Path(latents).expanduser().is_dir()
    tars = tars_of(images)
    for applies, sentence in (
        (images is None and latents is None, "Nothing to prepare: name `images`, or ready `latents`."),
        (images is None and captions is None, "Ready `latents` need `captions`, or `images` in the same order."),
        (images and captions, "Captions come with `images`; leave `captions` out, or `images`."),
        (
            not (latents or pipeline or size),
            "Say where latents come from: `pipeline`, `size` for pixels, or `latents`.",
        ),
        (
            not (text or text_encoder or image_states or class_labels or pipeline),
            "Say where text comes from: `pipeline`, `text_encoder`, or `text`.",
        ),
        (text and text_encoder, "Text comes from `text` or from `text_encoder`; leave one of them out."),
        (pipeline and latents and (text or text_encoder), "Latents and text are from elsewhere; leave `pipeline` out."),
        (latents_flip and not latents, "`latents_flip` goes with `latents`; name both, or set `flips` instead."),
        (latents and (size or grey), "Ready `latents` are stored as they are; leave `size` and `grey` out."),
        (
            latents and flips and not cached,
            "Ready `latents` can't be mirrored; name `latents_flip`, not `flips`.",
        ),
        (cached and latents_flip, "Cached latents have those of the mirrored pictures; set `flips` instead."),
        (cached and images is None, "Cached latents go with the pictures beside them; name `images`."),
        (vae_sample != "mean" and (latents or not pipeline), "`vae_sample` is for a pipeline's VAE; leave it out."),
        (pipeline and grey, "`grey` is for pixels, and a pipeline's VAE has channels of its own; leave one out."),
        (image_states and (text or text_encoder), "A network takes `image_states` or text; leave one of them out."),
        (tokens and not (text_encoder or pipeline), "`tokens` is for a `text_encoder`; name one, or leave it out."),
        (tars and (latents or text), "Ready arrays don't go with tars of pictures; leave them out."),
        (count > 1 and not tars, "`index` and `count` deal out tars; name several as `images`, or leave them out."),
        (index >= count, f"`index` must be below `count`, which is {count}, but is {index}."),
        (mask_folder and masks != "loss", "`mask_folder` is of masks that say where the loss was; set masks=loss."),
        (
            mask_folder and not Path(mask_folder).expanduser().is_dir(),
            f"There is no folder of masks at {mask_folder}; name one.",
        ),
        (caption_for and caption is None, "`caption_for` says whose `caption` is; name one, or leave it out."),
    ):
        if applies:
            raise InputError(sentence)
    choices, not_followed = choose(
        like,
        caption_lines=caption_lines,
        caption_suffix=caption_suffix,
        caption_for=caption_for,
        missing_caption=missing_caption,
        repeats=repeats,
        exif=exif,
        alpha=alpha,
        crop=crop,
        caption_dropout=caption_dropout,
        buckets=buckets,
        bucket_step=bucket_step,
        bucket_shortest=bucket_shortest,
        bucket_longest=bucket_longest,
        resize=resize,
        masks=masks,
        mask_folder=mask_folder,
        picture_kinds=picture_kinds,
    )
    folder = Path(output).expanduser()
    check_output(folder, overwrite)
    if not_followed:
        tqdm.write(f"like={like}: {'; '.join(not_followed)}.", file=sys.stderr)
    place = device_called(device)
    if adapter is not None:
        size, flips, taken = options_of_adapter(adapter, size, flips)
        if taken:
            tqdm.write(f"From the header of {adapter}: {', '.join(taken)}.", file=sys.stderr)
    tally = Tally()
    latents_from = latent_source(latents, latents_flip, pipeline, size, grey, vae_sample, seed, place, tally)
    changes = TextChanges(adapter, tuple(token.split(",")) if token else ())
    text_from = text_source(text, text_encoder, image_states, tokens, pipeline, place, batch_size, changes)
    if pipeline and "class_label" in (needs_of(Path(pipeline).expanduser()) or {}) and class_labels is None:
        raise InputError(f"The network in {pipeline} takes classes; name their column with `class_labels`.")
    given_text = "text" in text_from.shapes
    reading = Reading(images is not None, key, image_column, caption_column, caption, split, choices, tally, given_text)

    def assembly(source: str) -> Assembly:
        return Assembly(
            # What is not taken is counted for each tar alone.
            Survey(
                source, replace(reading, tally=Tally() if tars else tally), latents_from, text_from, skip, class_labels
            ),
            mirrored=flips or latents_flip is not None,
            dtype=dtype,
            picture_size=picture_size,
            batch_size=batch_size,
            told={"like": like, "not_followed": not_followed, "caption": caption, "split": split},
        )

    skip = on_bad_sample == "skip"
    if not tars:
        return assembly(str(Path(str(images or captions)).expanduser())).write(folder, samples_per_shard)
    how: list[Any] = [reading.key, caption_column, caption, flips, dtype, picture_size, skip, choices.as_json()]
    how += [latents_from.about, latents_from.shape, text_from.about, class_labels]
    settings = digest(json.dumps(how, sort_keys=True))
    return write_shard_by_shard(
        tars, assembly, folder, settings=settings, index=index, count=count, overwrite=overwrite
    )
