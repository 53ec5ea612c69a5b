"""The bar is watched by what it prints, as a person would, and by its counts, in real runs on toy shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from toys import tiny_unet, toy_shards

from lightning_unlearn.callbacks import ScoreWriter, ScoringProgress
from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters


class WatchedProgress(ScoringProgress):
    """Notes the counts after each batch of predict."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.seen: list[float] = []

    def on_predict_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        super().on_predict_batch_end(*arguments, **keywords)
        self.seen.append(self.predict_progress_bar.n)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **settings,
    )


def unlearned() -> UnlearningModule:
    module = UnlearningModule(tiny_unet(), views=Views(1))
    module.deltas = DeltaStore(layer_parameters(module.layers), ["query-00000"])
    return module


def data(folder: Path) -> AttributionDataModule:
    return AttributionDataModule(str(folder / "train"), str(folder / "queries"), batch_size=3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    # Shards of 4, 4 and 3 samples: in batches of 3 they come as 3, 1, 3, 1, 3.
    toy_shards(tmp_path / "train", 11, 4)
    toy_shards(tmp_path / "queries", 1, 1, prefix="query")
    return tmp_path


def test_predict_counts_samples_out_of_the_manifests_total(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = WatchedProgress()
    trainer(shards, bar, ScoreWriter(str(shards / "out"))).predict(unlearned(), data(shards))
    assert bar.seen == [3, 4, 7, 8, 11]
    assert bar.predict_progress_bar.total == 11
    last = capsys.readouterr().out.split("\r")[-1]
    # Samples done, time passed and left, samples a second.
    assert re.search(r"Scoring: 100%\|.*\| 11/11 \[00:\d\d<00:00, +[\d.]+ samples/s\]", last), last


def test_a_restart_counts_only_the_shards_that_are_left(shards: Path) -> None:
    writer = ScoreWriter(str(shards / "out"))
    trainer(shards, writer).predict(unlearned(), data(shards))
    sorted((shards / "out" / "scores").glob("*.parquet"))[0].unlink()
    bar = WatchedProgress()
    again = data(shards)
    trainer(shards, bar, ScoreWriter(str(shards / "out"))).predict(unlearned(), again)
    (shard,) = again.shards_to_score()
    assert bar.seen[-1] == bar.predict_progress_bar.total == shard.samples


def test_without_a_manifest_there_is_a_count_and_no_total(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "train" / MANIFEST).unlink()
    bar = WatchedProgress()
    trainer(shards, bar, ScoreWriter(str(shards / "out"))).predict(unlearned(), data(shards))
    assert bar.seen == [3, 4, 7, 8, 11]
    assert bar.predict_progress_bar.total is None
    assert "11/? [" in capsys.readouterr().out


def test_a_limit_of_batches_leaves_the_total_open(shards: Path) -> None:
    bar = WatchedProgress()
    trainer(shards, bar, limit_predict_batches=2).predict(unlearned(), data(shards))
    assert bar.seen == [3, 4]
    assert bar.predict_progress_bar.total is None


def test_the_refresh_rate_is_kept_and_the_last_sample_is_always_shown(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(shards, WatchedProgress(refresh_rate=2), ScoreWriter(str(shards / "out"))).predict(
        unlearned(), data(shards)
    )
    printed = re.findall(r"(\d+)/11 \[", capsys.readouterr().out)
    assert set(printed) == {"0", "4", "8", "11"}


def test_disabled_it_prints_nothing(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(shards, ScoringProgress(refresh_rate=0), ScoreWriter(str(shards / "out"))).predict(
        unlearned(), data(shards)
    )
    assert "Scoring:" not in capsys.readouterr().out


class Plain(LightningModule):
    """Knows nothing of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_fit_and_another_modules_predict_show_the_ordinary_bar_of_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = WatchedProgress()
    run = trainer(tmp_path, bar, max_epochs=1)
    run.fit(Plain(), DataLoader(torch.ones(12, 2), batch_size=4))
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (3, 3)
    run.predict(Plain(), DataLoader(torch.ones(12, 2), batch_size=4))
    assert bar.seen == [1, 2, 3]
    printed = capsys.readouterr().out
    assert "Epoch 0: 100%" in printed
    assert "Predicting DataLoader 0: 100%" in printed
    assert "samples" not in printed


class Speaks(Callback):
    """Prints at the end, or raises at the second batch."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.fails and pl_module.trainer.predict_loop.batch_progress.current.ready == 2:
            raise InputError("something is wrong")

    def on_predict_end(self, *_: Any) -> None:
        print("what was done")


@pytest.mark.parametrize("first", [False, True])
def test_what_is_said_at_the_end_gets_a_line_of_its_own(
    first: bool, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar, speaks = ScoringProgress(), Speaks()
    trainer(shards, *([speaks, bar] if first else [bar, speaks])).predict(unlearned(), data(shards))
    assert capsys.readouterr().out.splitlines()[-1] == "what was done"


def test_what_is_said_of_a_failure_gets_a_line_of_its_own(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        trainer(shards, Speaks(fails=True), ScoringProgress()).predict(unlearned(), data(shards))
    printed = capsys.readouterr().out
    assert "3/11" in printed
    assert printed.endswith("\n")
