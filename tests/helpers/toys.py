"""Tiny networks, objectives and shards that the tests share."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.scores.files import SCORES

LATENT = (3, 8, 8)
TOKENS, DIM = 4, 6


class ToyDenoiser(nn.Module):
    """Conv in, text added through a token-wise Linear, conv out: Linear and Conv2d with bias and several positions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv_in = nn.Conv2d(LATENT[0], 5, 3, padding=1)
            self.text = nn.Linear(DIM, 5)
            self.conv_out = nn.Conv2d(5, LATENT[0], 3, stride=1, padding=1)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predict the noise: ``(B, C, H, W)``."""
        hidden = self.conv_in(noisy) + torch.tanh(self.text(text)).mean(1)[:, :, None, None]
        hidden = torch.tanh(hidden) * (1 + timesteps.to(noisy)[:, None, None, None] / 10)
        out: Tensor = self.conv_out(hidden)
        return out


class ToyObjective(Objective):
    """A ten-step schedule: x_t = (1 - s) x0 + s ε, predict ε."""

    num_timesteps = 10

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each view: ``(B,)``."""
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        loss: Tensor = (prediction - noise).square().flatten(1).mean(1)
        return loss


def tiny_unet(cross_attention_dim: int = DIM, **overrides: Any) -> nn.Module:
    """A UNet2DConditionModel with one cross-attention block each way, some thousand weights, eval mode."""
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": LATENT[1],
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": cross_attention_dim,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **overrides,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = UNet2DConditionModel(**settings)
    return network.eval()


def toy_fields(number: int, captions: int = 1, *, flip: bool = False, prefix: str = "sample") -> dict[str, Any]:
    """The fields of one random sample, a function of its number."""
    rng = np.random.default_rng(number)
    return encode_sample(
        f"{prefix}-{number:05d}",
        rng.standard_normal(LATENT).astype(np.float32),
        rng.standard_normal((captions, TOKENS, DIM)).astype(np.float32),
        {"captions": [f"caption {c} of {number}" for c in range(captions)]},
        latent_flip=rng.standard_normal(LATENT).astype(np.float32) if flip else None,
    )


def grey_png(shares: Any) -> bytes:
    """An 8-bit grey PNG of numbers from 0 to 1, ``(H, W)``."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.rint(255 * np.asarray(shares, dtype=np.float64)).astype(np.uint8)).save(stream, "png")
    return stream.getvalue()


def told(fields: Mapping[str, Any], mask: Any = None, **facts: Any) -> dict[str, Any]:
    """A sample's fields with more facts in its json, and a mask ``(H, W)`` if one is given."""
    more = {"json": json.dumps({**json.loads(fields["json"]), **facts}).encode()}
    return {**fields, **more, **({} if mask is None else {"mask.png": grey_png(mask)})}


def toy_shards(
    folder: Path,
    samples: int = 12,
    samples_per_shard: int = 4,
    captions: int = 1,
    *,
    flip: bool = False,
    prefix: str = "sample",
) -> Path:
    """A folder of shards of random samples."""
    fields = [toy_fields(number, captions, flip=flip, prefix=prefix) for number in range(samples)]
    write_shards(fields, folder, samples_per_shard=samples_per_shard)
    return folder


def done_shards(folder: Path) -> frozenset[str]:
    """The shards for which a run's folder holds a file of scores."""
    return frozenset(path.stem for path in (folder / SCORES).glob("*.parquet"))
