"""Whose pictures a generated one owes something to, by groups of training pictures: are they of its own group?

    python benchmarks/groups.py --work runs/groups

Unlearns each of the 20 largest subcategories of the sample data as one target, and scores 100 generated pictures, five
captions of each subcategory. The bar: at least 15 of the groups have their highest mean score on their own five
pictures. Takes about ten minutes on one thread; a second run reuses the scores.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import CONFIGS, SAMPLE, parser, sample_network, show

from lightning_unlearn.command_line.cli import main as command
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable

FIELD = "subcategory"
GROUPS, PICTURES, BAR = 20, 5, 15
STEPS = 40
# Each group has many pictures, so that few draws of each are enough.
DRAWS = ("--data.init_args.draws", "16", "--model.init_args.rise_draws", "4")


def make_groups(samples: list[Sample], folder: Path) -> None:
    """Write the training pictures of the largest subcategories, and pictures generated from five captions of each."""
    counts = Counter(sample.metadata[FIELD] for sample in samples)
    members: list[dict[str, Any]] = []
    asked: list[Sample] = []
    for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:GROUPS]:
        group = [sample for sample in samples if sample.metadata[FIELD] == name]
        for sample in group:
            members.append(encode_sample(sample.key, sample.latent.numpy(), sample.text.numpy(), sample.metadata))
        asked += random.Random(seed_of("groups", name)).sample(group, PICTURES)
    text = torch.cat([sample.text[:1] for sample in asked])
    network, objective, seeds = sample_network(), DenoisingObjective(), range(len(asked))
    made = generate(network, objective, {"text": text}, samples[0].latent.shape, seeds, STEPS).clamp(-1, 1)
    fields = []
    for seed, (sample, picture) in enumerate(zip(asked, made, strict=True)):
        about = {"captions": sample.captions, FIELD: sample.metadata[FIELD], **how_generated(objective, seed, STEPS)}
        fields.append(encode_sample(f"generated-{seed:03d}", picture.numpy(), sample.text.numpy(), about))
    write_shards(members, folder / "members", name="members")
    write_shards(fields, folder / "pictures", name="pictures")


def means_of(table: ScoreTable, pictures: dict[str, str]) -> dict[str, dict[str, float]]:
    """Mean score of each subcategory's pictures, by unlearned group."""
    means: dict[str, dict[str, float]] = {}
    for column, group in enumerate(table.queries):
        rows: dict[str, list[float]] = {}
        for key, score in zip(table.keys, table.scores[:, column].tolist(), strict=True):
            rows.setdefault(pictures[key], []).append(score)
        means[group] = {name: sum(values) / len(values) for name, values in rows.items()}
    return means


def main() -> None:
    """Unlearn the groups, score the pictures, and count whose own come first."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--work", type=Path, default=Path("runs/groups"))
    arguments_parser.add_argument("options", nargs="*", help="more options of `lightning-unlearn attribute`, after --")
    arguments = arguments_parser.parse_args()
    samples = [sample for shard in list_shards(str(SAMPLE / "shards")) for sample in read_samples(shard)]
    samples.sort(key=lambda sample: sample.key)
    work: Path = arguments.work
    if not (work / "pictures").is_dir():
        make_groups(samples, work)
    options = ["--data.init_args.shards", str(work / "pictures"), "--data.init_args.queries", str(work / "members")]
    options += ["--data.init_args.targets_by", FIELD, *DRAWS, "--output", str(work / "attribution")]
    if command(["attribute", "--config", str(CONFIGS / "sample.yaml"), *options, *arguments.options]):
        raise SystemExit(1)
    generated = [sample for shard in list_shards(str(work / "pictures")) for sample in read_samples(shard)]
    means = means_of(read_scores(work / "attribution"), {sample.key: sample.metadata[FIELD] for sample in generated})
    first = {group: max(row, key=row.__getitem__) for group, row in means.items()}
    right = sum(group == name for group, name in first.items())
    lines = [f"{group:24} {'own' if name == group else name}" for group, name in first.items()]
    lines.append(f"{right} of {len(first)} groups have their highest mean score on their own pictures")
    show("groups", right, f"at least {BAR}", right >= BAR, lines, {"first": first}, arguments.json)


if __name__ == "__main__":
    main()
