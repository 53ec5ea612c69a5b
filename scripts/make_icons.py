"""Make the data of the bench of flow matching: 300 icons at 12x12 with captions, from 16 openly licensed icon sets.

    python scripts/make_icons.py                        # takes the packages from npm into a temporary folder
    python scripts/make_icons.py --packages FOLDER      # takes them from there, as `npm pack` writes them

A picture is cut to what is drawn and brought to one size, so that sets differ by style and not by margins. A latent is
a picture with each 2x2 block's pixels as channels, (4, 6, 6) for (1, 12, 12). Beside the token states a sample has
their mean as pooled text, as networks of Stable Diffusion 3's class take it. The set that an icon comes from is a
group field of its json.

Needs ``pip install lightning-unlearn[bench]`` and npm. Run twice on one machine it gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from icon_sets import FILLED_TOO, LINES_ALONE, SETS
from minilm import ENCODER, encode_captions
from torch.nn.functional import pixel_unshuffle

from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.fingerprints import digest

SIDE = 12
PER_CONCEPT = 15
TOKENS = 8
DRAWN_AT = 192  # pixels, before a picture is brought to its size
ALIKE = 0.05  # no two pictures of a concept have all of their pixels, in [-1, 1], this close
OUTPUT = Path(__file__).resolve().parents[1] / "benchmarks" / "icons"

Array = np.ndarray[Any, Any]


def taken(package: str, folder: Path) -> Path:
    """A package's tar, which is asked of npm if it is not there."""
    name, _, version = package.rpartition("@")
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


def drawings(folder: Path) -> Iterator[tuple[str, str, str, bytes]]:
    """All icons of the concepts: concept, caption, set, and the SVG."""
    for name, icons in SETS.items():
        wanted: dict[str, list[tuple[str, str, list[str]]]] = {}
        for concept, names in (FILLED_TOO | LINES_ALONE).items():
            article = "an" if concept.startswith("arrow") else "a"
            plain = [(f"{article} {concept}", place) for place in icons.outlined]
            if concept in FILLED_TOO:
                forms = [(f"an outlined {concept}", place) for place in icons.outlined]
                forms += [(f"a filled {concept}", place) for place in icons.filled]
            else:
                # In these sets the other form is a box around it, or the outline of a line.
                forms = plain + [(plain[0][0], place) for place in icons.filled if not icons.boxed]
            wanted[concept] = [
                (caption, place, [f"package/{place.format(n)}" for n in names]) for caption, place in forms
            ]
        with tarfile.open(taken(icons.package, folder)) as tar:
            there = set(tar.getnames())
            for concept, forms_of in wanted.items():
                for caption, _, paths in forms_of:
                    path = next((path for path in paths if path in there), None)
                    if path is not None:
                        file = tar.extractfile(path)
                        assert file is not None
                        yield concept, caption, name, file.read()


def drawn(svg: bytes) -> Array:
    """A picture ``(SIDE, SIDE)`` in [-1, 1], ink at 1."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg.decode(), width=DRAWN_AT, height=DRAWN_AT, skip_system_fonts=True)
    ink = Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")
    ink = ink.crop(ink.point(lambda value: 255 * (value > 8)).getbbox())
    square = Image.new("L", (max(ink.size),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    small = square.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 127.5 - 1


def chosen(folder: Path) -> list[dict[str, Any]]:
    """The pictures of the bench, in the order of digests."""
    found: dict[str, list[dict[str, Any]]] = {}
    for concept, caption, name, svg in sorted(drawings(folder), key=lambda drawing: digest("icon", *map(str, drawing))):
        mine = found.setdefault(concept, [])
        picture = drawn(svg)
        if len(mine) < PER_CONCEPT and all(np.abs(picture - other["picture"]).max() > ALIKE for other in mine):
            mine.append({"concept": concept, "caption": caption, "set": name, "picture": picture})
    assert all(len(mine) == PER_CONCEPT for mine in found.values()), {name: len(mine) for name, mine in found.items()}
    everything = [icon for mine in found.values() for icon in mine]
    return sorted(everything, key=lambda icon: digest("icon order", icon["picture"].tobytes().hex()))


def sources(sets: set[str]) -> str:
    """A page that names each set, its licence and whom it is of."""
    rows = [
        f"| {name} | `{SETS[name].package}` | {SETS[name].licence} | {SETS[name].copyright} |" for name in sorted(sets)
    ]
    return "\n".join(
        [
            "# Where the icons come from",
            "",
            "Each was drawn from the SVG of a package on npm, cut to what is drawn and brought to 12×12 pixels "
            "(`scripts/make_icons.py`). The set stands in each sample's json. Licences are those of the packages' own "
            "licence files:",
            "",
            "| set | package | licence | of |",
            "|---|---|---|---|",
            *rows,
            "",
            "MIT: <https://opensource.org/license/mit>. ISC: <https://opensource.org/license/isc-license-txt>. "
            "Apache-2.0: <https://www.apache.org/licenses/LICENSE-2.0>. "
            "CC-BY-4.0: <https://creativecommons.org/licenses/by/4.0/>.",
            "",
        ]
    )


def main() -> None:
    """Write the shards, their manifest and the page of sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder of the packages' tars; missing ones are taken from npm")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="(default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        icons = chosen(arguments.packages or Path(temporary))
    captions = sorted({icon["caption"] for icon in icons})
    states = dict(zip(captions, encode_captions(captions, TOKENS), strict=True))
    fields = []
    for number, icon in enumerate(icons):
        text = states[icon["caption"]]
        latent = pixel_unshuffle(torch.from_numpy(icon["picture"].copy())[None], 2).half().numpy()
        about = {"captions": [icon["caption"]], "concept": icon["concept"], "set": icon["set"]}
        # The mean of the caption's own tokens: those of padding are zero.
        pooled = text.sum(0, dtype=np.float32) / np.abs(text).any(1).sum()
        fields.append(
            encode_sample(f"icon-{number:03d}", latent, text[None], about)
            | {"pooled.npy": npy_bytes(pooled[None].astype(np.float16))}
        )
    about = {
        "space": "pixel",
        "latent": {"shape": [4, SIDE // 2, SIDE // 2], "dtype": "float16"},
        "text": {"shape": [TOKENS, 384], "dtype": "float16", "encoder": ENCODER},
        "flips": False,
        "source": "icon sets on npm, see SOURCES.md beside this folder",
        "license": "each set's own: MIT, ISC, Apache-2.0 or CC-BY-4.0",
    }
    shards = write_shards(fields, arguments.output / "shards", name="icons", samples_per_shard=75, about=about)
    (arguments.output / "SOURCES.md").write_text(sources({icon["set"] for icon in icons}))
    for shard in shards:
        print(f"{shard.url}: {shard.samples} samples, {shard.bytes} bytes")


if __name__ == "__main__":
    main()
