"""Memory that is counted on the meta device, beside what torch's own profiler sees the same call take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_unlearn.command_line.check_memory import CallMemory, call_memory, peak_bytes, recomputed
from lightning_unlearn.weights.widened import WidenedWeights

Call = Callable[[int], Any]


def unet(device: str) -> tuple[nn.Module, Call]:
    with torch.device(device):
        network = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=8,
        )

    def call(views: int) -> torch.Tensor:
        latents = torch.zeros(views, 3, 16, 16, device=device)
        text = torch.zeros(views, 7, 32, device=device)
        made: torch.Tensor = network(latents, torch.zeros(views, device=device), encoder_hidden_states=text)[0]
        return made

    return network, call


def flux(device: str) -> tuple[nn.Module, Call]:
    with torch.device(device):
        network = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6),
        )

    def call(views: int) -> torch.Tensor:
        made: torch.Tensor = network(
            hidden_states=torch.zeros(views, 64, 16, device=device),
            encoder_hidden_states=torch.zeros(views, 16, 32, device=device),
            pooled_projections=torch.zeros(views, 32, device=device),
            timestep=torch.zeros(views, device=device),
            img_ids=torch.zeros(64, 3, device=device),
            txt_ids=torch.zeros(16, 3, device=device),
        )[0]
        return made

    return network, call


def pixart(device: str) -> tuple[nn.Module, Call]:
    with torch.device(device):
        network = PixArtTransformer2DModel(
            sample_size=16,
            num_layers=3,
            num_attention_heads=4,
            attention_head_dim=16,
            cross_attention_dim=64,
            caption_channels=32,
            use_additional_conditions=False,
        )

    def call(views: int) -> torch.Tensor:
        made: torch.Tensor = network(
            torch.zeros(views, 4, 16, 16, device=device),
            encoder_hidden_states=torch.zeros(views, 12, 32, device=device),
            timestep=torch.zeros(views, device=device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )[0]
        return made

    return network, call


NETWORKS = {"U-Net": unet, "joint attention": flux, "cross-attention transformer": pixart}


def allocated(call: Callable[[], Any]) -> int:
    """The peak of what torch's allocator gave, as its profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call()
    del kept
    now = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def learned(call: Call, views: int) -> None:
    call(views).square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("way", ["forward", "with backward", "checkpointed", "rounded", "rounded, with backward"])
def test_memory_is_what_the_profiler_sees_to_fifteen_per_cent(name: str, way: str) -> None:
    peaks, learns = {}, way not in ("forward", "rounded")
    for device in ("meta", "cpu"):
        network, call = NETWORKS[name](device)
        network.eval().requires_grad_(False)
        if way == "checkpointed":
            network.enable_gradient_checkpointing(*([recomputed] if device == "meta" else []))  # type: ignore[operator]
        elif way.startswith("rounded"):
            WidenedWeights(nn.Module.to(network, torch.bfloat16))
        # Attention's keys and values, as unlearning has them.
        for parameter_name, parameter in network.named_parameters():
            parameter.requires_grad_(learns and ".to_k." in parameter_name)
        views = 8
        with torch.set_grad_enabled(learns):
            if device == "meta":
                peaks[device] = call_memory(partial(learned, call) if learns else call).of(views)
            else:
                learned(call, views) if learns else call(views)  # the first call makes what stays
                network.zero_grad()
                peaks[device] = allocated(partial(learned if learns else lambda run, count: run(count), call, views))
    assert peaks["meta"] == pytest.approx(peaks["cpu"], rel=0.15)


def test_storages_that_died_are_counted_no_more() -> None:
    def call() -> torch.Tensor:
        values = torch.zeros(1000)
        for _ in range(10):
            values = values + 1  # the one before dies
        return values.view(10, 100)[0]  # which is no storage of its own

    assert peak_bytes(call) == 2 * 4000


def test_inputs_and_what_is_changed_in_place_take_nothing() -> None:
    given = torch.zeros(1000)
    assert peak_bytes(lambda: given.add_(1).reshape(10, 100).t()) == 0


def test_memory_grows_by_the_view() -> None:
    memory = call_memory(lambda views: (torch.zeros(500), torch.zeros(views, 100)))
    assert memory == CallMemory(fixed=2000, each=400)
    assert memory.of(10) == 6000
