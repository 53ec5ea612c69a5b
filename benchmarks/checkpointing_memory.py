"""How much more memory a training with gradient checkpointing takes when FisherAccumulator takes its batches.

Trains the sample model with checkpointed blocks for a few steps, without the callback and with it, each in a process of
its own, and divides the peaks of what torch had allocated. Its profiler sees each allocation on a CPU, those of kernels
and of the callback among them, so the same program gives the same number on any machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import PLAIN, SAMPLE, parser, quiet, sample_network, show
from lightning.pytorch import Callback, Trainer
from torch.profiler import ProfilerActivity, profile

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.training import DiffusionModule

BAR = 1.15


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=3, help="steps of a training (default 3)")
    arguments.add_argument("--batch-size", type=int, default=64, help="samples a batch (default 64)")
    arguments.add_argument("--parameters", default="text_kv", help="the chosen weights (default text_kv)")
    arguments.add_argument("--fisher", choices=("ekfac", "diagonal"), default="ekfac", help="(default ekfac)")
    arguments.add_argument("--whole", action="store_true", help="without gradient checkpointing")
    arguments.add_argument("--measure", choices=("with", "without"), help="train so and print the peak in bytes")
    options = arguments.parse_args()
    if options.measure:
        accumulator = FisherAccumulator("network", options.parameters, options.fisher)
        print(peak(options, [accumulator] if options.measure == "with" else []))
        return
    given = [*sys.argv[1:]]
    peaks = {}
    for kind in ("without", "with"):
        command = [sys.executable, __file__, *given, "--measure", kind]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[kind] = int(done.stdout.split()[-1])
    ratio = peaks["with"] / peaks["without"]
    lines = [
        f"peak of what is allocated {peaks['with'] / 2**20:.1f} MiB with the callback, "
        f"{peaks['without'] / 2**20:.1f} MiB without it",
        f"ratio {ratio:.3f}",
    ]
    details = {"peak_bytes": peaks, "settings": vars(options)}
    show("checkpointing_memory", ratio, f"at most {BAR:.2f}", ratio <= BAR, lines, details, options.json)


def peak(options: Any, callbacks: list[Callback]) -> int:
    """The most bytes that were allocated at a time while some steps were trained."""
    quiet()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            network: Any = sample_network()
            if not options.whole:
                network.enable_gradient_checkpointing()
            trainer = Trainer(max_steps=options.steps, callbacks=callbacks, default_root_dir=folder, **PLAIN)
            trainer.fit(DiffusionModule(network), TrainingDataModule(str(SAMPLE / "shards"), options.batch_size))
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


if __name__ == "__main__":
    main()
