"""The picture at the head of the README, from the run that ``make demo`` leaves.

make demo && python scripts/make_readme_picture.py demo docs/attribution.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.scores.files import read_scores

TOP = 7
QUERIES = 4


def show(axis: plt.Axes, sample: Sample, title: str) -> None:
    """Draw a sample's picture with a title under it."""
    assert sample.picture is not None
    axis.imshow(Image.open(io.BytesIO(sample.picture)).convert("RGB"), interpolation="nearest")
    axis.set_title(title if len(title) <= 18 else title[:17] + "…", fontsize=8, y=-0.08, va="top", color="#333333")


def main() -> None:
    """Draw four queries with their most influential images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    table = read_scores(arguments.run)
    urls = [info["url"] for info in table.run["shards"].values()]
    samples = {sample.key: sample for shard in list_shards(urls) for sample in read_samples(shard, pictures=True)}
    queries = {
        sample.key: sample
        for shard in list_shards(table.run["query_shards"])
        for sample in read_samples(shard, pictures=True)
    }
    figure, axes = plt.subplots(QUERIES, TOP + 2, figsize=(9, QUERIES * 1.28), width_ratios=[1, 0.25] + [1] * TOP)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, query in enumerate([key for key in table.queries if key.startswith("generated")][:QUERIES]):
        show(axes[row, 0], queries[query], f"“{queries[query].captions[0]}”")
        for column, (key, _) in enumerate(table.top(query, TOP)):
            show(axes[row, column + 2], samples[key], samples[key].captions[0])
    figure.subplots_adjust(0.01, 0.05, 0.99, 0.99, 0.12, 0.36)
    figure.savefig(arguments.output, dpi=140, facecolor="white")


if __name__ == "__main__":
    main()
