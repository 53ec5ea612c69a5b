"""A bench's model with all pictures, the queries that it generates, and its Fisher."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from benches import CHOSEN, FISHER_FILES, TRUE_FISHER_FILES, Bench
from common import pixels_of_blocks
from torch import Tensor

from lightning_unlearn.command_line.fisher_command import fisher
from lightning_unlearn.data.conditions import first_captions
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.evaluation import Run, fit_run
from lightning_unlearn.fingerprints import digest


def make_base(bench: Bench) -> None:
    """Train the model with all pictures, keep its weights, generate the queries, and take the Fisher."""
    weights = bench.folder / "model.safetensors"
    samples = bench.samples("shards")
    cli = bench.cli()
    if not weights.is_file():
        module: Any = fit_run(lambda run: cli.build(run, []), Run())
        safetensors.torch.save_file({k: v.contiguous() for k, v in module.network.state_dict().items()}, weights)
    module = cli.model
    module.network.load_state_dict(safetensors.torch.load_file(weights))
    module.network.eval()
    # One picture a different caption, in an order that has nothing to do with the pictures; then another of each.
    different = {tuple(sample.captions): sample for sample in samples}
    order = sorted(different.values(), key=lambda sample: digest("query", sample.captions[0]))
    different_ones = len(order)
    order *= bench.settings.get("pictures_a_caption", 1)
    steps = bench.settings["sampling_steps"]
    conditions = first_captions([sample.conditions for sample in order])
    made = generate(module.network, module.objective, conditions, samples[0].latent.shape, range(len(order)), steps)
    pictures = made.clamp(-1, 1)
    good = [recognised(bench, picture, sample, samples) for picture, sample in zip(pictures, order, strict=True)]
    checked = min(different_ones, 50)
    print(f"{sum(good[:checked])} of {checked} generated pictures are recognised")
    fields = []
    for seed, (sample, picture, fine) in enumerate(zip(order, pictures, good, strict=True)):
        if fine and len(fields) < bench.settings["queries"]:
            about = {"captions": sample.captions[:1], **how_generated(module.objective, seed, steps), "clipped": True}
            name = f"query-{len(fields):02d}"
            others = {f"{n}.npy": npy_bytes(v[:1].numpy()) for n, v in sample.conditions.items() if n != "text"}
            fields.append(encode_sample(name, picture.numpy(), sample.text[:1].numpy(), about) | others)
    write_shards(fields, bench.folder / "queries", name="queries")
    print(f"{len(fields)} queries in {bench.folder / 'queries'}")
    show(bench, pictures[:different_ones], good[:different_ones])
    for kind in FISHER_FILES:
        fisher_file(bench, kind)


def fisher_file(bench: Bench, kind: str, parameters: str = CHOSEN) -> Path:
    """The file of a kind of Fisher of the trained model, which is taken if it is not there."""
    path = bench.folder / (FISHER_FILES | TRUE_FISHER_FILES)[kind]
    if parameters != CHOSEN:
        path = bench.folder / "sweep" / f"{parameters}-{path.name}"
    if not path.is_file():
        take_fisher(bench, path, kind, parameters)
    return path


def take_fisher(bench: Bench, path: Path, kind: str, parameters: str = CHOSEN) -> None:
    """The Fisher of the trained model, by passes over all pictures."""
    how = ["--passes", str(bench.settings["fisher_passes"]), "--kind", kind.removesuffix("_true")]
    how += ["--targets", "model"] * (kind in TRUE_FISHER_FILES)
    how += ["--model.init_args.parameters", parameters]
    fisher(["--config", str(bench.folder / "attribute.yaml"), *how, "--output", str(path)])


def recognised(bench: Bench, picture: Tensor, of: Sample, samples: list[Sample]) -> bool:
    """Whether a generated picture is that of its caption, by the five training pictures nearest to it."""
    field = bench.settings["recognised_by"]
    distances = torch.stack([(sample.latent - picture).square().sum() for sample in samples])
    nearest = [samples[place].metadata[field] for place in distances.topk(5, largest=False).indices.tolist()]
    if bench.settings["recognised_as"] == "most_common":
        return bool(Counter(nearest).most_common(1)[0][0] == of.metadata[field])
    return of.metadata[field] in nearest


def show(bench: Bench, pictures: Tensor, good: list[bool]) -> None:
    """All generated pictures on one sheet, those that are not recognised with a red edge."""
    import numpy as np
    from PIL import Image, ImageOps

    tiles = []
    for picture, fine in zip(pixels_of_blocks(pictures), good, strict=True):
        pixels = ((picture + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((64, 64), Image.Resampling.NEAREST)
        tiles.append(ImageOps.expand(tile, 3, "white" if fine else "red"))
    columns = 10
    sheet = Image.new("RGB", (70 * columns, 70 * -(-len(tiles) // columns)), "white")
    for place, tile in enumerate(tiles):
        sheet.paste(tile, (70 * (place % columns), 70 * (place // columns)))
    sheet.save(bench.folder / "generated.png")
