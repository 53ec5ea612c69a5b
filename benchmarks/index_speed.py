"""How long an index takes to answer, and how much memory.

    python benchmarks/index_speed.py                  # 10,000 samples with the sample model's queries, then 1,000,000
    python benchmarks/index_speed.py --large 100000   # a smaller one in the second part

First part: the sample model, and an index of so many samples as it would keep them, at the default size with all
weights; what its vectors hold does not matter for the time, so they are the queries' own with noise. A query is asked
20 times, its own gradients counted and not. Second part, in a process of its own: a random index of 1,000,000 samples
with fresh keys and 256 numbers of each kind (`lightning-unlearn index --numbers 256`); memory before and after five
queries. Threads are what the environment gives, and one a core for the index's own products. The kernels are decomposed
once, before; how long that takes is told, too. Bars: medians of 1 s without and 5 s with the query's gradients; 2 s for
the large one, and memory that does not grow with queries by more than what an answer takes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import CONFIGS, SAMPLE, parser, show
from torch import Tensor

from lightning_unlearn import Index, UnlearningModule
from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.gradients import query_gradients_of
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.command_line.index_answers import IndexAnswerer
from lightning_unlearn.command_line.index_command import NUMBERS, SIDE
from lightning_unlearn.command_line.trainer_cli import TrainerCLI
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.index.index_pass import OUTPUTS
from lightning_unlearn.index.record import index_digest, index_fingerprints, write_index
from lightning_unlearn.index.rows import Rows
from lightning_unlearn.index.shard_file import write_shard
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection

A_SHARD = 10_000
TIMES = 20
LARGE_NUMBERS = 256


def sample_parts() -> tuple[UnlearningModule, list[Sample]]:
    """The sample model with all weights chosen, and its queries."""
    os.environ.setdefault("LIGHTNING_UNLEARN_SAMPLE", str(SAMPLE))
    arguments = ["--config", str(CONFIGS / "sample.yaml"), "--model.init_args.parameters", "all"]
    cli = TrainerCLI("attribute", [*arguments, "--trainer.accelerator", "cpu"], "Bench", None, logger=False)
    assert isinstance(cli.model, UnlearningModule)
    assert isinstance(cli.datamodule, AttributionDataModule)
    cli.datamodule.setup("predict")
    return cli.model, cli.datamodule.queries


def write(folder: Path, samples: int, like: dict[str, Tensor], fingerprints: dict[str, str], about: Any) -> None:
    """An index of samples whose vectors are some vectors ``(k, p)`` with noise as large as they are."""
    generator = torch.Generator().manual_seed(0)
    sizes = {output: values.shape[1] for output, values in like.items()}
    shards = {}
    for start in range(0, samples, A_SHARD):
        count = min(A_SHARD, samples - start)
        rows = torch.randint(len(next(iter(like.values()))), (count,), generator=generator)
        vectors = {}
        for output, values in like.items():
            noise = torch.randn(count, values.shape[1], generator=generator)
            vectors[output] = values[rows].float() + noise * values.float().square().mean().sqrt()
        errors = torch.rand(count, generator=generator, dtype=torch.float64)
        keys = [f"sample-{number:08d}" for number in range(start, start + count)]
        captions, said = [[f"caption {key}"] for key in keys], [key[-3:] for key in keys]
        kept = Rows(keys, captions, said, [{} for _ in keys], vectors, errors, errors.square())
        name = f"made-{start:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder, name, kept, sizes, index_digest(fingerprints), "made")
        shards[name] = {"url": name, "samples": count, "bytes": None, "sha256": None, "version": "made"}
    write_index(folder, {"fingerprints": fingerprints, "projection": about, "sizes": sizes, "shards": shards})


def memory() -> dict[str, int]:
    """This process's memory in MB: all of it, and without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {name: int(line.split()[1]) // 1024 for line in lines for name in [line.split(":")[0]] if "kB" in line}
    return {"resident": found["VmRSS"], "own": found["RssAnon"], "peak": found["VmHWM"]}


def median_of(times: list[float]) -> float:
    """To a thousandth of a second."""
    return round(statistics.median(times), 3)


def sample_model(folder: Path, samples: int) -> dict[str, Any]:
    """The first part."""
    module, queries = sample_parts()
    projection = Projection.within(layer_specs(module.layers), NUMBERS, SIDE)
    subject = Subject(module.loss, module.layers, module.views, queries, list, projection=projection)
    like = {output: found.wide() for output, found in query_gradients_of(subject, OUTPUTS).items()}
    write(folder, samples, like, index_fingerprints(module, projection, "error"), projection.settings())
    started = time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter() - started
    answerer, alone, together = IndexAnswerer(module, index), [], []
    for number in range(TIMES):
        query = queries[number % len(queries)]
        started = time.perf_counter()
        one = Subject(module.loss, module.layers, module.views, [query], list, projection=answerer.projection)
        gradients = query_gradients_of(one, OUTPUTS)
        between = time.perf_counter()
        index.answer(gradients)
        alone.append(time.perf_counter() - between)
        together.append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    return {
        "samples": samples,
        "numbers": projection.numbers,
        "bytes_a_sample": round(size / samples),
        "seconds": median_of(alone),
        "seconds_with_gradients": median_of(together),
        "seconds_first_opened": round(opened, 1),
        "all": [round(value, 3) for value in alone],
    }


def large(folder: Path, samples: int, queue: Any) -> None:
    """The second part."""
    torch.manual_seed(0)
    like = {output: torch.randn(4, LARGE_NUMBERS) for output in OUTPUTS}
    write(folder, samples, like, {"made": "random"}, {"side": 1, "seed": 0})
    started = time.perf_counter()
    Index.open(folder)
    decomposed = time.perf_counter() - started
    queue.put({"samples": samples, "numbers": LARGE_NUMBERS, "seconds_first_opened": round(decomposed, 1)})


def large_queries(folder: Path, queue: Any) -> None:
    """Queries to the large index, in a process that opens it as everybody does."""
    started = time.perf_counter()
    index = Index.open(folder)
    opened = time.perf_counter() - started
    errors = torch.ones(1, dtype=torch.float64)
    generator, times = torch.Generator().manual_seed(1), []
    before = after = memory()
    for number in range(1 + 5):
        drawn = {output: torch.randn(1, size, generator=generator) for output, size in index.record["sizes"].items()}
        asked: Any = {output: Gradients({"made": values}, errors, errors) for output, values in drawn.items()}
        started = time.perf_counter()
        index.answer(asked)
        times.append(time.perf_counter() - started)
        before, after = (memory(), before) if number == 0 else (before, memory())
    found = {"seconds": median_of(times[1:]), "seconds_first": round(times[0], 3), "seconds_opened": round(opened, 1)}
    queue.put(found | {"memory_before": before, "memory_after": after, "all": [round(value, 3) for value in times]})


def in_a_process(work: Any, *arguments: Any) -> dict[str, Any]:
    """What a function puts into a queue, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(*arguments, queue))
    process.start()
    found: dict[str, Any] = queue.get()
    process.join()
    return found


def main() -> None:
    """Measure, and print."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--samples", type=int, default=10_000)
    arguments_parser.add_argument("--large", type=int, default=1_000_000)
    arguments_parser.add_argument("--work", type=Path, help="where the indexes are made; a temporary folder by default")
    arguments = arguments_parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        small = sample_model(Path(work) / "sample", arguments.samples)
        many = in_a_process(large, Path(work) / "large", arguments.large)
        many |= in_a_process(large_queries, Path(work) / "large")
    grown = many["memory_after"]["own"] - many["memory_before"]["own"]
    answer = 64 * arguments.large / 2**20  # some columns of float64 each
    met = (
        small["seconds"] < 1 and small["seconds_with_gradients"] < 5 and many["seconds"] < 2 and grown < max(64, answer)
    )
    lines = [
        f"{small['samples']:,} samples, {small['numbers']} numbers of each kind, {small['bytes_a_sample']} bytes a "
        f"sample: a query {small['seconds']} s, {small['seconds_with_gradients']} s with its gradients "
        f"(medians of {TIMES}); kernels once {small['seconds_first_opened']} s",
        f"{many['samples']:,} samples, {many['numbers']} numbers of each kind: a query {many['seconds']} s, the first "
        f"{many['seconds_first']} s; opened in {many['seconds_opened']} s, kernels once "
        f"{many['seconds_first_opened']} s",
        f"memory in MB, before and after five queries: {json.dumps(many['memory_before'])}, "
        f"{json.dumps(many['memory_after'])}",
    ]
    details = {"sample": small, "large": many}
    bar = "1 s, 5 s with gradients, 2 s of a million; memory flat"
    show("index_speed", small["seconds"], bar, met, lines, details, arguments.json)


if __name__ == "__main__":
    main()
