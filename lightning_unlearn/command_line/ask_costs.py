"""How long ``ask`` will take on this machine, how much memory and disk; and batches that fit."""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_unlearn.baselines import BASELINES, Consensus
from lightning_unlearn.command_line.check_costs import (
    CallsMemory,
    Stage,
    inputs_of,
    sizes_of,
    stages_of,
    view_flops,
)
from lightning_unlearn.command_line.check_plan import Plan
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.disk import in_words
from lightning_unlearn.preparation.model_parts import config_of, network_size
from lightning_unlearn.preparation.vae import VAES

# Networks reach about this share of what products of large matrices do.
REACHED = 0.4
# A call of a layer, however small it is, and its backward pass.
SECONDS_A_LAYER = 1e-4
# Of a device's memory: the rest is for what is not told beforehand.
FILLED = 0.8
# The Fisher of the sample counts so many draws; the benches' are of 20 passes, a long training's of 5.
DRAWS_OF_FISHER = 5000
LEAST_PASSES, MOST_PASSES = 5, 20
# Of a pipeline's sampler, where nobody says it; with guidance each looks at two views, as most do.
USUAL_STEPS = 50
VIEWS_A_STEP = 2
GRADIENTS = "gradients"
WITHOUT_GRADIENTS = ("unlearning", "Undone", "Random", "PixelSimilarity", "TextSimilarity", "EncoderSimilarity")


@dataclass(frozen=True)
class Machine:
    """What computes.

    Attributes:
        device: Where the stages run.
        memory: Bytes that it has in all, so that another run on the same machine decides alike.
    """

    device: torch.device
    memory: int

    @classmethod
    def this(cls, device: torch.device | None = None) -> Machine:
        """This machine.

        Args:
            device: By default the accelerator, if there is one.

        Returns:
            What it is.
        """
        device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if device.type == "cuda":
            return cls(device, int(torch.cuda.get_device_properties(device).total_memory))
        return cls(device, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def seconds(self, flops: float) -> float:
        """How long products and sums take, in float32 and roughly.

        Args:
            flops: Their number.

        Returns:
            Seconds.
        """
        return flops / (REACHED * flops_a_second(self.device))


@functools.cache
def flops_a_second(device: torch.device, size: int = 1024, least: float = 0.05) -> float:
    """What a device does in products of large matrices in float32.

    Args:
        device: The device.
        size: Of the matrices that are multiplied.
        least: Seconds that are measured at least.

    Returns:
        Products and sums a second.
    """
    one = torch.ones(size, size, device=device)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    (one @ one).sum()
    wait()
    started, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < least:
        one @ one
        wait()
        rounds += 1
    return 2 * size**3 * rounds / passed


def encoding_flops(pipeline: Path, size: int | None) -> int | None:
    """What a picture takes on its way through a pipeline's VAE.

    Args:
        pipeline: Its folder.
        size: Side of the picture; by default what the network was trained on.

    Returns:
        Products and sums; ``None`` where it can't be told.
    """
    part = next((pipeline / name for name in VAES if (pipeline / name).is_dir()), None)
    if part is None:
        return None
    try:
        with torch.device("meta"):
            config = config_of(part)
            vae = getattr(diffusers, config["_class_name"]).from_config(config)
            side = size or network_size(pipeline, vae.spatial_compression_ratio)[0]
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                vae.encode(torch.empty(1, config.get("in_channels", 3), side, side))
    except Exception:  # an estimate that can't be had is left out, whatever the reason
        return None
    return int(counter.get_total_flops())


def batches_that_fit(plan: Plan, memory: CallsMemory, machine: Machine) -> tuple[int, int]:
    """How many samples and draws go through the network at a time; no result depends on it.

    Args:
        plan: With a network, an objective, chosen layers and a first sample.
        memory: What a call takes.
        machine: What computes.

    Returns:
        ``batch_size`` and ``draw_batch_size``: what the plan has, or the largest power of two that fits; 1 at least.
    """
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    _, backward = memory
    if backward is None:
        return plan.batch_size, plan.draw_batch_size
    fed = inputs_of(plan.network, plan.objective, plan.sample, list(plan.layers))
    sizes = sizes_of(plan.network, plan.layers, fed)
    held = sizes.network + 2 * sizes.fisher + 2 * plan.targets * sizes.delta + sizes.chosen + sizes.delta
    room = FILLED * machine.memory - held - backward.fixed
    most = max(1, math.floor(room / max(1, backward.each)))
    largest = 2 ** (most.bit_length() - 1)
    return min(plan.batch_size, largest), min(plan.draw_batch_size, largest)


def passes_for(samples: int) -> int:
    """Of the Fisher over the training pictures: the fewer there are, the more often each is looked at.

    Args:
        samples: How many there are.

    Returns:
        The number.

    Example:
        >>> passes_for(20), passes_for(500), passes_for(100_000)
        (20, 10, 5)
    """
    return max(LEAST_PASSES, min(MOST_PASSES, DRAWS_OF_FISHER // max(1, samples)))


def forecast(
    plan: Plan, passes: int, method: str | None, evaluations: int, memory: CallsMemory, output: Path, machine: Machine
) -> list[str]:
    """What the work that is left will take, in lines for a person.

    Args:
        plan: With a network, an objective, chosen layers and a first sample.
        passes: Of the Fisher.
        method: How samples are scored.
        evaluations: Of the network, for pictures that are to be generated.
        memory: What a call takes.
        output: Where things are written.
        machine: What computes.

    Returns:
        Lines.

    Raises:
        InputError: If the disk has too little room.
    """
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    pictures = Stage("pictures", evaluations, 0, None, 0)
    stages = [pictures, *stages_of(plan, passes, memory)]
    if method is not None and all(stage.name != GRADIENTS for stage in stages):
        stages.append(_gradients(plan))
    stages = [stage for stage in stages if stage.forward and not _left_out(stage.name, method)]
    flops = view_flops(plan.network, plan.objective, plan.sample)
    layers = sum(1 for part in plan.network.modules() if not any(part.children()))
    lines, whole = [], 0.0
    for stage in stages:
        batch = {"unlearning": plan.draw_batch_size, "pictures": 2}.get(stage.name, plan.batch_size)
        views = stage.forward + 2 * stage.backward
        seconds = machine.seconds(views * (flops or 0)) + views * layers * SECONDS_A_LAYER / max(1, batch)
        whole += seconds
        told = "" if flops is None else f", {about(seconds)}"
        lines.append(f"  {stage.name}: {stage.forward:,} evaluations of the network{told}")
    needed, peak = sum(stage.disk for stage in stages), max((stage.memory or 0 for stage in stages), default=0)
    time_told = f", {about(whole)} in all" if flops is not None else ""
    memory_told = f"; {in_words(peak)} of {in_words(machine.memory)} of memory" if peak else ""
    lines.append(f"  On {machine.device.type}{time_told}{memory_told}; {in_words(needed)} of disk. Times are rough.")
    if peak > machine.memory:
        lines.append("  That is more memory than there is: it may fail. Pictures of a smaller --size take less.")
    free = shutil.disk_usage(output).free
    if needed > free:
        raise InputError(
            f"The run takes {in_words(needed)} of disk, and {output} has {in_words(free)}; free some, or choose "
            "another --output."
        )
    return lines


def needs_fisher(method: str | None) -> bool:
    """Whether a method needs the Fisher.

    Args:
        method: As ``attribute`` calls it; ``None`` for its default.

    Returns:
        Whether it does; one of a person's own may.
    """
    kind = next((kind for kind in BASELINES.values() if kind.__name__ == method), None)
    return kind is None or kind.needs_fisher or kind is Consensus


def _left_out(stage: str, method: str | None) -> bool:
    if stage == "fisher":
        return not needs_fisher(method)
    if stage in ("unlearning", "scoring"):
        return method not in (None, "unlearning", Consensus.__name__)
    return stage == GRADIENTS and method in WITHOUT_GRADIENTS


def _gradients(plan: Plan) -> Stage:
    """The pass of methods that compare gradients of all samples on all views."""
    assert plan.sample is not None
    captions = min(len(plan.sample.captions), plan.views.captions or len(plan.sample.captions))
    views = ((plan.samples or 0) + plan.queries) * plan.views.draws * (1 + plan.views.flips) * captions
    return Stage(GRADIENTS, views, views, None, 0)


def about(seconds: float) -> str:
    """A time as it is told beforehand.

    Args:
        seconds: The time.

    Returns:
        E.g. ``about 3 minutes``.

    Example:
        >>> about(12), about(190), about(9000)
        ('some seconds', 'about 3 minutes', 'about 2.5 hours')
    """
    if seconds < 45:
        return "some seconds"
    if seconds < 3600:
        minutes = max(1, round(seconds / 60))
        return f"about {minutes} minute{'s' * (minutes != 1)}"
    return f"about {seconds / 3600:.1f} hours"
