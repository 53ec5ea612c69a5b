"""How long ``ask`` will take on this machine, how much memory and disk; and batches that fit."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_unlearn.command_line.check_costs import (
    Stage,
    calls_memory,
    inputs_of,
    sizes_of,
    stages_of,
    view_flops,
)
from lightning_unlearn.command_line.check_plan import Plan
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.disk import in_words

# Networks reach about this share of what products of large matrices do.
REACHED = 0.4
# A call of a layer, however small it is, and its backward pass.
SECONDS_A_LAYER = 1e-4
# Of a device's memory: the rest is for what is not told beforehand.
FILLED = 0.8


def device_here() -> torch.device:
    """Where the stages run.

    Returns:
        The accelerator, if there is one.
    """
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def memory_of(device: torch.device) -> int:
    """How much a device has in all, so that another run on the same machine decides alike.

    Args:
        device: The device.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def flops_a_second(device: torch.device, size: int = 1024, least: float = 0.05) -> float:
    """What a device computes in float32.

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


def batches_that_fit(plan: Plan, memory: int) -> tuple[int, int]:
    """How many samples and draws go through the network at a time; no result depends on it.

    Args:
        plan: With a network, an objective, chosen layers and a first sample.
        memory: Bytes of the device.

    Returns:
        ``batch_size`` and ``draw_batch_size``: what the plan has, or the largest power of two that fits; 1 at least.
    """
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    _, backward = calls_memory(plan.network, plan.objective, plan.sample, list(plan.layers))
    if backward is None:
        return plan.batch_size, plan.draw_batch_size
    fed = inputs_of(plan.network, plan.objective, plan.sample, list(plan.layers))
    sizes = sizes_of(plan.network, plan.layers, fed)
    held = sizes.network + 2 * sizes.fisher + 2 * plan.targets * sizes.delta + sizes.chosen + sizes.delta
    room = FILLED * memory - held - backward.fixed
    most = max(1, math.floor(room / max(1, backward.each)))
    largest = 2 ** (most.bit_length() - 1)
    return min(plan.batch_size, largest), min(plan.draw_batch_size, largest)


def seconds_of(stage: Stage, flops: int, layers: int, batch: int, speed: float) -> float:
    """How long a stage takes, roughly.

    Args:
        stage: Its calls.
        flops: Of a forward pass of one view; a backward pass takes twice as many.
        layers: That a call goes through.
        batch: Views in a call.
        speed: See :func:`flops_a_second`.

    Returns:
        Seconds.
    """
    views = stage.forward + 2 * stage.backward
    return views * (flops / (REACHED * speed) + SECONDS_A_LAYER * layers / max(1, batch))


def forecast(plan: Plan, passes: int, method: str | None, output: Path, device: torch.device) -> list[str]:
    """What the work that is left will take, in lines for a person.

    Args:
        plan: With a network, an objective, chosen layers and a first sample.
        passes: Of the Fisher.
        method: How samples are scored.
        output: Where things are written.
        device: Where the stages run.

    Returns:
        Lines.

    Raises:
        InputError: If the disk has too little room.
    """
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    stages = [*stages_of(plan, passes), *_gradients(plan, method)]
    if method is not None and method != "unlearning":
        stages = [stage for stage in stages if stage.name not in ("unlearning", "scoring") or method == "Consensus"]
    flops, speed = view_flops(plan.network, plan.objective, plan.sample), flops_a_second(device)
    layers = sum(1 for part in plan.network.modules() if not any(part.children()))
    needed = sum(stage.disk for stage in stages)
    peak = max((stage.memory or 0 for stage in stages), default=0)
    lines, whole = [], 0.0
    for stage in stages:
        batch = plan.draw_batch_size if stage.name == "unlearning" else plan.batch_size
        if flops is not None:
            seconds = seconds_of(stage, flops, layers, batch, speed)
            whole += seconds
            lines.append(f"  {stage.name}: {stage.forward:,} evaluations of the loss, {about(seconds)}")
        else:
            lines.append(f"  {stage.name}: {stage.forward:,} evaluations of the loss")
    time_told = f", {about(whole)} in all" if flops is not None else ""
    have = memory_of(device)
    memory_told = f"{in_words(peak)} of {in_words(have)} memory" if peak else "memory unknown"
    lines.append(f"  on {device.type}{time_told}; {memory_told}; {in_words(needed)} of disk. Times are rough.")
    if peak > have:
        lines.append("  That is more memory than there is: it may fail; a smaller --size, or another machine, helps.")
    free = shutil.disk_usage(output).free
    if needed > free:
        raise InputError(
            f"The run takes {in_words(needed)} of disk, and {output} has {in_words(free)}; free some, or choose "
            "another --output."
        )
    return lines


def _gradients(plan: Plan, method: str | None) -> Sequence[Stage]:
    """The pass of methods that compare gradients of all samples on all views."""
    if method in ("unlearning", "Undone", "Random", "PixelSimilarity", "TextSimilarity", "EncoderSimilarity"):
        return []
    assert plan.sample is not None
    captions = len(plan.sample.captions)
    captions = captions if plan.views.captions is None else min(captions, plan.views.captions)
    views = ((plan.samples or 0) + plan.queries) * plan.views.draws * (1 + plan.views.flips) * captions
    return [Stage("gradients", views, views, None, 0)]


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
