"""What a training step costs more when FisherAccumulator takes every batch.

Trains the sample model on the sample data, a few steps with the callback and a few without it in turn, and divides the
median times of a step. A step is all from the end of one batch to the end of the next: reading, forward, backward,
optimizer and callbacks.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import torch
from common import PLAIN, SAMPLE, Seconds, now, parser, quiet, sample_network, show
from lightning.pytorch import Callback, Trainer

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.training import DiffusionModule

BAR = 1.15


class StepClock(Callback):
    """Notes how long each step takes, but for the first, which begins with reading the shards."""

    def __init__(self) -> None:
        self.steps: list[Seconds] = []
        self._last: Seconds | None = None

    def on_train_batch_end(self, *arguments: Any) -> None:
        """The end of a step; as the last callback, after the accumulator's."""
        time = now()
        if self._last is not None:
            self.steps.append(time.since(self._last))
        self._last = time


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=10, help="steps timed a run (default 10)")
    arguments.add_argument("--repeats", type=int, default=5, help="runs of each kind (default 5)")
    arguments.add_argument("--batch-size", type=int, default=64, help="samples a batch (default 64)")
    arguments.add_argument("--parameters", default="text_kv", help="the chosen weights (default text_kv)")
    arguments.add_argument("--fisher", choices=("ekfac", "diagonal"), default="ekfac", help="(default ekfac)")
    options = arguments.parse_args()
    quiet()
    steps: dict[str, list[Seconds]] = {"without": [], "with": []}
    train(options, [])  # the first steps of a process are slower
    for _ in range(options.repeats):
        steps["without"] += train(options, [])
        steps["with"] += train(options, [FisherAccumulator("network", options.parameters, options.fisher)])
    medians = {
        kind: Seconds(statistics.median(t.wall for t in times), statistics.median(t.cpu for t in times))
        for kind, times in steps.items()
    }
    wall = medians["with"].wall / medians["without"].wall
    cpu = medians["with"].cpu / medians["without"].cpu
    lines = [
        f"median of {len(steps['with'])} steps: {medians['with'].wall * 1000:.0f} ms with the callback, "
        f"{medians['without'].wall * 1000:.0f} ms without it",
        f"ratio {wall:.3f} (of the processor's time {cpu:.3f})",
    ]
    details = {"cpu_ratio": cpu, "median_seconds": medians, "seconds": steps, "settings": vars(options)}
    show("fisher_overhead", wall, f"at most {BAR:.2f}", wall <= BAR, lines, details, options.json)


def train(options: Any, callbacks: list[Callback]) -> list[Seconds]:
    """Train for some steps; returns how long each took."""
    torch.manual_seed(0)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(max_steps=options.steps + 1, callbacks=[*callbacks, clock], default_root_dir=folder, **PLAIN)
        trainer.fit(DiffusionModule(sample_network()), TrainingDataModule(str(SAMPLE / "shards"), options.batch_size))
    return clock.steps


if __name__ == "__main__":
    main()
