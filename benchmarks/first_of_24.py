"""Whether a training picture, unlearned as its own query, ranks first of 24 in networks of each kind.

A small network of each kind learns 24 smooth pictures, each with the states of a caption of its own, for some minutes;
then each picture is unlearned and all are scored, once for each selection of weights.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import now, parser, quiet, show
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_unlearn import (
    AttributionDataModule,
    FisherAccumulator,
    ScoreWriter,
    UnlearningModule,
    Views,
    read_scores,
)
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import place_timesteps
from lightning_unlearn.training import FisherPass

PICTURES, COPIES, SHAPE, TOKENS, DIM = 24, 2, (4, 8, 8), 4, 16
BAR = 23


@dataclass(frozen=True)
class Kind:
    """A network of one kind.

    Attributes:
        make: It, with random weights.
        objective: How it is trained.
        selections: Of weights.
    """

    make: Callable[[], nn.Module]
    objective: Callable[[], Objective]
    selections: tuple[str, ...]


def flow() -> Objective:
    """Flow matching with the shift that small pictures bear."""
    return FlowMatchingObjective({"shift": 1.0}, density="logit_normal")


def unet() -> nn.Module:
    """A U-Net with cross-attention."""
    network: nn.Module = diffusers.UNet2DConditionModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIM,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return network


def cross_attention() -> nn.Module:
    """Sana's transformer."""
    network: nn.Module = diffusers.SanaTransformer2DModel(
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=DIM,
        sample_size=SHAPE[1],
    )
    return network


def joint_attention() -> nn.Module:
    """Stable Diffusion 3's transformer."""
    network: nn.Module = diffusers.SD3Transformer2DModel(
        sample_size=SHAPE[1],
        patch_size=2,
        in_channels=SHAPE[0],
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=DIM,
        caption_projection_dim=32,
        pooled_projection_dim=DIM,
        out_channels=SHAPE[0],
        pos_embed_max_size=SHAPE[1],
        qk_norm="rms_norm",
    )
    return network


def single_stream() -> nn.Module:
    """Lumina-Image 2.0's transformer."""
    network: nn.Module = diffusers.Lumina2Transformer2DModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 32, 32),
        cap_feat_dim=DIM,
    )
    return network


KINDS = {
    "unet": Kind(unet, DenoisingObjective, ("text_kv", "all")),
    "cross_attention": Kind(cross_attention, flow, ("text_kv", "all")),
    "joint_attention": Kind(joint_attention, flow, ("text_kv", "all")),
    "single_stream": Kind(single_stream, flow, ("attention", "all")),
}


def made_up() -> tuple[Tensor, dict[str, Tensor]]:
    """Smooth pictures, and what networks are given beside each: states of a caption, all of which count, and pooled."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(PICTURES, SHAPE[0], 4, 4, generator=generator)
    pictures = torch.nn.functional.interpolate(coarse, size=SHAPE[1:], mode="bilinear").clamp(-1, 1)
    text = torch.randn(PICTURES, TOKENS, DIM, generator=generator)
    return pictures, {"text": text, "text_mask": torch.ones(PICTURES, TOKENS), "pooled": text.mean(1)}


def learned(kind: Kind, objective: Objective, steps: int) -> tuple[nn.Module, float]:
    """The network after its training, and the mean loss of its last steps."""
    torch.manual_seed(0)
    network = kind.make()
    pictures, conditions = made_up()
    batch = ViewBatch(
        pictures.repeat(COPIES, 1, 1, 1),
        {name: array.repeat(COPIES, *[1] * (array.ndim - 1)) for name, array in conditions.items()},
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        places = torch.rand(len(batch.latents), dtype=torch.float64)
        timesteps = place_timesteps(places, (0.0, 1.0), objective.num_timesteps, objective.density())
        loss = objective(network, batch, timesteps, torch.randn_like(batch.latents)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(float(loss.detach()))
    return network.eval(), sum(losses[-50:]) / len(losses[-50:])


def write(folder: Path) -> str:
    """The pictures as shards."""
    pictures, conditions = made_up()
    fields = []
    for row, picture in enumerate(pictures):
        arrays: Mapping[str, Any] = {
            f"{name}.npy": npy_bytes(array[row : row + 1].numpy()) for name, array in conditions.items()
        }
        text = conditions["text"][row : row + 1].numpy()
        about = {"captions": [f"picture {row}"]}
        fields.append({**encode_sample(f"picture-{row:02d}", picture.numpy(), text, about), **arrays})
    write_shards(fields, folder, samples_per_shard=8)
    return str(folder)


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints and saves nothing."""
    plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain |= {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "default_root_dir": str(folder)}
    return Trainer(callbacks=list(callbacks), **plain, **settings)


def ranks(network: nn.Module, objective: Objective, selection: str, shards: str, folder: Path) -> list[int]:
    """At which place each picture stands among all, where it is unlearned itself; 1 is first."""
    fisher = folder / "fisher.safetensors"
    accumulator = FisherAccumulator("network", selection, "ekfac", str(fisher), eigenvalue_epoch=4)
    passes = TrainingDataModule(shards, batch_size=8, every_sample=True)
    trainer(folder, accumulator, max_epochs=8).fit(FisherPass(network, objective, selection), passes)
    module = UnlearningModule(network, objective, str(fisher), selection, views=Views(8), rise_draws=16)
    data = AttributionDataModule(shards, shards, draws=32, batch_size=PICTURES)
    run = trainer(folder, ScoreWriter(str(folder / "run")))
    run.fit(module, data)
    run.predict(module, data)
    table = read_scores(folder / "run")
    own = [table.keys.index(key) for key in table.queries]
    return [1 + int((table.scores[:, column] > table.scores[row, column]).sum()) for column, row in enumerate(own)]


def main() -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default all)")
    arguments.add_argument("--steps", type=int, default=600, help="of training (default 600)")
    options = arguments.parse_args()
    quiet()
    lines, details, best = [], {}, []
    with tempfile.TemporaryDirectory() as scratch:
        shards = write(Path(scratch) / "shards")
        for name in options.kinds:
            kind, start = KINDS[name], now()
            objective = kind.objective()
            network, loss = learned(kind, objective, options.steps)
            trained = now().since(start).cpu
            lines.append(f"{name}: loss {loss:.3f} after {options.steps} steps, {trained:.0f} s of a core")
            print(lines[-1], file=sys.stderr, flush=True)
            found = {}
            for selection in kind.selections:
                folder = Path(scratch) / name / selection
                folder.mkdir(parents=True)
                found[selection] = ranks(network, objective, selection, shards, folder)
                first, mean = found[selection].count(1), sum(found[selection]) / PICTURES
                lines.append(f"  {selection}: {first} of {PICTURES} first, mean rank {mean:.2f}")
                print(lines[-1], file=sys.stderr, flush=True)
            details[name] = {"loss": loss, "seconds": trained, "ranks": found}
            best.append(max(ranked.count(1) for ranked in found.values()))
    bar = f"{BAR} of {PICTURES} first in each kind, by one of its selections"
    show("first_of_24", min(best), bar, min(best) >= BAR, lines, details, options.json)


if __name__ == "__main__":
    main()
