"""Where the picture that a query came from stands among all training pictures, on the sample data.

    python benchmarks/sample_ranks.py --work runs/sample_ranks

Default settings. (a) 20 training pictures as queries: each should rank first. (b) 50 generated pictures: the picture of
the prompt's caption should be in the top one per cent. Pixel and text similarity stand beside it; text similarity
always finds the caption, since prompts are training captions, so (b) shows that the method is sane, not that it is
skilful. Takes about 15 minutes on one thread; a second run reuses the scores.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import lightning_unlearn.configs
import lightning_unlearn.datamodules
from lightning_unlearn.command_line.cli import main as command
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import load_weights
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.scores.files import read_scores

SAMPLE = Path(str(lightning_unlearn.datamodules.__file__)).parent / "sample"
CONFIG = Path(str(lightning_unlearn.configs.__file__)).parent / "sample.yaml"
STEPS = 40


def make_queries(samples: list[Sample], folder: Path) -> None:
    """Write 20 training pictures and 50 generated ones, chosen by seed 0, as query shards."""
    from diffusers import UNet2DConditionModel

    settings = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["network"]["init_args"]
    network = UNet2DConditionModel(**settings).eval()
    load_weights(network, str(SAMPLE / "model.safetensors"))
    fields: list[dict[str, Any]] = []
    for sample in random.Random(seed_of("rank-training", 0)).sample(samples, 20):
        about = {"captions": sample.captions, "of": sample.key}
        fields.append(encode_sample(f"training-{sample.key}", sample.latent.numpy(), sample.text.numpy(), about))
    chosen = random.Random(seed_of("rank-generated", 0)).sample(samples, 50)
    text = torch.cat([sample.text for sample in chosen])
    objective = DenoisingObjective()
    pictures = generate(network, objective, {"text": text}, samples[0].latent.shape, range(50), STEPS).clamp(-1, 1)
    for seed, (sample, picture) in enumerate(zip(chosen, pictures, strict=True)):
        about = {"captions": sample.captions, "of": sample.key, **how_generated(objective, seed, STEPS)}
        fields.append(encode_sample(f"generated-{sample.key}", picture.numpy(), sample.text.numpy(), about))
    write_shards(fields, folder, name="queries")


def similarity_ranks(query: Sample, samples: list[Sample]) -> tuple[int, int]:
    """The rank of a query's own picture by pixel distance, and by cosine of mean token states."""
    own = [sample.key for sample in samples].index(query.metadata["of"])
    pixels = -torch.stack([(sample.latent - query.latent).square().sum() for sample in samples])
    texts = torch.stack([sample.text[0].mean(0) for sample in samples])
    cosine = torch.nn.functional.cosine_similarity(texts, query.text[0].mean(0), dim=1)
    return int((pixels > pixels[own]).sum()), int((cosine > cosine[own] + 1e-6).sum())


def main() -> None:
    """Make queries, attribute them, and print ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sample_ranks"))
    parser.add_argument("--json", type=Path, help="also write the ranks here")
    parser.add_argument("options", nargs="*", help="more options of `lightning-unlearn attribute`, after --")
    arguments = parser.parse_args()
    samples = [sample for shard in list_shards(str(SAMPLE / "shards")) for sample in read_samples(shard)]
    samples.sort(key=lambda sample: sample.key)
    queries = arguments.work / "queries"
    if not queries.is_dir():
        make_queries(samples, queries)
    output = arguments.work / "attribution"
    options = ["--data.init_args.queries", str(queries), "--output", str(output), *arguments.options]
    if command(["attribute", "--config", str(CONFIG), *options]):
        raise SystemExit(1)
    table = read_scores(output)
    ranks: dict[str, list[tuple[int, int, int]]] = {"training": [], "generated": []}
    for shard in list_shards(str(queries)):
        for query in read_samples(shard):
            row = (table.rank(query.key, query.metadata["of"]), *similarity_ranks(query, samples))
            ranks[query.key.split("-")[0]].append(row)
    for kind, rows in ranks.items():
        for column, name in enumerate(("attribute", "pixel similarity", "text similarity")):
            values = np.sort([row[column] for row in rows])
            first, top = int((values == 0).sum()), int((values < len(samples) / 100).sum())
            print(
                f"{kind:9} {name:16} first: {first}/{len(values)}  top 1 %: {top}/{len(values)}  ranks: "
                f"{values.tolist()}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(ranks))


if __name__ == "__main__":
    main()
