"""Make the pictures of the bench of noise prediction: ten of each digit of the digits' bench, as they are there.

    python scripts/make_digits_epsilon.py

A network that predicts the noise needs many more steps to learn a picture than one that predicts the picture; half as
many pictures are learned in a time in which many models can be trained.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards

BENCHES = Path(__file__).resolve().parents[1] / "benchmarks"
PER_DIGIT = 10


def main() -> None:
    """Write the shards."""
    taken: Counter[int] = Counter()
    fields = []
    for shard in sorted(list_shards(str(BENCHES / "digits" / "shards")), key=lambda shard: shard.url):
        for sample in read_samples(shard):
            if taken[sample.metadata["digit"]] < PER_DIGIT:
                taken[sample.metadata["digit"]] += 1
                fields.append(encode_sample(sample.key, sample.latent.numpy(), sample.text.numpy(), sample.metadata))
    output = BENCHES / "digits_epsilon" / "shards"
    write_shards(fields, output, name="digits", samples_per_shard=50)
    print(f"{len(fields)} pictures in {output}")


if __name__ == "__main__":
    main()
