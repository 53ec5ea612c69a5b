"""Toy runs of the command line: a YAML file as a user writes it, shards, and a small network with its Fisher."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from toys import DIM, LATENT, TOKENS, tiny_unet, toy_shards

from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import DenoisingObjective

SAMPLES, SHARDS = 24, 5

UNET: dict[str, Any] = {
    "class_path": "diffusers.UNet2DConditionModel",
    "init_args": {
        "sample_size": LATENT[1],
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "layers_per_block": 1,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": DIM,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
}


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def toy_folder() -> Path:
    """A folder with training shards, queries, the weights of a tiny UNet that learned a little, and its Fisher."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="command-toys-"))
    folder = Path(_FOLDERS[-1].name)
    toy_shards(folder / "train", SAMPLES, 5)
    toy_shards(folder / "queries", 2, 2, prefix="query")
    network, objective = tiny_unet(), DenoisingObjective()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        batch = ViewBatch(
            torch.randn(8, *LATENT, generator=generator), {"text": torch.randn(8, TOKENS, DIM, generator=generator)}
        )
        timesteps = torch.randint(0, objective.num_timesteps, (8,), generator=generator)
        loss = objective(network, batch, timesteps, torch.randn(batch.latents.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "network.pt")
    os.environ["TOYS"] = str(folder)
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy_config()))
    made = ("--kind", "diagonal", "--output", folder / "fisher.safetensors", "--trainer.enable_progress_bar", "false")
    run("fisher", "--config", folder / "toy.yaml", "--passes", "2", *made)
    return folder


def toy_config() -> dict[str, Any]:
    """What a user's YAML holds; the folder of shards and weights is named by an environment variable."""
    return {
        "seed_everything": 0,
        "model": {
            "class_path": "UnlearningModule",
            "init_args": {
                "network": UNET,
                "weights": "${oc.env:TOYS}/network.pt",
                "fisher": "${oc.env:TOYS}/fisher.safetensors",
                "parameters": "text_kv",
                "rise_draws": 4,
                # The toy was never trained, and its weights hardly raise a loss: without bounds it is as far as wanted.
                "strategy": {
                    "class_path": "Newton",
                    "init_args": {"step_range": {"longest": 1e9, "least_linear": 0.0, "most_others": 1e9}},
                },
                "views": {"timesteps": 2},
            },
        },
        "data": {
            "class_path": "AttributionDataModule",
            "init_args": {
                "shards": "${oc.env:TOYS}/train",
                "queries": "${oc.env:TOYS}/queries",
                "draws": 6,
                "draw_batch_size": 4,
                "batch_size": 4,
            },
        },
        "trainer": {"accelerator": "cpu", "devices": 1},
    }


def write_config(path: Path, config: dict[str, Any] | None = None) -> str:
    """Write a YAML file, by default the toy one."""
    os.environ["TOYS"] = str(toy_folder())
    path.write_text(yaml.safe_dump(config or toy_config(), sort_keys=False))
    return str(path)


def run(*arguments: str | Path) -> None:
    """Run a command in this process."""
    status = main([str(argument) for argument in arguments])
    assert status == 0, f"{arguments} ended with status {status}"


def run_program(*arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program in a process of its own."""
    program = Path(sys.executable).parent / "lightning-unlearn"
    return subprocess.run(
        [str(program), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
