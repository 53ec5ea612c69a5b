"""What the benchmarks share: the sample model, and how a result is shown."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

SAMPLE = Path(str(files("lightning_unlearn.datamodules"))) / "sample"
CONFIGS = Path(str(files("lightning_unlearn.configs")))
PACKAGES = ("torch", "lightning", "diffusers", "webdataset", "pyarrow")
# Where scores are taken: the same on any device, but for rounding. Costs are measured on a CPU.
ACCELERATOR = os.environ.get("BENCH_ACCELERATOR", "cpu")
# What every Trainer of a benchmark gets: nothing but the work itself.
PLAIN: dict[str, Any] = {
    "accelerator": ACCELERATOR,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Seconds(NamedTuple):
    """A time by two clocks; ``cpu`` is what this process used, so other programs on the same cores move it less.

    Attributes:
        wall: Seconds that passed.
        cpu: Seconds of processor time, over all threads.
    """

    wall: float
    cpu: float

    def since(self, start: Seconds) -> Seconds:
        """The time from ``start`` until this one."""
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


def now() -> Seconds:
    """Both clocks.

    Returns:
        The time.
    """
    return Seconds(time.perf_counter(), time.process_time())


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every benchmark takes.

    Args:
        description: The benchmark's docstring.

    Returns:
        A parser with ``--json``.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return made


def quiet() -> None:
    """Keep Lightning's remarks on hardware, workers and shards out of the result."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def pixels_of_blocks(latents: Tensor) -> Tensor:
    """Pictures from latents whose channels are the pixels of 2×2 blocks.

    Args:
        latents: ``(B, 4 · C, H, W)``.

    Returns:
        ``(B, C, 2 · H, 2 · W)``.
    """
    return nn.functional.pixel_shuffle(latents, 2)


def sample_network() -> nn.Module:
    """The sample model of ``configs/train_sample.yaml``, with its trained weights, in eval mode.

    Returns:
        A ``UNet2DConditionModel``.
    """
    import diffusers

    from lightning_unlearn.diffusion.loading import load_network

    config = yaml.safe_load((CONFIGS / "train_sample.yaml").read_text())
    network_class: Any = diffusers.UNet2DConditionModel  # has no types
    network = network_class(**config["model"]["init_args"]["network"]["init_args"])
    return load_network(network, str(SAMPLE / "model.safetensors"))


def show(
    name: str, value: float, bar: str, met: bool, lines: list[str], details: dict[str, Any], as_json: bool
) -> None:
    """Print a result, and end the process with status 1 if the bar is missed.

    Args:
        name: Of the benchmark.
        value: What it measured.
        bar: In words, e.g. ``"at least 0.90"``.
        met: Whether it is met.
        lines: The result for people.
        details: The numbers that the value comes from.
        as_json: Whether JSON is printed instead.
    """
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if as_json:
        print(json.dumps({"benchmark": name, "value": value, "bar": bar, "met": met, **details, "about": about}))
    else:
        print(*lines, sep="\n")
        print(f"bar: {bar}: {'met' if met else 'MISSED'}   ({', '.join(f'{k} {v}' for k, v in about.items())})")
    sys.exit(0 if met else 1)
