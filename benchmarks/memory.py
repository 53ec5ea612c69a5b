"""How much memory a sample costs that is scored: nothing should be kept of it but its line in a Parquet file.

Scores a smaller and a larger number of samples, each in a process of its own, with a network of a few weights, and
divides the difference of their peak memory (resident set size) by the difference of their samples. Every sample has a
key of its own. The shards of the larger number, some 0.5 GB, are written to the system's temporary folder and removed.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PLAIN, parser, quiet, show
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.diffusion.objective import Objective

BAR = 100.0
QUERIES = 8
LATENT, TEXT = (1, 2, 2), (1, 1, 4)


class TinyDenoiser(nn.Module):
    """The text's projection, added to the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 1)

    def forward(self, noisy: Tensor, text: Tensor) -> Tensor:
        """Predict the noise: ``(B, C, H, W)``."""
        predicted: Tensor = noisy + self.text(text).mean(1)[:, :, None, None]
        return predicted


class TinyObjective(Objective):
    """ε-prediction on a ten-step schedule."""

    num_timesteps = 10

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each view: ``(B,)``."""
        share = (timesteps + 1).to(noise)[:, None, None, None] / 11
        loss: Tensor = (network(batch.latents + share * noise, batch.text) - noise).square().flatten(1).mean(1)
        return loss


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--fewer", type=int, default=2_000, help="samples of the first process (default 2,000)")
    arguments.add_argument("--more", type=int, default=100_000, help="samples of the second process (default 100,000)")
    arguments.add_argument("--samples-per-shard", type=int, default=1_000, help="(default 1,000)")
    arguments.add_argument("--batch-size", type=int, default=64, help="samples a batch (default 64)")
    arguments.add_argument(
        "--workers", type=int, default=0, help="processes that read (default 0); only the first counts"
    )
    arguments.add_argument(
        "--measure", metavar="FOLDER", help="score the shards in a folder and print the peak in bytes"
    )
    options = arguments.parse_args()
    if options.measure:
        score(Path(options.measure), options.batch_size, options.workers)
        print(peak())
        return
    peaks = {count: measure(count, options) for count in (options.fewer, options.more)}
    growth = (peaks[options.more] - peaks[options.fewer]) / (options.more - options.fewer)
    lines = [
        f"peak memory {', '.join(f'{size / 2**20:.1f} MiB for {count:,} samples' for count, size in peaks.items())}",
        f"growth {growth:.1f} bytes a sample",
    ]
    details = {"peak_bytes": peaks, "settings": vars(options)}
    show("memory", growth, f"below {BAR:.0f}", growth < BAR, lines, details, options.json)


def measure(count: int, options: Any) -> int:
    """Peak memory in bytes of a process that scores ``count`` samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(samples(count, "sample"), folder / "shards", samples_per_shard=options.samples_per_shard)
        write_shards(samples(QUERIES, "query"), folder / "queries")
        command = [sys.executable, __file__, "--measure", name]
        command += ["--batch-size", str(options.batch_size), "--workers", str(options.workers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        scored = sum(1 for _ in (folder / "out" / "scores").glob("*.parquet"))
        assert scored == -(-count // options.samples_per_shard)
    return int(done.stdout.split()[-1])


def samples(count: int, prefix: str) -> Iterator[dict[str, Any]]:
    """Samples with keys of their own."""
    generator = np.random.default_rng(0)
    for number in range(count):
        latent = generator.standard_normal(LATENT, np.float32)
        text = generator.standard_normal(TEXT, np.float32)
        yield encode_sample(f"{prefix}-{number:09d}", latent, text, {"captions": [f"{prefix} {number}"]})


def score(folder: Path, batch_size: int, workers: int) -> None:
    """The whole ``predict``, as a user runs it."""
    from lightning.pytorch import Trainer

    from lightning_unlearn.callbacks import ScoreWriter
    from lightning_unlearn.datamodules import AttributionDataModule
    from lightning_unlearn.draws.views import Views
    from lightning_unlearn.unlearning.module import UnlearningModule
    from lightning_unlearn.weights.deltas import DeltaStore
    from lightning_unlearn.weights.parameters import layer_parameters

    quiet()
    data = AttributionDataModule(
        str(folder / "shards"), str(folder / "queries"), batch_size=batch_size, num_workers=workers
    )
    module = UnlearningModule(TinyDenoiser(), TinyObjective(), parameters=["text"], views=Views(1))
    module.deltas = DeltaStore(layer_parameters(module.layers), [f"query-{number:09d}" for number in range(QUERIES)])
    for delta in module.deltas.parameters():
        delta.data.copy_(0.01 * torch.randn(delta.shape))
    Trainer(callbacks=[ScoreWriter(str(folder / "out"))], default_root_dir=str(folder), **PLAIN).predict(module, data)


def peak() -> int:
    """The largest resident set size that this process had, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage on Linux counts what the process was before exec, too: a copy of its parent.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


if __name__ == "__main__":
    main()
