from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from processes import run_ranks
from torch import Tensor
from toys import toy_fields, toy_shards

from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.data.shards import MANIFEST, write_shards
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.datamodules.training import TrainingStream
from lightning_unlearn.errors import InputError

KEYS = [f"sample-{number:05d}" for number in range(24)]
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples in 6 shards of 4."""
    return toy_shards(tmp_path_factory.mktemp("shards"), 24, 4)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples in shards of 1, 16, 2 and 5."""
    folder = tmp_path_factory.mktemp("uneven")
    entries = []
    for number, (first, end) in enumerate([(0, 1), (1, 17), (17, 19), (19, 24)]):
        write_shards([toy_fields(each) for each in range(first, end)], folder, name=f"part{number}")
        entries.append({"name": f"part{number}-000000.tar", "samples": end - first})
    (folder / MANIFEST).write_text(json.dumps({"shards": entries}))
    return folder


def stream_of(folder: Path, rank: int = 0, world_size: int = 1, epoch: int = 0, **changes: Any) -> TrainingStream:
    settings: dict[str, Any] = {"batch_size": 2, "steps": 12 // world_size, "seed": 0, "keys": None, "shuffle": 100}
    stream = TrainingStream(list_shards(str(folder)), rank, world_size, **{**settings, **changes})
    stream.epoch = epoch
    return stream


def read(stream: Any) -> list[str]:
    return [key for batch in stream for key in batch.keys]


def epoch_of(folder: Path, world_size: int = 1, epoch: int = 0, **changes: Any) -> list[list[str]]:
    """The keys that each rank sees."""
    return [read(stream_of(folder, rank, world_size, epoch, **changes)) for rank in range(world_size)]


def refusal(data: TrainingDataModule) -> str:
    with pytest.raises(InputError) as error:
        for _ in data.train_dataloader():
            pass
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("batch_size", [1, 5, 7, 24, 100])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_sample_comes_once_an_epoch_in_as_many_batches_on_every_rank(
    uneven: Path, world_size: int, workers: int, batch_size: int
) -> None:
    seen: list[str] = []
    lengths = set()
    for rank in range(world_size):
        data = TrainingDataModule(str(uneven), batch_size, num_workers=workers, every_sample=True)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=1)  # type: ignore[assignment]
        loader = data.train_dataloader()
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(0 < len(batch) <= max(2, batch_size) for batch in batches)
        lengths.add(len(batches))
        seen += [key for batch in batches for key in batch.keys]
    assert len(lengths) == 1
    assert Counter(seen) == Counter(set(seen))
    assert len(seen) == 24


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_the_same_seed_and_epoch_give_the_same_order(shards: Path, world_size: int) -> None:
    for epoch in range(3):
        assert epoch_of(shards, world_size, epoch) == epoch_of(shards, world_size, epoch)


@pytest.mark.parametrize("world_size", [1, 2, 3, 12])
def test_another_epoch_or_seed_gives_another_order(shards: Path, world_size: int) -> None:
    orders = [epoch_of(shards, world_size, epoch, seed=seed) for epoch in range(3) for seed in range(2)]
    for number, order in enumerate(orders):
        assert order not in orders[:number]


def test_each_epoch_deals_the_shards_anew(shards: Path) -> None:
    shares = [frozenset(epoch_of(shards, 2, epoch)[0]) for epoch in range(4)]
    assert len(set(shares)) > 1


def test_each_epoch_shuffles_the_samples_of_a_shard_anew(tmp_path: Path) -> None:
    (first,) = epoch_of(toy_shards(tmp_path, 24, 24), epoch=0)
    (second,) = epoch_of(tmp_path, epoch=1)
    assert first != second
    assert sorted(first) == sorted(second) == KEYS


def test_order_does_not_depend_on_how_shards_are_named(shards: Path, tmp_path: Path) -> None:
    expected = epoch_of(shards)
    stream = stream_of(shards)
    stream.shards = list(reversed(stream.shards))
    assert [read(stream)] == expected


@pytest.mark.parametrize("shuffle", [0, 1, 5, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 24])
def test_one_reader_sees_every_sample_once_an_epoch(uneven: Path, batch_size: int, shuffle: int) -> None:
    for epoch in range(2):
        stream = stream_of(uneven, epoch=epoch, batch_size=batch_size, steps=24 // batch_size, shuffle=shuffle)
        batches = list(stream)
        assert [len(batch) for batch in batches] == [batch_size] * (24 // batch_size)
        assert sorted(key for batch in batches for key in batch.keys) == KEYS


@pytest.mark.parametrize("world_size", [2, 3, 6, 12])
def test_ranks_share_the_samples_of_an_epoch(shards: Path, world_size: int) -> None:
    # With 12 ranks there are fewer shards than ranks: each reads all and keeps its share.
    seen = epoch_of(shards, world_size)
    assert sorted(key for keys in seen for key in keys) == KEYS


def test_samples_of_different_shards_are_mixed(shards: Path) -> None:
    (order,) = epoch_of(shards)
    shard_of = [KEYS.index(key) // 4 for key in order]
    assert order != KEYS
    assert sum(first == second for first, second in pairwise(shard_of)) < 12


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_takes_the_same_number_of_steps_over_uneven_shards(uneven: Path, world_size: int) -> None:
    for rank in range(world_size):
        batches = list(stream_of(uneven, rank, world_size, batch_size=2, steps=24 // (2 * world_size)))
        assert [len(batch) for batch in batches] == [2] * (24 // (2 * world_size))


def test_who_runs_out_of_samples_starts_over(uneven: Path) -> None:
    seen = epoch_of(uneven, 4, batch_size=1, steps=200)
    for keys in seen:
        assert len(keys) == 200
        # The next deal gives it other shards.
        assert set(keys) == set(KEYS)


def test_only_chosen_keys_are_trained_on(shards: Path) -> None:
    chosen = frozenset(KEYS[::3])
    assert sorted(epoch_of(shards, keys=chosen, steps=4)[0]) == sorted(chosen)


@pytest.mark.parametrize("world_size", [2, 4, 6, 8])
def test_chosen_keys_may_all_lie_in_one_shard(shards: Path, world_size: int) -> None:
    chosen = frozenset(KEYS[8:12])
    for keys in epoch_of(shards, world_size, keys=chosen, batch_size=1, steps=3)[:4]:
        assert len(keys) == 3
        assert set(keys) <= chosen


def loader_of(folder: Path, num_workers: int, context: str | None, **changes: Any) -> Any:
    data = TrainingDataModule(str(folder), batch_size=2, num_workers=num_workers, **changes)
    loader = data.train_dataloader()
    loader.loader.multiprocessing_context = context
    return loader


def test_workers_of_any_kind_share_the_samples(shards: Path) -> None:
    loader = loader_of(shards, 2, "fork")
    forked = read(loader)
    assert len(loader) == 12
    assert sorted(forked) == KEYS
    again = read(loader)  # the next epoch
    assert sorted(again) == KEYS
    assert again != forked
    assert read(loader_of(shards, 2, "forkserver")) == forked


def test_more_workers_than_shards_share_the_samples(tmp_path: Path) -> None:
    loader = loader_of(toy_shards(tmp_path, 8, 8), 2, "fork")
    assert sorted(read(loader)) == KEYS[:8]


def test_odd_number_of_steps_is_shared_by_workers(tmp_path: Path) -> None:
    loader = loader_of(toy_shards(tmp_path, 7, 2), 2, "fork")
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch) for batch in batches] == [2, 2, 2]


def test_length_of_an_epoch_is_the_manifests_the_keys_or_what_was_asked_for(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("\n".join([*KEYS[:6], "", f"  {KEYS[6]} "]) + "\n")
    assert len(TrainingDataModule(str(shards), batch_size=5).train_dataloader()) == 4
    assert len(TrainingDataModule(str(shards), batch_size=5, samples_per_epoch=50).train_dataloader()) == 10
    data = TrainingDataModule(str(shards), batch_size=7, keys=str(path))
    loader = data.train_dataloader()
    assert len(loader) == 1
    assert sorted(read(loader)) == KEYS[:7]
    assert len(TrainingDataModule(str(shards), 5, keys=str(path), samples_per_epoch=20).train_dataloader()) == 4


def test_shards_without_a_manifest_need_the_length_of_an_epoch(tmp_path: Path) -> None:
    (toy_shards(tmp_path) / MANIFEST).unlink()
    assert "samples_per_epoch" in refusal(TrainingDataModule(str(tmp_path), 2))
    assert len(read(TrainingDataModule(str(tmp_path), 2, samples_per_epoch=12).train_dataloader())) == 12


def test_numbers_out_of_range_are_errors(shards: Path) -> None:
    with pytest.raises(InputError, match=r"batch_size .*\.$"):
        TrainingDataModule(str(shards), batch_size=0)
    assert "24 samples are too few for one batch of 25" in refusal(TrainingDataModule(str(shards), 25))
    assert "too few" in refusal(TrainingDataModule(str(shards), 2, samples_per_epoch=-8))


def test_list_of_keys_that_is_missing_or_empty_is_an_error(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    assert "no list of keys" in refusal(TrainingDataModule(str(shards), 1, keys=str(path)))
    path.write_text(" \n\n")
    assert "is empty" in refusal(TrainingDataModule(str(shards), 1, keys=str(path)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_keys_that_no_shard_holds_are_an_error(shards: Path, tmp_path: Path, num_workers: int) -> None:
    (tmp_path / "keys.txt").write_text("nobody\nnothing\n")
    data = TrainingDataModule(str(shards), 1, keys=str(tmp_path / "keys.txt"), num_workers=num_workers)
    assert "found no sample to train on" in refusal(data)


def contents(batches: Any) -> list[tuple[list[str], list[bytes]]]:
    """Keys and bytes of each batch."""
    return [(batch.keys, [batch.latents.numpy().tobytes(), batch.text.numpy().tobytes()]) for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("keys", [None, KEYS[1::2]], ids=["all", "chosen"])
def test_order_and_samples_are_the_same_with_and_without_a_cache(
    uneven: Path, num_workers: int, keys: list[str] | None
) -> None:
    plain, cached = (
        loader_of(uneven, num_workers, "fork" if num_workers else None, keys=keys, cache=cache)
        for cache in (False, True)
    )
    for _ in range(3):
        expected = contents(plain)
        assert contents(cached) == expected
        # With workers, shards are dealt, and who has few samples starts over.
        seen = [key for batch_keys, _ in expected for key in batch_keys]
        assert len(seen) == len(keys or KEYS)
        assert set(seen) <= set(keys or KEYS)
        assert num_workers or sorted(seen) == (keys or KEYS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_reads_the_shards_once(tmp_path: Path, num_workers: int) -> None:
    toy_shards(tmp_path, 16, 4)
    plain, cached = (
        loader_of(tmp_path, num_workers, "fork" if num_workers else None, cache=cache) for cache in (False, True)
    )
    expected = [contents(plain), contents(plain)]
    first = contents(cached)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    assert [first, contents(cached)] == expected
    assert first != expected[1]


def test_a_cache_is_not_changed_by_what_is_done_to_batches(shards: Path) -> None:
    plain, cached = (loader_of(shards, 0, None, cache=cache) for cache in (False, True))
    for loader in (plain, cached):
        for batch in loader:
            batch.latents.zero_()
            batch.text.zero_()
    assert contents(cached) == contents(plain)


@pytest.mark.parametrize("cache", [False, True])
def test_a_damaged_shard_is_an_error_with_a_cache_too(tmp_path: Path, cache: bool) -> None:
    path = toy_shards(tmp_path, 12, 4) / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    for num_workers in (0, 2):
        assert str(path) in refusal(TrainingDataModule(str(tmp_path), 2, num_workers=num_workers, cache=cache))


def test_keys_are_a_list_or_a_file_of_one(shards: Path, tmp_path: Path) -> None:
    chosen = KEYS[3:20]
    (tmp_path / "keys.txt").write_text("\n".join(chosen))
    listed, filed = (loader_of(shards, 0, None, keys=keys) for keys in (chosen, str(tmp_path / "keys.txt")))
    assert len(listed) == len(filed) == 8
    found = read(listed)
    assert found == read(filed)
    assert len(set(found)) == 16
    assert set(found) < set(chosen)


def test_command_is_refused_unless_asked_for(shards: Path) -> None:
    command = f"pipe:cat {shards}/shard-000000.tar"
    assert "allow_pipe" in refusal(TrainingDataModule(command, 2, samples_per_epoch=4))
    data = TrainingDataModule(command, 2, samples_per_epoch=4, allow_pipe=True)
    assert sorted(read(data.train_dataloader())) == KEYS[:4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_shard_is_an_error_in_one_sentence(tmp_path: Path, num_workers: int) -> None:
    path = toy_shards(tmp_path, 12, 4) / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    message = refusal(TrainingDataModule(str(tmp_path), 2, num_workers=num_workers))
    assert str(path) in message


def test_samples_that_differ_in_shape_are_an_error_in_one_sentence(tmp_path: Path) -> None:
    write_shards([toy_fields(0), toy_fields(1), {**toy_fields(2), "text.npy": toy_fields(2, 2)["text.npy"]}], tmp_path)
    assert "2" in refusal(TrainingDataModule(str(tmp_path), 3))


class KeepKeys(LightningModule):
    """Sees batches and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str]]] = []

    def training_step(self, batch: SampleBatch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.keys))
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def epoch(self, number: int) -> list[str]:
        return [key for epoch, keys in self.seen if epoch == number for key in keys]


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
def test_trainer_shuffles_each_epoch_anew_and_a_resumed_run_alike(shards: Path, tmp_path: Path) -> None:
    whole = KeepKeys()
    Trainer(max_epochs=3, enable_checkpointing=False, **QUIET).fit(whole, TrainingDataModule(str(shards), 6))
    for epoch in range(3):
        assert sorted(whole.epoch(epoch)) == KEYS
    assert whole.epoch(0) != whole.epoch(1) != whole.epoch(2) != whole.epoch(0)
    first, second = KeepKeys(), KeepKeys()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(first, TrainingDataModule(str(shards), 6))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = Trainer(max_epochs=3, enable_checkpointing=False, **QUIET)
    trainer.fit(second, TrainingDataModule(str(shards), 6), ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + second.seen == whole.seen


# Run twice, once a rank: by Lightning, or each by this test.
DISTRIBUTED = """
import json, sys, warnings
import torch
from lightning.pytorch import Trainer
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.training import DiffusionModule
from toys import ToyDenoiser, ToyObjective, tiny_unet

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, out, network = sys.argv[1:]


class Recording(DiffusionModule):
    seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.keys))
        return super().training_step(batch, batch_idx)


if __name__ == "__main__":
    torch.manual_seed(0)
    module = Recording(tiny_unet()) if network == "unet" else Recording(ToyDenoiser(), ToyObjective())
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, TrainingDataModule(folder, batch_size=3))
    total = sum(float(weight.double().sum()) for weight in module.parameters())
    with open(f"{out}/{trainer.global_rank}.json", "w") as file:
        json.dump({"seen": module.seen, "steps": trainer.global_step, "total": total}, file)
"""


def run_distributed(folder: Path, out: Path) -> tuple[int, str]:
    (out / "train.py").write_text(DISTRIBUTED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(out / "train.py"), str(folder), str(out), "toy"],
        env=environment,
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def test_two_processes_train_on_uneven_shards_and_both_end(uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DISTRIBUTED)
    run_ranks(str(tmp_path / "train.py"), uneven, tmp_path, "unet")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["steps"] for rank in ranks] == [8, 8]
    for epoch in range(2):
        batches = [[keys for number, keys in rank["seen"] if number == epoch] for rank in ranks]
        assert [[len(keys) for keys in rank] for rank in batches] == [[3] * 4] * 2
    # They read different shares, and end with the same weights.
    counts = [Counter(key for _, keys in rank["seen"] for key in keys) for rank in ranks]
    assert counts[0] != counts[1]
    assert ranks[0]["total"] == ranks[1]["total"]


def test_a_process_that_fails_ends_the_other(tmp_path: Path) -> None:
    # Only one of the two ranks reads the damaged shard at first.
    folder = toy_shards(tmp_path / "shards", 24, 12)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    start = time.monotonic()
    code, output = run_distributed(folder, tmp_path)
    assert code != 0
    assert f"Shard {path} can't be read" in output
    assert time.monotonic() - start < 100
