"""Make the sample data that ships with the package: 544 emoji, 16x16, with their names as captions.

Needs ``pip install lightning-unlearn[sample-data]`` and, without ``--package``, ``npm``. Run twice on one machine
it gives the same bytes; other versions of Pillow, torch or transformers may round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from minilm import ENCODER, encode_captions

from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest

PACKAGE = "emoji-datasource-google@16.0.0"
PACKAGE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
SOURCE = "emoji-datasource-google 16.0.0 (Noto Emoji v2.048)"
LICENSE = "Apache-2.0"
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Activities")
OUTPUT = Path(__file__).resolve().parents[1] / "datamodules" / "sample" / "shards"

SIZE = 16
TOKENS = 10
TEXT_DIM = 384
SAMPLES_PER_SHARD = 136

Array = np.ndarray[Any, Any]


def download_package() -> bytes:
    """Fetch the emoji package with npm, which checks it against the registry's digest.

    Returns:
        The bytes of the ``.tgz`` file.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        return archive.read_bytes()


def read_package(content: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Pick the emoji of :data:`CATEGORIES` that have a picture, in an order that mixes the categories.

    Args:
        content: The bytes of the npm package.

    Returns:
        Pairs of an entry of ``emoji.json`` and the bytes of its PNG.

    Raises:
        InputError: If it is not the package that the sample data was made from.
    """
    if hashlib.sha256(content).hexdigest() != PACKAGE_SHA256:
        raise InputError(f"The package is not {PACKAGE}; get that one with `npm pack {PACKAGE}`.")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        entries: dict[str, dict[str, Any]] = {}
        for entry in json.loads(_read(files["package/emoji.json"])):
            if entry["category"] in CATEGORIES and entry["has_img_google"]:
                entries.setdefault(key_of(entry), entry)
        return [
            (entries[key], _read(files[f"package/img/google/64/{entries[key]['image']}"]))
            for key in sorted(entries, key=digest)
        ]


def _read(file: Any) -> bytes:
    return bytes(file.read())


def key_of(entry: dict[str, Any]) -> str:
    """The key of a sample.

    Args:
        entry: Of ``emoji.json``.

    Returns:
        E.g. ``"emoji-1f600"``.
    """
    return f"emoji-{entry['unified'].lower()}"


def caption_of(entry: dict[str, Any]) -> str:
    """The caption of an emoji: its Unicode name, in lower case.

    Args:
        entry: Of ``emoji.json``.

    Returns:
        E.g. ``"grinning face"``.
    """
    return str(entry["name"].lower())


def draw(png: bytes) -> tuple[Array, bytes]:
    """Put an emoji on white.

    Args:
        png: Its picture, with transparency.

    Returns:
        The ``(3, SIZE, SIZE)`` float16 latent in [-1, 1], and a 64x64 WebP for people to look at.
    """
    from PIL import Image

    emoji = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", emoji.size, "white"), emoji).convert("RGB")
    small = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.float32)  # (SIZE, SIZE, 3)
    latent = np.ascontiguousarray((small / 127.5 - 1).transpose(2, 0, 1).astype(np.float16))
    stream = io.BytesIO()
    picture.save(stream, "webp", quality=80, method=6)
    return latent, stream.getvalue()


def samples(content: bytes) -> Iterator[dict[str, Any]]:
    """The samples of the emoji package.

    Args:
        content: The bytes of the npm package.

    Yields:
        What :func:`lightning_unlearn.data.shards.encode_sample` returns.
    """
    emoji = read_package(content)
    texts = encode_captions([caption_of(entry) for entry, _ in emoji], TOKENS)
    for (entry, png), text in zip(emoji, texts, strict=True):
        latent, picture = draw(png)
        metadata = {
            "captions": [caption_of(entry)],
            **{name: entry[name] for name in ("category", "subcategory", "short_name", "unified")},
            "source": SOURCE,
            "license": LICENSE,
        }
        yield encode_sample(key_of(entry), latent, text[None], metadata, picture=picture, picture_format="webp")


def main() -> None:
    """Write the shards and their manifest."""
    parser = argparse.ArgumentParser(description="Make the sample data that ships with the package.")
    parser.add_argument("--package", type=Path, help=f"the .tgz of {PACKAGE}; fetched with npm if not given")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the shards (default: %(default)s)")
    arguments = parser.parse_args()
    content = arguments.package.read_bytes() if arguments.package else download_package()
    about = {
        "space": "pixel",
        "latent": {"shape": [3, SIZE, SIZE], "dtype": "float16"},
        "text": {"shape": [TOKENS, TEXT_DIM], "dtype": "float16", "encoder": ENCODER},
        "flips": False,
        "source": SOURCE,
        "license": LICENSE,
    }
    shards = write_shards(
        samples(content), arguments.output, name="emoji", samples_per_shard=SAMPLES_PER_SHARD, about=about
    )
    for shard in shards:
        print(f"{shard.url}: {shard.samples} samples, {shard.bytes} bytes")


if __name__ == "__main__":
    main()
