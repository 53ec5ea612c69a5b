"""How much of the network's own speed is left when a whole ``predict`` scores with it.

Counts the evaluations (views under θ₀ and under each query's weights) a second of ``trainer.predict``, from the shards
on disk to the Parquet file, and those of bare ``network(...)`` calls on the same inputs in the same batches with the
same threads. Both are measured in turn, several times; the result is the median ratio.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import PLAIN, SAMPLE, Seconds, now, parser, quiet, sample_network, show
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_fields
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters

BAR = 0.90


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=128, help="samples scored, at most 544 (default 128)")
    arguments.add_argument("--batch-size", type=int, default=64, help="samples a batch (default 64)")
    arguments.add_argument("--timesteps", type=int, default=4, help="views a sample (default 4)")
    arguments.add_argument("--queries", type=int, default=8, help="queries, with random deltas (default 8)")
    arguments.add_argument("--repeats", type=int, default=5, help="runs of each kind (default 5)")
    options = arguments.parse_args()
    quiet()
    network, objective, views = sample_network(), DenoisingObjective(), Views(options.timesteps)
    evaluations = options.samples * options.timesteps * (1 + options.queries)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_samples(folder / "shards", options.samples)

        def data() -> AttributionDataModule:
            return AttributionDataModule(str(folder / "shards"), str(SAMPLE / "queries"), batch_size=options.batch_size)

        inputs = bare_inputs(data(), objective, views)
        bare(network, inputs, 1)  # the first calls of a process are slower
        seconds: dict[str, list[Seconds]] = {"predict": [], "bare": []}
        for repeat in range(options.repeats):
            module = unlearned(network, objective, views, options.queries)
            trainer = Trainer(callbacks=[ScoreWriter(str(folder / f"run-{repeat}"))], default_root_dir=name, **PLAIN)
            start = now()
            trainer.predict(module, data())
            middle = now()
            bare(network, inputs, 1 + options.queries)
            seconds["predict"].append(middle.since(start))
            seconds["bare"].append(now().since(middle))
    ratios = [Seconds(b.wall / p.wall, b.cpu / p.cpu) for b, p in zip(seconds["bare"], seconds["predict"], strict=True)]
    rates = {kind: evaluations / statistics.median(time.wall for time in times) for kind, times in seconds.items()}
    wall, cpu = statistics.median(r.wall for r in ratios), statistics.median(r.cpu for r in ratios)
    lines = [
        f"predict {rates['predict']:.1f} and bare calls {rates['bare']:.1f} evaluations a second "
        f"({options.samples} samples x {options.timesteps} views x {1 + options.queries} weight sets)",
        f"ratio {wall:.3f}, median of {len(ratios)} "
        f"({min(r.wall for r in ratios):.3f} to {max(r.wall for r in ratios):.3f}; of the processor's time {cpu:.3f})",
    ]
    details = {
        "cpu_ratio": cpu,
        "evaluations": evaluations,
        "evaluations_a_second": rates,
        "seconds": seconds,
        "ratios": ratios,
        "settings": vars(options),
    }
    show("scoring_speed", wall, f"at least {BAR:.2f}", wall >= BAR, lines, details, options.json)


def write_samples(folder: Path, count: int) -> None:
    """One shard of the first sample pictures, bytes as they are; one, so that no batch is cut short but the last."""
    fields = []
    for shard in list_shards(str(SAMPLE / "shards")):
        fields += [{k: v for k, v in sample.items() if k != "__url__"} for sample in read_fields(shard, pictures=True)]
    if count > len(fields):
        sys.exit(f"The sample data has {len(fields)} samples; not {count}; ask for fewer.")
    write_shards(fields[:count], folder)


def unlearned(network: nn.Module, objective: DenoisingObjective, views: Views, queries: int) -> UnlearningModule:
    """A module with small random deltas, as if fit had left them."""
    module = UnlearningModule(network, objective, views=views)
    module.deltas = DeltaStore(layer_parameters(module.layers), [f"query-{number}" for number in range(queries)])
    generator = torch.Generator().manual_seed(0)
    for delta in module.deltas.parameters():
        delta.data.copy_(1e-4 * torch.randn(delta.shape, generator=generator))
    return module


def bare_inputs(
    data: AttributionDataModule, objective: DenoisingObjective, views: Views
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The noisy latents, timesteps and texts that the network is called with, for every batch and view."""
    data.setup("predict")
    return [
        (
            objective.scheduler.add_noise(view.batch.latents, view.noise, view.timesteps),
            view.timesteps,
            view.batch.text.contiguous(),
        )
        for batch in data.predict_dataloader()
        for view in views.of(batch, objective.num_timesteps, objective.density())
    ]


@torch.inference_mode()
def bare(network: nn.Module, inputs: list[tuple[Tensor, Tensor, Tensor]], times: int) -> None:
    """Call the network on all inputs, a number of times."""
    for _ in range(times):
        for noisy, timesteps, text in inputs:
            network(noisy, timesteps, encoder_hidden_states=text, return_dict=False)


if __name__ == "__main__":
    main()
