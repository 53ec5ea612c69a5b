"""What one process of several refuses ends all of them, with its sentence, and nobody waits for it in vain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from processes import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WIDTH = 4


class Trained(LightningModule):
    """Fails on rank 1 alone, in its second batch."""

    def __init__(self, failure: str, manual: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.failure = failure
        self.automatic_optimization = not manual

    def training_step(self, batch: Tensor, number: int) -> Tensor | None:
        fails = self.global_rank == 1 and number == 1
        if fails and self.failure == "rows":
            batch = torch.cat([batch, batch])
        if not (fails and self.failure == "weights"):
            self.shares = torch.ones(len(batch))
        elif hasattr(self, "shares"):
            del self.shares
        loss = self.net(batch).square().mean()
        if fails and self.failure == "sum":
            loss = loss + self.net[0].weight.square().sum()  # which no hook on the layer sees
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class EveryOther(FisherAccumulator):
    """A rule of one's own, by which the ranks take different batches."""

    def should_capture(self, step: int, epoch: int, batch_idx: int) -> bool:
        assert self._trainer is not None
        return self._trainer.global_rank == 1


CASES = {
    "sum": (r"What was captured of layer 0", {}),
    "rows": (r"saw 6 rows for the 3 samples", {}),
    "weights": (r"has no 'shares'", {"sample_weights": "shares"}),
}
KINDS = [("automatic", FisherAccumulator), ("manual", FisherAccumulator), ("rule", EveryOther)]


def run_rank(folder: Path) -> None:
    """What each of two processes does: trainings that one of them refuses."""
    data: Any = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1))
    for failure, (_, settings) in CASES.items():
        for name, kind in KINDS:
            quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
            trainer = Trainer(
                max_epochs=2,
                accelerator="cpu",
                devices=2,
                strategy="ddp",
                callbacks=[kind("net", "all", "diagonal", str(folder / f"{failure}-{name}"), **settings)],
                default_root_dir=folder,
                **quiet,
            )
            try:
                trainer.fit(Trained(failure, name == "manual"), DataLoader(data, 3))
                said = ""
            except InputError as error:
                said = str(error)
            (folder / f"{failure}-{name}-{trainer.global_rank}.txt").write_text(said)


def test_what_one_process_refuses_ends_all_with_its_sentence(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    for failure, (says, _) in CASES.items():
        for name, _ in KINDS:
            said = [(tmp_path / f"{failure}-{name}-{rank}.txt").read_text() for rank in (0, 1)]
            assert said[0] == said[1], (failure, name)
            assert says in said[0], (failure, name)
            assert not (tmp_path / f"{failure}-{name}").exists()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
