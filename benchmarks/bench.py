"""The benches: a model, its queries, many models trained again without some pictures, and every method judged by them.

    python benchmarks/bench.py digits base       # train the model once, make the queries, take the Fisher
    python benchmarks/bench.py digits retrain    # train it again without some pictures; --index 0 --count 2 for half
    python benchmarks/methods.py digits          # score with every method, then …
    python benchmarks/bench.py digits removals   # … train it again without the pictures that each method names
    python benchmarks/bench.py digits pack       # take what is finished into one file, study/models.parquet

Models are trained many at once (stacked.py), or one after the other by Lightning with --together 1.

Everything can be stopped and started again; what is finished is kept in the bench's folder.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import yaml
from common import pixels_of_blocks
from torch import Tensor

from lightning_unlearn.command_line.fisher_command import fisher
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.retraining_cli import RetrainingCLI, study_of
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Retrainer, Run, fit_run
from lightning_unlearn.evaluation.plan import Design, Plan, plan
from lightning_unlearn.evaluation.retraining import Share
from lightning_unlearn.evaluation.study import differences, read_settings
from lightning_unlearn.fingerprints import digest

BENCHES = Path(__file__).resolve().parent
FISHER_FILES = {"diagonal": "fisher.safetensors", "ekfac": "ekfac.safetensors"}
# Of targets drawn from the model, in place of the data's.
TRUE_FISHER_FILES = {"ekfac_true": "sweep/ekfac-true.safetensors"}
T = TypeVar("T")
CHOSEN = "text_kv"  # the weights that are unlearned, as in each attribute.yaml


@dataclass(frozen=True)
class Bench:
    """One bench's folder and its settings (``bench.yaml``)."""

    name: str

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return BENCHES / self.name

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What its ``bench.yaml`` says."""
        settings: dict[str, Any] = yaml.safe_load((self.folder / "bench.yaml").read_text())
        return settings

    @functools.cached_property
    def design(self) -> Design:
        """How many models of each kind."""
        return Design(**self.settings["design"])

    def samples(self, part: str) -> list[Sample]:
        """The samples in ``shards`` or ``queries``, in the order of the shards."""
        shards = sorted(list_shards(str(self.folder / part)), key=lambda shard: shard.url)
        return [sample for shard in shards for sample in read_samples(shard)]

    def cli(self) -> RetrainingCLI:
        """The training config."""
        os.chdir(BENCHES.parent)  # configs name folders from the root of the repository
        arguments = ["--config", str(self.folder / "train.yaml")]
        return RetrainingCLI("evaluate", arguments, "Bench")

    def plan(self, tables: Any = None) -> Plan:
        """The models it needs; samples are removed for the queries that report."""
        keys = [sample.key for sample in self.samples("shards")]
        reporting, choosing = self.queries
        return plan(self.design, keys, [*reporting, *choosing], tables or {})

    @property
    def queries(self) -> tuple[list[str], list[str]]:
        """The queries that report, and those that choose settings."""
        return self._parted([query.key for query in self.samples("queries")], "queries")

    def subsets(self, plan: Plan) -> tuple[list[Run], list[Run]]:
        """The subset models that report, and those that choose settings; no other model ever chooses."""
        return self._parted(plan.subsets, "subsets")

    def _parted(self, all_of_them: Sequence[T], name: str) -> tuple[list[T], list[T]]:
        ranges = self.settings["choosing"][name]
        chooses = {place for start, end in ranges for place in range(start, end)}
        parts: tuple[list[T], list[T]] = ([], [])
        for place, one in enumerate(all_of_them):
            parts[place in chooses].append(one)
        return parts


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a script that works on one bench: its name."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("bench", choices=[path.parent.name for path in sorted(BENCHES.glob("*/bench.yaml"))])
    return made


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
    text = torch.cat([sample.text[:1] for sample in order])
    made = generate(module.network, module.objective, text, samples[0].latent.shape, range(len(order)), steps)
    pictures = made.clamp(-1, 1)
    good = [recognised(bench, picture, sample, samples) for picture, sample in zip(pictures, order, strict=True)]
    checked = min(different_ones, 50)
    print(f"{sum(good[:checked])} of {checked} generated pictures are recognised")
    fields = []
    for seed, (sample, picture, fine) in enumerate(zip(order, pictures, good, strict=True)):
        if fine and len(fields) < bench.settings["queries"]:
            about = {"captions": sample.captions[:1], **how_generated(seed, steps), "clipped": True}
            name = f"query-{len(fields):02d}"
            fields.append(encode_sample(name, picture.numpy(), sample.text[:1].numpy(), about))
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


def retrain(bench: Bench, runs: Sequence[Run], share: Share, how: Any) -> None:
    """Train what is missing of this process's share, one after the other or many at once."""
    from packed import is_packed, open_study  # these know of benches
    from stacked import retrain_stacked

    cli = bench.cli()
    keys = [sample.key for sample in bench.samples("shards")]
    queries = bench.samples("queries")
    before = read_settings(bench.folder / "study")
    if before is not None and is_packed(bench):
        # A study knows of its own files only, and writes its settings where it finds none: ask one in another folder.
        with tempfile.TemporaryDirectory() as folder:
            settings = study_of(cli, Path(folder), queries, **measuring(bench))[0].settings
        if differences(json.loads(json.dumps(settings)), before):
            raise InputError(
                f"The models of {bench.folder} are of another recipe or other queries; remove its study first."
            )
    study, measure = study_of(cli, bench.folder / "study", queries, **measuring(bench))
    left = open_study(bench).missing(share.of(runs))
    if how.together > 1:
        retrain_stacked(bench, cli, study, left, how)
    else:
        Retrainer(lambda run: cli.build(run, keys), measure, study).train(left)


def measuring(bench: Bench) -> dict[str, Any]:
    """How models are measured."""
    return {"decoder": bench.settings.get("decoder")}


def main() -> None:
    """Run a step."""
    parser = bench_parser(__doc__)
    parser.add_argument("step", choices=("base", "retrain", "removals", "pack"))
    parser.add_argument("--methods", nargs="+", help="whose removals; those of bench.yaml by default")
    parser.add_argument("--index", type=int, default=0, help="which share of the models this process trains")
    parser.add_argument("--count", type=int, default=1, help="in how many shares they are dealt")
    parser.add_argument("--together", type=int, default=16, help="how many are trained in one stack (stacked.py)")
    parser.add_argument("--device", default="cpu", help="where stacks are trained")
    parser.add_argument("--recorders", type=int, default=0, help="processes that draw what is random for stacks")
    arguments = parser.parse_args()
    bench, share = Bench(arguments.bench), Share(arguments.index, arguments.count)
    from stacked import Stacks

    how = Stacks(arguments.together, arguments.device, arguments.recorders)
    with quiet(steps=True):
        if arguments.step == "base":
            make_base(bench)
        elif arguments.step == "pack":
            from packed import pack

            pack(bench)
        elif arguments.step == "retrain":
            retrain(bench, bench.plan().runs(), share, how)
        else:
            from judged import removal_runs  # which asks this module for the models that choose each method's settings

            runs = removal_runs(bench, arguments.methods)
            retrain(bench, runs, share, how)


if __name__ == "__main__":
    main()
