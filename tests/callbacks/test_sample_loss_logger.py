"""Each sample's own losses, held against a loop, through resumes and over processes; nothing of a training changes."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_ranks
from torch import Tensor
from torch.utils.data import DataLoader
from toys import ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn import DiffusionModule, InputError, SampleLossLogger, TrainingDataModule
from lightning_unlearn.callbacks.sample_losses import STRATA, LossSums, strata_of
from lightning_unlearn.data.samples import Sample

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

Seen = list[tuple[str, float, float, int]]


def slow_table(seen: Seen, length: float) -> dict[str, tuple[int, float, float, int, int]]:
    """Key to count, mean loss, corrected loss, last epoch and number of losses that are no number, by loops."""
    levels: dict[int, list[float]] = {}
    for _, loss, timestep, _ in seen:
        if np.isfinite(loss):
            levels.setdefault(min(STRATA - 1, int(STRATA * timestep / length)), []).append(loss)
    found = {}
    for key in sorted({key for key, *_ in seen}):
        own = [(loss, timestep) for name, loss, timestep, _ in seen if name == key and np.isfinite(loss)]
        parts = []
        for loss, timestep in own:
            level = levels[min(STRATA - 1, int(STRATA * timestep / length))]
            mean = sum(level) / len(level)
            deviation = (sum((one - mean) ** 2 for one in level) / len(level)) ** 0.5
            parts.append((loss - mean) / deviation if deviation > 1e-6 * abs(mean) else 0.0)
        count = len(own)
        mean_loss = sum(loss for loss, _ in own) / count if count else float("nan")
        corrected = sum(parts) / count if count else float("nan")
        last = max(epoch for name, _, _, epoch in seen if name == key)
        broken = sum(1 for name, loss, _, _ in seen if name == key and not np.isfinite(loss))
        found[key] = (count, mean_loss, corrected, last, broken)
    return found


def read(path: Path) -> dict[str, tuple[int, float, float, int, int]]:
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return {
        row["key"]: (
            int(row["count"]),
            float(row["mean_loss"]),
            float(row["corrected"]),
            int(row["last_epoch"]),
            int(row["not_finite"]),
        )
        for row in rows
    }


def assert_tables(ours: Any, theirs: Any, rtol: float = 1e-9) -> None:
    assert list(ours) == list(theirs)
    found, wanted = (np.asarray(list(table.values()), np.float64) for table in (ours, theirs))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-9)


class Watched(DiffusionModule):
    """A training that also writes down what its losses are."""

    def __init__(self) -> None:
        super().__init__(ToyDenoiser(), ToyObjective())
        self.seen: Seen = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = super().training_step(batch, batch_idx)
        losses, timesteps = outputs["sample_losses"].tolist(), outputs["timesteps"].tolist()
        epochs = [self.current_epoch] * len(losses)
        self.seen += list(zip(outputs["keys"], losses, timesteps, epochs, strict=True))
        return outputs


class Plain(LightningModule):
    """Somebody's module, whose batches hold numbers of samples, and whose network is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.returns: Any = lambda loss, losses, batch: {"loss": loss, "each": losses}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.returns(self.weight.sum(), batch["error"], batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def rows_of(errors: list[float]) -> DataLoader[Any]:
    rows = [
        {"error": torch.tensor(error), "number": torch.tensor(number % 3), "sigma": torch.tensor(number / 7)}
        for number, error in enumerate(errors)
    ]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def trainer_of(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root),
            **settings,
        },
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_shards(tmp_path_factory.mktemp("losses") / "train", 12, 4)


def train(
    shards: Path,
    root: Path,
    *callbacks: Callback,
    ckpt: Path | None = None,
    kind: type[Watched] = Watched,
    **settings: Any,
) -> Watched:
    seed_everything(0, verbose=False)
    module = kind()
    data = TrainingDataModule(str(shards), batch_size=3)
    trainer_of(root, *callbacks, **settings).fit(module, data, ckpt_path=None if ckpt is None else str(ckpt))
    return module


# ---------------------------------------------------------------------- the numbers


def test_table_is_that_of_a_loop_and_no_bit_of_the_training_changes(shards: Path, tmp_path: Path) -> None:
    module = train(shards, tmp_path, SampleLossLogger())
    after = torch.get_rng_state()
    assert len(module.seen) == 36
    assert_tables(read(tmp_path / "sample_losses.csv"), slow_table(module.seen, 10))
    bare = train(shards, tmp_path / "bare")
    assert torch.equal(after, torch.get_rng_state())
    assert bare.seen == module.seen
    for name, tensor in bare.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_start_epoch_and_parquet(shards: Path, tmp_path: Path) -> None:
    module = train(shards, tmp_path, SampleLossLogger(path="deep/losses.parquet", start_epoch=2))
    table = pyarrow.parquet.read_table(tmp_path / "deep" / "losses.parquet").to_pydict()
    wanted = slow_table([one for one in module.seen if one[3] == 2], 10)
    found = dict(zip(table["key"], zip(*(table[name] for name in list(table)[1:]), strict=True), strict=True))
    assert_tables(found, wanted)


def test_somebodys_module_says_where_its_losses_are(tmp_path: Path) -> None:
    errors = [1.0, 2.0, 4.0, float("nan"), 3.0, 9.0, 1.5]
    logger = SampleLossLogger(
        losses="each",
        timesteps=lambda outputs, batch: batch["sigma"],
        keys=lambda outputs, batch: batch["number"],
        num_timesteps=1.0,
    )
    trainer_of(tmp_path, logger, max_epochs=1).fit(Plain(), rows_of(errors))
    sigmas = [float(torch.tensor(number / 7)) for number in range(7)]
    seen = [(str(number % 3), error, sigmas[number], 0) for number, error in enumerate(errors)]
    assert_tables(read(tmp_path / "sample_losses.csv"), slow_table(seen, 1.0))


def test_a_hard_sample_is_found_where_means_mislead() -> None:
    """Losses depend on the noise level far more than on the sample; the hard one was drawn where they are low."""
    generator = np.random.default_rng(0)
    sums = LossSums()
    for number in range(40):
        hard = number == 17
        levels = generator.integers(0, 6 if hard else STRATA, 30)
        losses = 1.0 + levels + 0.3 * generator.standard_normal(30) + 0.5 * hard
        sums.add([f"{number:02d}"] * 30, losses, levels, 0)
    table = sums.table()
    assert table.worst(1) == [17]
    assert table.corrected[17] > 1
    assert np.argmin(table.means) == 17


def test_strata_share_the_draws_of_a_density_evenly() -> None:
    density = torch.linspace(0.1, 2.0, 1000, dtype=torch.float64)
    density /= density.sum()
    draws = torch.multinomial(density, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = np.bincount(strata_of(draws, 1000, density), minlength=STRATA)
    assert (np.abs(counts - 1000) < 200).all()
    assert np.bincount(strata_of(torch.arange(1000), 1000, None)).tolist() == [50] * STRATA


def test_all_equal_losses_are_nobodys_fault() -> None:
    sums = LossSums()
    sums.add(["a", "b", "c"], np.asarray([0.1, 0.1, 0.1]), np.zeros(3, np.int64), 0)
    assert sums.table().corrected.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------- resumes and processes


class Repeated(Watched):
    """Draws of a step are a function of its number, so that those after a resume are those without."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(self.global_step)
        return super().training_step(batch, batch_idx)


def test_a_resumed_training_gives_the_same_table(shards: Path, tmp_path: Path) -> None:
    whole = train(shards, tmp_path / "whole", SampleLossLogger(), kind=Repeated)
    keeps = ModelCheckpoint(dirpath=str(tmp_path), filename="first", every_n_epochs=1)
    train(shards, tmp_path / "part", SampleLossLogger(), keeps, kind=Repeated, max_epochs=1, enable_checkpointing=True)
    rest = train(shards, tmp_path / "rest", SampleLossLogger(), ckpt=tmp_path / "first.ckpt", kind=Repeated)
    assert len(rest.seen) == 24
    tables = [read(tmp_path / name / "sample_losses.csv") for name in ("rest", "whole")]
    assert_tables(*tables, rtol=1e-12)
    assert_tables(tables[0], slow_table(whole.seen, 10))


def test_a_checkpoint_amid_an_epoch_holds_all_that_was_seen(shards: Path, tmp_path: Path) -> None:
    keeps = ModelCheckpoint(dirpath=str(tmp_path), filename="sixth", every_n_train_steps=6)
    part = train(shards, tmp_path / "part", SampleLossLogger(), keeps, max_steps=6, enable_checkpointing=True)
    rest = train(shards, tmp_path / "rest", SampleLossLogger(), ckpt=tmp_path / "sixth.ckpt")
    assert len(part.seen) == 18
    assert_tables(read(tmp_path / "rest" / "sample_losses.csv"), slow_table(part.seen + rest.seen, 10))


def test_the_same_trainer_goes_on_and_another_starts_anew(shards: Path, tmp_path: Path) -> None:
    logger = SampleLossLogger()
    module, data = Watched(), TrainingDataModule(str(shards), batch_size=3)
    trainer = trainer_of(tmp_path, logger, max_epochs=1)
    trainer.fit(module, data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert logger.total().table().counts.sum() == 24
    trainer_of(tmp_path, logger, max_epochs=1).fit(module, data)
    assert logger.total().table().counts.sum() == 12


def test_two_processes_add_up(shards: Path, tmp_path: Path) -> None:
    run_ranks(__file__, shards, tmp_path)
    seen = [one for rank in range(2) for one in torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)]
    assert len(seen) == 36
    assert_tables(read(tmp_path / "sample_losses.csv"), slow_table([tuple(one) for one in seen], 10))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = (state[name] for name in state if "SampleLossLogger" in name)
    assert int(kept["counts"].sum()) == 36


def _as_rank(shards: Path, out: Path) -> None:
    keeps = ModelCheckpoint(dirpath=str(out), filename="last", every_n_epochs=3, enable_version_counter=False)
    settings = {"devices": 2, "strategy": "ddp", "enable_checkpointing": True}
    module = train(shards, out, SampleLossLogger(), keeps, **settings)
    torch.save(module.seen, out / f"rank-{module.global_rank}.pt")


# ---------------------------------------------------------------------- what is shown, and what goes wrong


class Pictures:
    """Finds no sample but one."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_samples(self, keys: Any) -> dict[str, Sample]:
        self.asked = list(keys)
        torch.randn(3)
        return {self.asked[0]: Sample(self.asked[0], torch.zeros(3, 4, 4), {}, {"captions": ["a | b"]})}


def test_worst_pictures_are_logged_with_their_captions(shards: Path, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, logger = Pictures(), TensorBoardLogger(str(tmp_path), "tb")
    module = train(shards, tmp_path, SampleLossLogger(top=4, data=found, every_n_epochs=2), logger=logger)
    after = torch.get_rng_state()
    worst = sorted(slow_table(module.seen, 10).items(), key=lambda row: -row[1][2])[:4]
    assert found.asked == [key for key, _ in worst]
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Images("sample_losses/worst")] == [8, 12]
    text = events.Tensors("sample_losses/worst/text_summary")[1].tensor_proto.string_val[0].decode()
    assert all(key in text for key, _ in worst)
    assert "a \\| b" in text
    assert (Path(logger.log_dir) / "sample_losses.csv").exists()
    train(shards, tmp_path / "bare")
    assert torch.equal(after, torch.get_rng_state())


def test_a_table_that_cant_be_written_is_told_and_the_training_ends_well(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "sample_losses.csv").mkdir()
    with pytest.warns(UserWarning, match="could not write or show its table, and the training goes on"):
        module = train(shards, tmp_path, SampleLossLogger())
    assert len(module.seen) == 36


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"top": 0}, "of at least 1"),
        ({"num_timesteps": 0.0}, "above 0"),
        ({"path": "losses.txt"}, r"ends in .csv or .parquet, but path is 'losses.txt'"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        SampleLossLogger(**settings)


@pytest.mark.parametrize(
    ("settings", "returns", "sentence"),
    [
        ({}, None, "does not say how long its schedule is; set num_timesteps"),
        ({"num_timesteps": 1.0}, lambda loss, losses, batch: loss, "finds no 'sample_losses' in what training_step"),
        (
            {"num_timesteps": 1.0},
            lambda loss, losses, batch: {
                "loss": loss,
                "sample_losses": losses.mean(),
                "timesteps": batch["sigma"],
                "keys": batch["number"],
            },
            r"4 keys, losses \(\) and timesteps \(4,\)",
        ),
        (
            {"num_timesteps": 0.5},
            lambda loss, losses, batch: {
                "loss": loss,
                "sample_losses": losses,
                "timesteps": batch["sigma"],
                "keys": batch["number"],
            },
            "timesteps from 0.571429 to 0.857143, but the schedule runs from 0 to 0.5",
        ),
    ],
)
def test_a_module_that_does_not_say_enough_is_refused(
    settings: dict[str, Any], returns: Any, sentence: str, tmp_path: Path
) -> None:
    module = Plain()
    module.returns = returns
    with pytest.raises(InputError, match=sentence):
        trainer_of(tmp_path, SampleLossLogger(**settings)).fit(module, rows_of([1.0] * 7))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _as_rank(Path(sys.argv[1]), Path(sys.argv[2]))
