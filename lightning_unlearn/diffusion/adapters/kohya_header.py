"""What kohya's trainer wrote into a LoRA file's header: how it was trained, and what follows from it for a measurement.

Keys are those of sd-scripts' ``train_network.py`` and ``flux_train_network.py``; all values are text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_unlearn.diffusion.adapters.base_model import said_of_base
from lightning_unlearn.errors import InputError

_NONE = {"", "None", "null"}


@dataclass(frozen=True)
class TrainingFolder:
    """A folder of pictures.

    Attributes:
        name: Its name, without where it lay.
        repeats: How often a picture was seen in an epoch, relative to others.
        images: How many pictures.
        regularisation: Whether they keep the class as it was (prior preservation).
    """

    name: str
    repeats: int
    images: int
    regularisation: bool = False


@dataclass(frozen=True)
class TrainingRecord:
    """How a LoRA was trained; ``None`` where the header does not say.

    Attributes:
        base_model: The file that it was trained on.
        base_model_sha256: Of its bytes.
        base_model_hash: Of a part of them, as AUTOMATIC1111's web UI once named models.
        prediction_type: ``"epsilon"`` or ``"v_prediction"``.
        min_snr_gamma: Min-SNR's clipping point.
        zero_terminal_snr: Whether the schedule was rescaled to end in pure noise.
        noise_offset: Offset of a channel's noise.
        resolution: ``(width, height)`` in pixels.
        buckets: Whether pictures were sorted by their aspect ratio.
        caption_dropout: Share of captions left out.
        clip_skip: From which layer of CLIP, counted from its end, text states come.
        flips: Whether pictures were mirrored.
        folders: The pictures.
        others: What else bears on the loss or on what training saw, by its key, where it was set.
    """

    base_model: str | None = None
    base_model_sha256: str | None = None
    base_model_hash: str | None = None
    prediction_type: str | None = None
    min_snr_gamma: float | None = None
    zero_terminal_snr: bool = False
    noise_offset: float = 0.0
    resolution: tuple[int, int] | None = None
    buckets: bool = False
    caption_dropout: float = 0.0
    clip_skip: int | None = None
    flips: bool = False
    folders: tuple[TrainingFolder, ...] = ()
    others: Mapping[str, str] | None = None

    def preparation(self) -> dict[str, Any]:
        """The options of ``prepare`` that follow.

        Returns:
            Those that differ from its defaults.
        """
        found: dict[str, Any] = {"flips": True} if self.flips else {}
        if self.resolution is not None and self.resolution[0] == self.resolution[1]:
            found["size"] = self.resolution[0]
        return found

    def weights(self) -> dict[str, float]:
        """How often a picture of each folder was seen, relative to one of a folder without repeats.

        Returns:
            Folder name to repeats, without those of regularisation.
        """
        return {folder.name: float(folder.repeats) for folder in self.folders if not folder.regularisation}

    def unfollowed(self, base: str | None = None) -> tuple[str, ...]:
        """What the training did that a measurement here does not do.

        Args:
            base: The file that the network's weights are of, if they are of one.

        Returns:
            One sentence each.
        """
        return tuple(self._unfollowed(base))

    def _unfollowed(self, base: str | None) -> Iterator[str]:
        trained = "the adapter was trained with"
        if self.noise_offset:
            yield f"{trained} a noise offset of {self.noise_offset:g}, losses are measured with plain noise."
        if self.zero_terminal_snr:
            yield f"{trained} zero terminal SNR, so the scheduler needs rescale_betas_zero_snr: true."
        if self.buckets or (self.resolution and self.resolution[0] != self.resolution[1]):
            yield f"{trained} pictures in buckets of aspect ratios; prepare cuts squares unless it is told otherwise."
        if self.caption_dropout:
            yield f"{trained} {self.caption_dropout:.0%} of captions left out; every caption is scored."
        if self.clip_skip is not None and self.clip_skip > 1:
            yield f"{trained} clip skip {self.clip_skip}; text states of a pipeline come from its own layer."
        if sentence := said_of_base(self.base_model, self.base_model_sha256, self.base_model_hash, base):
            yield sentence
        if len({folder.repeats for folder in self.folders if not folder.regularisation}) > 1:
            said = ", ".join(f"{name}: {repeats:g}" for name, repeats in self.weights().items())
            yield f"training repeated folders differently ({said}); samples count alike unless they have weights."
        if any(folder.regularisation for folder in self.folders):
            yield f"{trained} regularisation pictures; they are samples only if they are prepared, too."
        for key, value in (self.others or {}).items():
            name = f"{trained} {key.removeprefix('ss_')} = {value}"
            # What is said of a flow the objective follows, or refuses; a mask of T5's padding neither.
            if key not in _FLOW or key == "ss_apply_t5_attn_mask":
                yield f"{name}, which is not followed."


# What bears on the loss or on what training saw, and the values that mean that it was off.
_OTHERS: Mapping[str, frozenset[str]] = {
    "ss_multires_noise_iterations": frozenset({"0"}),
    "ss_adaptive_noise_scale": frozenset({"0", "0.0"}),
    "ss_ip_noise_gamma": frozenset({"0", "0.0"}),
    "ss_debiased_estimation": frozenset({"False"}),
    "ss_loss_type": frozenset({"l2"}),
    "ss_scale_v_pred_loss_like_noise_pred": frozenset({"False"}),
    "ss_v_pred_like_loss": frozenset({"0", "0.0"}),
    "ss_caption_dropout_every_n_epochs": frozenset({"0"}),
    "ss_caption_tag_dropout_rate": frozenset({"0", "0.0"}),
    "ss_shuffle_caption": frozenset({"False"}),
    "ss_random_crop": frozenset({"False"}),
    "ss_color_aug": frozenset({"False"}),
    "ss_face_crop_aug_range": frozenset(),
}
# The same of flow matching, which the objective is told (flow_training.py).
_FLOW: Mapping[str, frozenset[str]] = {
    "ss_weighting_scheme": frozenset({"none", "uniform"}),
    "ss_logit_mean": frozenset({"0", "0.0"}),
    "ss_logit_std": frozenset({"1", "1.0"}),
    "ss_mode_scale": frozenset({"1.29"}),
    "ss_timestep_sampling": frozenset(),
    "ss_discrete_flow_shift": frozenset({"1", "1.0"}),
    "ss_sigmoid_scale": frozenset({"1", "1.0"}),
    "ss_guidance_scale": frozenset(),
    "ss_model_prediction_type": frozenset({"raw"}),
    "ss_apply_t5_attn_mask": frozenset({"False"}),
}


def read_training_record(path: str, header: Mapping[str, str]) -> TrainingRecord | None:
    """Read a header.

    Args:
        path: The file, for messages.
        header: What a safetensors file says of itself.

    Returns:
        What it says, or ``None`` if kohya's trainer did not write it.

    Raises:
        InputError: If a value is of another form than its key promises.
    """
    said = {key: value for key, value in header.items() if value not in _NONE}
    if not any(key.startswith("ss_") for key in said):
        return None
    reader = _Reader(path, said)
    datasets, folders, resolution = reader.datasets()
    return TrainingRecord(
        base_model=said.get("ss_sd_model_name"),
        base_model_sha256=said.get("ss_new_sd_model_hash"),
        base_model_hash=said.get("ss_sd_model_hash"),
        prediction_type={"v": "v_prediction"}.get(kind := said.get("modelspec.prediction_type", ""), kind or None),
        min_snr_gamma=reader.number("ss_min_snr_gamma") or None,
        zero_terminal_snr=said.get("ss_zero_terminal_snr") == "True",
        noise_offset=reader.number("ss_noise_offset") or 0.0,
        resolution=resolution,
        buckets=said.get("ss_enable_bucket") == "True" or any(entry.get("enable_bucket") for entry in datasets),
        caption_dropout=reader.number("ss_caption_dropout_rate") or 0.0,
        clip_skip=None if (skip := reader.number("ss_clip_skip")) is None else int(skip),
        flips=said.get("ss_flip_aug") == "True" or any(subset.get("flip_aug") for subset in _subsets(datasets)),
        folders=folders,
        others={key: said[key] for key, off in {**_OTHERS, **_FLOW}.items() if key in said and said[key] not in off},
    )


class _Reader:
    def __init__(self, path: str, said: Mapping[str, str]) -> None:
        self._path, self._said = path, said

    def _bad(self, key: str, wanted: str) -> InputError:
        return InputError(
            f"{self._path}: {key} in its header is {self._said[key][:80]!r}, not {wanted}; take the file as the "
            "trainer wrote it, or leave the key out."
        )

    def number(self, key: str) -> float | None:
        if key not in self._said:
            return None
        try:
            value = float(self._said[key])
        except ValueError:
            raise self._bad(key, "a number") from None
        if not math.isfinite(value) or value < 0:
            raise self._bad(key, "a number of at least 0")
        return value

    def datasets(self) -> tuple[list[dict[str, Any]], tuple[TrainingFolder, ...], tuple[int, int] | None]:
        """What a file of settings said of data, or else the command line; folders; and the one resolution."""
        entries = []
        with self._reading("ss_datasets"):
            entries = [dict(entry) for entry in json.loads(self._said.get("ss_datasets", "[]"))]
            found = [_folder(str(subset.get("image_dir", "?")), subset) for subset in _subsets(entries)]
            sizes = {(int(width), int(height)) for width, height in (entry["resolution"] for entry in entries)}
        if entries:
            return entries, tuple(found), sizes.pop() if len(sizes) == 1 else None
        for key, regularisation in (("ss_dataset_dirs", False), ("ss_reg_dataset_dirs", True)):
            with self._reading(key):
                for name, about in json.loads(self._said.get(key, "{}")).items():
                    found.append(_folder(name, {**about, "is_reg": regularisation}))
        with self._reading("ss_resolution"):
            numbers = [int(number) for number in re.findall(r"\d+", self._said.get("ss_resolution", ""))]
            if "ss_resolution" in self._said:
                width, height = numbers * 2 if len(numbers) == 1 else numbers
                return entries, tuple(found), (width, height)
        return entries, tuple(found), None

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, LookupError, AttributeError):
            raise self._bad(key, "of the form that the trainer writes") from None


def _folder(name: str, about: Mapping[str, Any]) -> TrainingFolder:
    repeats = int(about.get("num_repeats", about.get("n_repeats", 1)))
    return TrainingFolder(name, repeats, int(about.get("img_count", 0)), bool(about.get("is_reg")))


def _subsets(datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [subset for entry in datasets for subset in entry.get("subsets", [])]
