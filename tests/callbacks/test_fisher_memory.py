"""Gradient checkpointing saves as much memory with FisherAccumulator as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.callbacks.resumed_sums import ResumedSums
from lightning_unlearn.fisher import load_fisher

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WIDTH, BLOCKS, POSITIONS, BATCH = 16, 40, 256, 32


class Blocks(nn.Module):
    """Blocks of which nothing but their inputs is kept for the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Trained(LightningModule):
    def __init__(self, reentrant: bool, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Blocks(reentrant)
        self.automatic_optimization = not manual

    def training_step(self, batch: Tensor, number: int) -> Tensor | None:
        loss = self.net(batch).square().mean()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def fit(folder: Path, module: Trained, accumulator: FisherAccumulator | None) -> None:
    data: Any = torch.randn(2 * BATCH, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks: Any = [accumulator] if accumulator else []
    trainer = Trainer(max_epochs=2, accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(data, BATCH))


def peak(folder: Path, module: Trained, accumulator: FisherAccumulator | None) -> int:
    """The most bytes that were allocated at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fit(folder, module, accumulator)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text("utf-8"))["traceEvents"]
    return int(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"))


@pytest.mark.parametrize("fisher", ["diagonal", "ekfac"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_saves_as_much_with_the_callback(tmp_path: Path, fisher: Any, reentrant: bool) -> None:
    """Of forty blocks' layers, one's inputs and gradients are at work at a time, in a few copies, and not all of them.

    All together they are six to eleven times what the training itself takes.
    """
    accumulator = FisherAccumulator("net", "all", fisher)
    without = peak(tmp_path, Trained(reentrant), None)
    assert peak(tmp_path, Trained(reentrant), accumulator) <= 1.5 * without


@pytest.mark.parametrize("fisher", ["diagonal", "ekfac"])
def test_what_is_summed_on_the_way_is_what_is_summed_at_the_end(tmp_path: Path, fisher: Any) -> None:
    """With manual optimization passes are held, since several may count together."""
    found = []
    for manual in (False, True):
        fit(tmp_path, Trained(False, manual), FisherAccumulator("net", "all", fisher))
        found.append(load_fisher(tmp_path / "fisher.safetensors"))
    assert found[0].count == found[1].count == (4 if fisher == "diagonal" else 2) * BATCH
    for name, tensor in found[0].tensors().items():
        torch.testing.assert_close(tensor, found[1].tensors()[name])


def test_the_bases_of_a_window_are_kept_once(tmp_path: Path) -> None:
    """They are the largest part of an EKFAC Fisher."""
    kept = []

    class Watched(Trained):
        def on_train_batch_end(self, *_: Any) -> None:
            (accumulator,) = (one for one in self.trainer.callbacks if isinstance(one, ResumedSums))  # type: ignore[attr-defined]
            if self.trainer.current_epoch == 1:
                kept.append(accumulator._sums.earlier)

    fit(tmp_path, Watched(False), FisherAccumulator("net", "all", "ekfac"))
    assert kept == [None, None]
