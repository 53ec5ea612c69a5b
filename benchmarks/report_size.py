"""How large the report of many queries is, and what it takes: pages, pictures, seconds, memory.

    python benchmarks/report_size.py --queries 2000 --images 20000 --output large_report

Scores and pictures are random, captions as long as those of large collections. The last line is the largest page.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.report.report import write_report
from lightning_unlearn.scores.table import ScoreTable

WORDS = ("red", "fox", "old", "stone", "wall", "empty", "garden", "under", "low", "clouds", "while", "boats", "wait")


def sample_of(key: str, number: int, side: int) -> Sample:
    """A sample with a picture of its own and a caption of some 90 characters.

    Args:
        key: Its key.
        number: Its number.
        side: Of the picture, in pixels.

    Returns:
        The sample.
    """
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    picture += generator.integers(-12, 13, picture.shape, dtype=np.int16)  # grain, which makes files large
    stream = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=90)
    caption = " ".join(generator.choice(WORDS, 18))
    about = {"captions": [caption], "artist": f"artist {number % 300}", "license": "CC-BY-4.0"}
    return Sample(key, torch.zeros(4, 8, 8), {"text": torch.zeros(1, 1, 1)}, about, picture=stream.getvalue())


def main() -> None:
    """Write a report and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--groups", nargs="*", default=["artist"])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    numbers = {f"image-{number:06d}": number for number in range(options.images)}
    queries = [f"query-{number:05d}" for number in range(options.queries)]
    scores = generator.standard_t(3, (options.images, options.queries)).astype(np.float32) * 1e-4
    table = ScoreTable(
        keys=list(numbers),
        shards=["shard"] * options.images,
        queries=queries,
        scores=scores,
        base_losses=np.full(options.images, 0.1, np.float32),
        run={"fingerprints": {}, "rule": "difference", "shards": {"shard": {}}, "targets": {}},
        errors=np.full(scores.shape, 2e-4, np.float32),
    )

    def samples(keys: frozenset[str]) -> Iterator[Sample]:
        return (sample_of(key, numbers[key], options.side) for key in numbers if key in keys)

    asked = (sample_of(key, 10**6 + number, options.side) for number, key in enumerate(queries))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path = write_report(options.output / "report.html", table, asked, samples, groups=options.groups)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{time.monotonic() - start:.0f} s, {(after - before) / 2**10:.0f} MiB more memory")
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    for kind in (".html", ".json", ".webp"):
        sizes = [file.stat().st_size for file in files if file.suffix == kind]
        print(f"{kind}: {len(sizes):,} files, {sum(sizes) / 2**20:.1f} MiB")
    largest = max((file for file in files if file.suffix == ".html"), key=lambda file: file.stat().st_size)
    print(f"largest page: {largest.name}, {largest.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
