"""Make the data of the quicker bench: 200 handwritten digits at 8x8 with captions, and others to customise models with.

A latent is a picture with each 2x2 block's pixels as channels, (4, 4, 4) for (1, 8, 8): nothing is lost, and a network
at 4x4 takes a third of the time.

Needs ``pip install lightning-unlearn[bench]``: the pictures ship with scikit-learn. Run twice on one machine it gives
the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minilm import ENCODER, encode_captions
from torch.nn.functional import pixel_unshuffle

from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.fingerprints import digest

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin ", "", "bold ")
PER_DIGIT = 20
TOKENS = 8
SAMPLES_PER_SHARD = 50
SOURCE = "scikit-learn's load_digits: Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI"
OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "digits"
# A model is customised with pictures of a kind that it has never seen, digits lying on their side: for each digit twice
# a picture that is not in the training data, with the two that are most like it.
CONCEPTS_PER_DIGIT = 2
EXEMPLARS = 3
NEUTRAL = "a handwritten digit"

Array = np.ndarray[Any, Any]


def load() -> tuple[Array, Array, list[str]]:
    """All pictures of the package with captions that say what can be seen: the stroke and the digit.

    Returns:
        Pictures ``(N, 8, 8)`` in [-1, 1], digits ``(N,)`` and captions. A third of each digit, by its mean ink, is
        called thin and a third bold.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures, digits = loaded.images.astype(np.float32) / 8 - 1, loaded.target
    ink = pictures.mean((1, 2))
    captions = []
    for value, digit in zip(ink, digits, strict=True):
        stroke = int(np.searchsorted(np.quantile(ink[digits == digit], [1 / 3, 2 / 3]), value))
        captions.append(f"a {STROKES[stroke]}handwritten {WORDS[digit]}")
    return pictures, digits, captions


def chosen(digits: Array) -> list[int]:
    """The numbers of the training pictures: of each digit those whose digests come first, in the order of digests.

    Args:
        digits: ``(N,)``.

    Returns:
        ``10 · PER_DIGIT`` numbers.
    """
    order = sorted(range(len(digits)), key=lambda number: digest("digit", number))
    kept: list[int] = []
    for digit in range(10):
        kept += [number for number in order if digits[number] == digit][:PER_DIGIT]
    return sorted(kept, key=order.index)


def latent(picture: Array) -> Array:
    """A picture with the pixels of 2x2 blocks as channels.

    Args:
        picture: ``(8, 8)``.

    Returns:
        ``(4, 4, 4)`` float16.
    """
    return np.asarray(pixel_unshuffle(torch.from_numpy(picture.copy())[None], 2).half().numpy())


def concepts(pictures: Array, digits: Array, training: list[int]) -> dict[str, list[int]]:
    """The exemplars of each concept.

    Args:
        pictures: ``(N, 8, 8)``.
        digits: ``(N,)``.
        training: Numbers that are taken.

    Returns:
        Concept to numbers; no picture is in two.
    """
    free = set(range(len(digits))) - set(training)
    found: dict[str, list[int]] = {}
    for digit in range(10):
        for turn in range(CONCEPTS_PER_DIGIT):
            mine = sorted(number for number in free if digits[number] == digit)
            first = min(mine, key=lambda number: digest("exemplar", number))
            mine.sort(key=lambda number: float(np.square(pictures[number] - pictures[first]).sum()))
            found[f"{WORDS[digit]}-{turn}"] = mine[:EXEMPLARS]
            free -= set(mine[:EXEMPLARS])
    return found


def main() -> None:
    """Write the shards and their manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for the folders of shards (default: %(default)s)"
    )
    arguments = parser.parse_args()
    pictures, digits, captions = load()
    numbers = chosen(digits)
    different = sorted({captions[number] for number in numbers})
    states = dict(zip(different, encode_captions(different, TOKENS), strict=True))
    samples = [
        encode_sample(
            f"digit-{number:04d}",
            latent(pictures[number]),
            states[captions[number]][None],
            {"captions": [captions[number]], "digit": int(digits[number]), "source": SOURCE},
        )
        for number in numbers
    ]
    about = {
        "space": "pixel",
        "latent": {"shape": [4, 4, 4], "dtype": "float16"},
        "text": {"shape": [TOKENS, 384], "dtype": "float16", "encoder": ENCODER},
        "flips": False,
        "source": SOURCE,
        "license": "CC-BY-4.0",
    }
    neutral = encode_captions([NEUTRAL], TOKENS)
    exemplars = [
        encode_sample(
            f"exemplar-{concept}-{place}",
            latent(np.rot90(pictures[number])),
            neutral,
            {"captions": [NEUTRAL], "concept": concept, "of": f"digit-{number:04d}", "source": SOURCE},
        )
        for concept, chosen_numbers in concepts(pictures, digits, numbers).items()
        for place, number in enumerate(chosen_numbers)
    ]
    shards = write_shards(
        samples, arguments.output / "shards", name="digits", samples_per_shard=SAMPLES_PER_SHARD, about=about
    )
    shards += write_shards(exemplars, arguments.output / "exemplars", name="exemplars", about=about)
    for shard in shards:
        print(f"{shard.url}: {shard.samples} samples, {shard.bytes} bytes")


if __name__ == "__main__":
    main()
