"""Make the pictures of the emoji's bench, small and few enough that many models are trained on them in little time.

They are 100 pictures of food and drink from the sample data. A latent is a picture with each 2x2 block's pixels as
channels, (12, 8, 8) for (3, 16, 16): nothing is lost, and a network at 8x8 takes a third of the time.

    python scripts/make_emoji_bench.py
"""

from __future__ import annotations

from pathlib import Path

from torch.nn.functional import pixel_unshuffle

from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.fingerprints import digest

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "emoji" / "shards"
CATEGORY = "Food & Drink"
PICTURES = 100


def main() -> None:
    """Write the shards."""
    shards = list_shards(str(ROOT / "datamodules" / "sample" / "shards"))
    food = [s for shard in shards for s in read_samples(shard) if s.metadata["category"] == CATEGORY]
    # An order that has nothing to do with the pictures, so that those left out are no kind of their own.
    chosen = sorted(food, key=lambda sample: digest("emoji bench", sample.key))[:PICTURES]
    fields = [encode_sample(s.key, pixel_unshuffle(s.latent, 2).numpy(), s.text.numpy(), s.metadata) for s in chosen]
    write_shards(fields, OUTPUT, name="emoji", samples_per_shard=50)
    print(f"{len(fields)} pictures in {OUTPUT}")


if __name__ == "__main__":
    main()
