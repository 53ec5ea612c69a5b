"""What a training recipe is, and the trainings that are made of a config."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import KEYS, Plain, queries, toy_config, toy_folder, write_config
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.command_line.command_parts import BARE
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.retraining_cli import SILENCED, RetrainingCLI, study_of
from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.evaluation import Run, fit_run
from lightning_unlearn.evaluation.recipe import plain, recipe
from lightning_unlearn.evaluation.runs import without

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
SAVING = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "checkpoints"}}
FISHER = {
    "class_path": "lightning_unlearn.callbacks.FisherAccumulator",
    "init_args": {"target": "network", "path": "fisher.safetensors"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_folder(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe_of(config: dict[str, Any]) -> dict[str, Any]:
    shards = list_shards(config["data"]["init_args"]["shards"])
    return recipe(config["model"], config["data"], config["trainer"], shards, SILENCED)


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one setting."""

    def change(config: dict[str, Any]) -> None:
        *outer, last = place.split("/")
        for name in outer:
            config = config[name]
        config[last] = value

    return change


CHANGES = [
    put("trainer/max_steps", 4),
    put("trainer/gradient_clip_val", 1.0),
    put("trainer/precision", "bf16-mixed"),
    put("trainer/callbacks", [EMA]),
    put("data/init_args/batch_size", 3),
    put("data/init_args/samples_per_epoch", 24),
    put("data/init_args/shuffle", 7),
    put("model/init_args/optimizer/init_args/lr", 0.02),
    put("model/init_args/flips", True),
    put("model/class_path", "Other"),
]
NO_CHANGES = [
    put("trainer/accelerator", "gpu"),
    put("trainer/logger", False),
    put("trainer/default_root_dir", "elsewhere"),
    put("trainer/max_time", None),
    put("trainer/callbacks", None),
    put("trainer/callbacks", [SAVING, FISHER]),
    put("trainer/callbacks", SAVING),
    put("data/init_args/cache", False),
    put("data/init_args/num_workers", 3),
    put("data/init_args/seed", 9),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_model_changes_the_recipe(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    config = toy_config(folder)
    before = recipe_of(config)
    change(config)
    assert recipe_of(config) != before


@pytest.mark.parametrize("change", NO_CHANGES)
def test_where_and_how_fast_is_no_part_of_the_recipe(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    config = toy_config(folder)
    before = recipe_of(config)
    changed = copy.deepcopy(config)
    change(changed)
    assert changed != config
    assert recipe_of(changed) == before


@pytest.mark.parametrize("manifest", [True, False])
def test_shards_enter_by_their_contents(manifest: bool, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    for place in (folder / "train", tmp_path / "copy"):
        (place / MANIFEST).rename(place / "kept") if not manifest else None
    try:
        config = toy_config(folder)
        before = recipe_of(config)
        config["data"]["init_args"]["shards"] = str(tmp_path / "copy")
        assert recipe_of(config) == before
        shard = tmp_path / "copy" / "shard-000001.tar"
        shard.write_bytes(shard.read_bytes() + bytes(512))
        assert recipe_of(config) != before
    finally:
        if not manifest:
            (folder / "train" / "kept").rename(folder / "train" / MANIFEST)


def test_files_and_networks_on_disk_enter_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "config.json").write_text("{}")
    (tmp_path / "results").mkdir()
    config = {"weights": "a.pt", "network": ["network", 0.5, None], "word": "results", "text": "a" * 5000}
    before = plain(config)
    assert before["word"] == "results"
    assert before["text"] == config["text"]
    assert before["weights"] != "a.pt"
    shutil.move("a.pt", "b.pt")
    shutil.move("network", "another")
    moved = {**config, "weights": "b.pt", "network": ("another", 0.5, None)}
    assert plain(moved) == before
    (tmp_path / "another" / "weights.bin").write_bytes(b"1")
    assert plain(moved)["network"][0] != before["network"][0]
    (tmp_path / "b.pt").write_bytes(b"others")
    assert plain(moved)["weights"] != before["weights"]


# ---------------------------------------------------------------------------------- trainings of a config


def cli_of(path: Path) -> RetrainingCLI:
    with quiet(steps=True):
        return RetrainingCLI("evaluate", ["--config", str(path)], "", None, **BARE)


def test_each_training_is_made_anew_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    config = toy_config(folder)
    config["trainer"] |= {"callbacks": [SAVING, EMA, FISHER], "logger": True, "default_root_dir": str(tmp_path)}
    cli = cli_of(write_config(folder / "saving.yaml", config))
    trainings = [cli.build(Run(), KEYS) for _ in range(2)]
    for part in ("module", "data", "trainer"):
        assert getattr(trainings[0], part) is not getattr(trainings[1], part)
    first, second = ([*training.trainer.callbacks] for training in trainings)  # type: ignore[attr-defined]
    (average,) = [callback for callback in first if isinstance(callback, EMAWeightAveraging)]
    assert average not in second
    assert not any(isinstance(callback, Checkpoint | FisherAccumulator | ModelCheckpoint) for callback in first)
    trainings[0].trainer.fit(trainings[0].module, trainings[0].data)
    assert trainings[0].trainer.global_step == 3
    assert list(tmp_path.iterdir()) == []
    assert not Path(trainings[0].trainer.default_root_dir).exists()
    assert trainings[0].trainer.default_root_dir != trainings[1].trainer.default_root_dir


@pytest.mark.parametrize("run", [Run((), 5), without(KEYS[2:7], 5)], ids=["all", "some"])
def test_a_config_is_trained_without_the_removed_samples(run: Run, folder: Path) -> None:
    config = toy_config(folder)
    config["model"] = {"class_path": "evaluation_toys.Plain"}
    config["data"]["init_args"]["seed"] = 77  # the run's is taken
    config["trainer"]["max_steps"] = 9
    cli = cli_of(write_config(folder / "plain.yaml", config))
    first, second = (fit_run(lambda run: cli.build(run, KEYS), run) for _ in range(2))
    assert isinstance(first, Plain)
    assert isinstance(second, Plain)
    assert set(first.seen) == set(KEYS) - set(run.removed)
    assert first.seen == second.seen  # the order of samples is the seed's, too
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    data = TrainingDataModule(str(folder / "train"), 4, 5, keys=sorted(set(KEYS) - set(run.removed)))
    expected = [key for batch in data.train_dataloader().stream for key in batch.keys]
    assert first.seen[: len(expected)] == expected


def test_study_is_of_recipe_measuring_target_and_objective(folder: Path, tmp_path: Path) -> None:
    cli = cli_of(folder / "toy.yaml")
    study, measure = study_of(cli, tmp_path / "study", queries(), draws=10)
    assert measure.draws == 10
    assert study.settings["recipe"]["trainer"]["max_steps"] == 3
    assert study.settings["measuring"] == measure.settings()
    assert (study.settings["target"], study.settings["objective"]) == (None, None)
    other, _ = study_of(cli, tmp_path / "other", queries(), "parts.denoiser", draws=10)
    assert other.settings["target"] == "parts.denoiser"
