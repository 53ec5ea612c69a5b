"""What trainers do differently with one and the same folder of pictures and captions, choice by choice."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.buckets import BucketRule, Buckets

Trainer = Literal["kohya", "simpletuner", "onetrainer", "ai-toolkit", "diffusers"]
CaptionLines = Literal["each", "first", "joined"]
CaptionFor = Literal["all", "missing"]
MissingCaption = Literal["error", "empty", "folder", "default_file"]
Repeats = Literal["auto", "folder", "none"]
Exif = Literal["turn", "keep"]
Alpha = Literal["white", "drop"]
Crop = Literal["middle", "bucket"]
Resize = Literal["bicubic", "kohya", "torchvision"]
Masks = Literal["leave_out", "picture", "loss", "alpha"]


@dataclass(frozen=True)
class Choices:
    """How pictures and captions are read.

    Attributes:
        caption_lines: What a caption file of several lines means: a caption each, the first alone, or all joined by
            commas into one.
        caption_suffix: Of caption files; ``None`` takes ``.txt`` or ``.caption``, whichever lies beside a picture.
        caption_for: Whether ``caption`` is the caption of all samples, or of those alone that have no other.
        missing_caption: What a sample without a caption gets: it is bad, or has the empty one, or the words in its
            folder's name after the number of repeats, or what ``default.txt`` in its folder says; the empty one if
            there are no such words, or no such file.
        repeats: Whether ``10_sks dog`` means ten repeats of what lies in it; ``"auto"`` if all pictures lie so.
        exif: Whether a picture is turned as its EXIF orientation says.
        alpha: Whether what is transparent becomes white, or shows the colours that lie hidden in it.
        crop: Whether the middle of a picture is taken, or its bucket's shape.
        resize: The middle cut out, then bicubic; or the whole resized as a trainer does it, then cut.
        buckets: Whose rule says which bucket's shape a picture gets.
        bucket_step: Sides of buckets are multiples of it.
        bucket_shortest: Shortest side of buckets, in kohya's trainer.
        bucket_longest: Longest side, likewise.
        caption_dropout: Share of the steps in which training had the empty caption in place of a sample's own.
        masks: Whether files called as masks are left out, or are pictures, or say where the loss was; or whether
            transparency says it.
        mask_folder: Where masks are that don't lie beside pictures, each called as its picture.
        picture_kinds: Suffixes of pictures, with commas; ``None`` takes all that can be read.
    """

    caption_lines: CaptionLines = "each"
    caption_suffix: str | None = None
    caption_for: CaptionFor = "all"
    missing_caption: MissingCaption = "error"
    repeats: Repeats = "auto"
    exif: Exif = "turn"
    alpha: Alpha = "white"
    crop: Crop = "middle"
    resize: Resize = "bicubic"
    buckets: BucketRule = "kohya"
    bucket_step: int = 64
    bucket_shortest: int = 256
    bucket_longest: int = 1024
    caption_dropout: float = 0.0
    masks: Masks = "leave_out"
    mask_folder: str | None = None
    picture_kinds: str | None = None

    def bucket(self, network: tuple[int, int], height: int, width: int) -> tuple[int, int]:
        """The shape to which a picture is brought.

        Args:
            network: ``(height, width)`` that a network was trained on.
            height: The picture's.
            width: The picture's.

        Returns:
            ``(height, width)``; the network's, if there are no buckets.
        """
        if self.crop != "bucket":
            return network
        side = (network[0] * network[1]) ** 0.5
        # A network of small pictures has no room for a step of 64.
        of = Buckets(self.buckets, side, min(self.bucket_step, *network), self.bucket_shortest, self.bucket_longest)
        return of.shape_of(height, width)

    def as_json(self) -> dict[str, Any]:
        """The choices for a manifest."""
        return asdict(self)


# Each trainer's rules as its documentation and public behaviour have them; what they share with ours is not repeated.
_RULES: dict[str, dict[str, Any]] = {
    "kohya": {
        "caption_lines": "first",
        "caption_for": "missing",
        "missing_caption": "folder",
        "repeats": "folder",
        "exif": "keep",
        "alpha": "drop",
        "crop": "bucket",
        "resize": "kohya",
        "masks": "picture",
        "picture_kinds": ".png,.jpg,.jpeg,.webp,.bmp,.avif,.jxl",
    },
    "simpletuner": {
        "caption_for": "missing",
        "crop": "bucket",
        "buckets": "nearest",
        "masks": "picture",
        "repeats": "none",
    },
    "onetrainer": {
        "caption_for": "missing",
        "crop": "bucket",
        "buckets": "nearest",
        "repeats": "none",
        "caption_suffix": ".txt",
    },
    "ai-toolkit": {
        "caption_lines": "joined",
        "caption_suffix": ".txt",
        "caption_for": "missing",
        "missing_caption": "default_file",
        "alpha": "drop",
        "crop": "bucket",
        "buckets": "ai-toolkit",
        "masks": "picture",
        "repeats": "none",
    },
    "diffusers": {"alpha": "drop", "resize": "torchvision", "masks": "picture", "repeats": "none"},
}

# What a trainer did that can't be told from its folder, or can't be followed.
_NOT_FOLLOWED: dict[str, tuple[str, ...]] = {
    "kohya": (
        "caption dropout, shuffled tags and random crops are not followed (but see caption_dropout)",
        "reg pictures are not balanced",
    ),
    "simpletuner": (
        "of several lines one was drawn at a time, and all are scored",
        "what it made of transparency is not known here, and is white",
        "its buckets are not known here, and each side is brought to the nearest multiple of the step",
    ),
    "onetrainer": (
        "of several lines one was drawn at a time, and all are scored",
        "what it made of transparency is not known here, and is white",
        "its buckets are not known here, and each side is brought to the nearest multiple of the step",
        "a loss on masks is followed with masks=loss alone, and then nothing of what lies outside counts",
    ),
    "ai-toolkit": ("a trigger word, caption dropout and shuffled tags are not followed (but see caption_dropout)",),
    "diffusers": ("crops are random there without --center_crop, and are the middle here",),
}


def choose(like: str | None, **single: Any) -> tuple[Choices, list[str]]:
    """The choices of a trainer, with whatever was chosen singly in place of its.

    Args:
        like: The trainer; ``None`` for our own choices.
        **single: Fields of :class:`Choices`; ``None`` where nothing was chosen.

    Returns:
        The choices, and a clause on each thing of the trainer's that is not followed.

    Raises:
        InputError: If the trainer is not known, or a number is out of range.
    """
    if like is not None and like not in _RULES:
        raise InputError(f"like={like!r} is none of {', '.join(get_args(Trainer))}; name one, or make each choice.")
    known = {field.name for field in fields(Choices)}
    chosen = {name: value for name, value in single.items() if value is not None}
    assert chosen.keys() <= known
    for name in ("caption_suffix",):
        if name in chosen:
            chosen[name] = "." + chosen[name].lstrip(".")
    if not 0 <= chosen.get("caption_dropout", 0) < 1:
        raise InputError(f"caption_dropout must be from 0 on and below 1, but is {chosen['caption_dropout']}.")
    shortest, longest = chosen.get("bucket_shortest", 256), chosen.get("bucket_longest", 1024)
    if min(chosen.get("bucket_step", 1), shortest) < 1 or shortest > longest:
        raise InputError(
            f"Buckets need a bucket_step from 1 on, and a bucket_shortest ({shortest}) not above bucket_longest "
            f"({longest})."
        )
    choices = Choices(**{**_RULES.get(like or "", {}), **chosen})
    return choices, list(_NOT_FOLLOWED.get(like or "", ()))
