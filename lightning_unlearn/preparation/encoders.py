"""The encoders of ``prepare``: a pipeline's VAE, a pipeline's text encoder, a text encoder of its own.

All are read from local folders, from safetensors alone, and run in float32, without TF32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unlearn.diffusion.adapters.learned_tokens import spread_words
from lightning_unlearn.diffusion.checkpoints import check_safetensors, variant_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for, tensors_digest
from lightning_unlearn.preparation.inputs import Array, Item, stack_pixels
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.tally import Tally
from lightning_unlearn.preparation.text_changes import TextChanges
from lightning_unlearn.weights.precision import ExactFloat32


class VaeLatents:
    """Latents of a pipeline's VAE as its network was trained on them: shifted and scaled.

    Args:
        folder: Of the pipeline.
        size: Side of the square pictures; by default the network's ``sample_size`` times the VAE's scale.
        kept: Whether the mean of the VAE's distribution is kept, or a draw from it.
        seed: Of the draws; each is a function of it, the sample's key and the flip alone.
        device: Where the VAE runs.

    Raises:
        InputError: If the folder has no usable VAE, or the size does not suit it.
    """

    def __init__(self, folder: Path, size: int | None, kept: str, seed: int, device: torch.device) -> None:
        config = _config(folder / "vae")
        if config.get("_class_name") != "AutoencoderKL" or config.get("in_channels", 3) not in (1, 3):
            raise InputError(f"{folder / 'vae'} is no AutoencoderKL for grey or RGB pictures; give ready `latents`.")
        scale = 2 ** (len(config.get("block_out_channels", [64])) - 1)
        self.rows: int | None = None
        self.crop: tuple[int, int] | None = (size, size) if size is not None else _network_size(folder, scale)
        if any(side % scale for side in self.crop):
            raise InputError(f"{folder}'s VAE can't take pictures of {self.crop}; set size to a multiple of {scale}.")
        from diffusers import AutoencoderKL

        self.vae = _load_model(AutoencoderKL, folder / "vae", low_cpu_mem_usage=False).to(device)
        self.mode = "L" if config.get("in_channels") == 1 else "RGB"
        self.shape: tuple[int, ...] = (config.get("latent_channels", 4), *(side // scale for side in self.crop))
        # Some VAEs normalise each channel (diffusers' latents_mean, latents_std), others have one shift for all.
        shift = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
        spread = config.get("latents_std") or [1.0]
        self.shift = torch.tensor(shift, device=device)[:, None, None]
        self.factor = config.get("scaling_factor", 0.18215) / torch.tensor(spread, device=device)[:, None, None]
        self.kept, self.seed, self.device = kept, seed, device
        self.about: dict[str, Any] = {
            "space": "latent",
            "vae": f"{folder.resolve().name}/vae",
            "vae_fingerprint": tensors_digest(self.vae.state_dict()),
            "vae_sample": kept,
            "shift": self.shift.flatten().tolist(),
            "factor": self.factor.flatten().tolist(),
            **({"seed": seed} if kept == "sample" else {}),
        }

    def facts(self, record: Record) -> dict[str, Any]:
        """See :class:`LatentSource`; it makes a latent of each picture."""
        return {}

    @torch.inference_mode()
    def latents(self, items: Sequence[Item], *, mirrored: bool) -> Array:
        """See :class:`LatentSource`."""
        pixels = torch.from_numpy(stack_pixels(items, mirrored=mirrored)).to(self.device)
        with ExactFloat32():
            distribution = self.vae.encode(pixels).latent_dist
        latents = distribution.mean  # (B, C, H, W)
        if self.kept == "sample":
            side = "mirrored" if mirrored else "picture"
            noise = [
                torch.randn(latents.shape[1:], generator=generator_for("prepare", self.seed, item.record.key, side))
                for item in items
            ]
            latents = latents + distribution.std * torch.stack(noise).to(latents)
        return _numpy((latents - self.shift) * self.factor)


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
        self.shape: tuple[int, ...] = (tokens, dim)
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
            return _numpy(self.encoder(batch["input_ids"])[0])  # (captions, tokens, dim)
        mask = batch["attention_mask"]
        return _numpy(self.encoder(input_ids=batch["input_ids"], attention_mask=mask)[0] * mask[..., None])

    def states(self, items: Sequence[Item]) -> list[Array]:
        """See :class:`TextSource`."""
        captions = [caption for item in items for caption in item.record.captions]
        self._count_cut(captions)
        parts = [
            self._encode(captions[start : start + self.batch_size])
            for start in range(0, len(captions), self.batch_size)
        ]
        ends = np.cumsum([len(item.record.captions) for item in items])[:-1]
        return np.split(np.concatenate(parts), ends)

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
    config = _config(place)
    # diffusers hands the encoder a mask of the padding where its config says so; Stable Diffusion's does not.
    plain = config.get("model_type") == "clip_text_model" and not config.get("use_attention_mask")
    if not plain or (folder / "text_encoder_2").exists():
        raise InputError(f"{folder} has not just one CLIP text encoder; give ready `text`, or a `text_encoder`.")
    transformers = _transformers()
    encoder = _load_model(transformers.CLIPTextModel, place).to(device)
    tokenizer = _load(transformers.AutoTokenizer.from_pretrained, folder / "tokenizer")
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
    _config(folder)
    transformers = _transformers()
    tokenizer = _load(transformers.AutoTokenizer.from_pretrained, folder)
    length = tokens if tokens is not None else tokenizer.model_max_length
    if length > 4096:
        raise InputError(f"The tokenizer in {folder} does not say how long a caption may be; set `tokens`.")
    model = _load_model(transformers.AutoModel, folder)
    # T5 saved without its decoder still loads with one (of random weights), so the config can't be asked.
    encoder = model.encoder if hasattr(model, "encoder") and hasattr(model, "decoder") else model
    about = changes.apply({"text_encoder": encoder}, {"text_encoder": tokenizer})
    return _changed(EncodedText(encoder.to(device), tokenizer, length, True, batch_size, folder.resolve().name), about)


def _changed(text: EncodedText, about: dict[str, Any]) -> EncodedText:
    # Beside the encoder's digest, which is of what it became.
    text.about |= about
    return text


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"There is no {path}; name a folder that save_pretrained made, of diffusers or transformers.")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a config; save the model again with save_pretrained.")
    return config


def _network_size(folder: Path, scale: int) -> tuple[int, int]:
    """``(height, width)`` in pixels that a pipeline's network was trained on."""
    for name in ("unet", "transformer"):
        if (folder / name / "config.json").is_file():
            match _config(folder / name).get("sample_size"):
                case int(side):
                    return side * scale, side * scale
                case [int(height), int(width)]:
                    return height * scale, width * scale
    raise InputError(f"{folder} has no unet or transformer that says its sample_size; set size, in pixels.")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("Text encoders need transformers; `pip install lightning-unlearn[text]`.") from None
    return transformers


def _load_model(kind: Any, folder: Path, **settings: Any) -> Any:
    check_safetensors(folder)
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors file; save the model again with save_pretrained.")
    settings |= {"use_safetensors": True, "output_loading_info": True, "variant": variant_of(folder)}
    model, info = _load(kind.from_pretrained, folder, **settings)
    # Weights that the file lacks are random; that is harmless only for a decoder and a pooler, which are not used.
    missing = [name for name in info["missing_keys"] if not name.startswith(("decoder.", "post_quant", "pooler."))]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} weights of its model (e.g. {min(missing)}); save it again.")
    return model.to(torch.float32).eval()


def _load(loader: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; name one that save_pretrained made.")
    try:
        return loader(str(folder), local_files_only=True, **settings)
    except Exception as error:  # loaders raise nearly anything at damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{folder} can't be loaded ({reason}); save it again with save_pretrained.") from None


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array
