"""``lightning-unlearn evaluate`` on the toy training config, as a user runs it, and in processes that are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_toys import run
from evaluation_toys import KEYS, QUERIES, files, query_fields, toy_config, toy_folder, write_config, write_scores
from processes import Script
from toys import told, toy_fields, toy_shards

import lightning_unlearn.__main__
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.command_line.evaluate_command import array_place, duration
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.evaluation import Run

DESIGN = {"subsets": 2, "subsets_twice": 2, "seeds": 2, "k": "[2]", "removal_queries": 2, "random_repeats": 1}
SMALL = {"subsets": 0, "subsets_twice": 0, "seeds": 2, "k": "[2]", "removal_queries": 1, "random_repeats": 1}
# Two on all samples, two subsets twice, one random removal, and those of two methods, which share one.
MODELS = 2 + 4 + 1 + 3


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, queries, config and score tables, which no test changes."""
    folder = toy_folder(tmp_path_factory.mktemp("evaluate"))
    scores = np.random.default_rng(0).normal(size=(12, 3))
    write_scores(folder / "first", scores)
    scores[:, 1:] = scores[::-1, 1:]  # both name the same samples for the first query
    write_scores(folder / "second", scores)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning may leave its logs where a command is started."""
    monkeypatch.chdir(tmp_path)


def options(toys: Path, study: Path, design: dict[str, Any] | None = None, config: Path | None = None) -> list[str]:
    words = ["evaluate", "--config", config or toys / "toy.yaml", "--queries", toys / "queries", "--study", study]
    words += [word for name, value in (design or DESIGN).items() for word in (f"--design.{name}", value)]
    return [str(word) for word in [*words, "--draws", 10]]


def methods(toys: Path) -> list[str]:
    return ["--scores", json.dumps({name: str(toys / name) for name in ("first", "second")})]


@pytest.fixture(scope="module")
def finished(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study of an evaluation that nothing interrupted; no test changes it."""
    before = Path.cwd()
    folder = tmp_path_factory.mktemp("finished")
    os.chdir(folder)
    try:
        run(*options(toys, folder / "study"), *methods(toys))
    finally:
        os.chdir(before)
    assert [path.name for path in folder.iterdir()] == ["study"]  # no logs, no checkpoints
    return folder / "study"


def spoken(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What a command that ends well says."""
    capsys.readouterr()
    run(*words)
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line and not line.startswith("Retraining")]  # the bar
    assert len(said) == 1, said
    return said[0]


# ---------------------------------------------------------------------------------- from config to results


def test_results_are_of_all_models_and_every_method(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_bytes())
    assert len(files(finished)) == MODELS
    assert set(results["methods"]) == {"first", "second"}
    for judged in results["methods"].values():
        assert -1 <= judged["datamodelling"]["mean"] <= 1
        assert set(judged["removals"]["2"]["changes"]) == {"loss", "mse", "ssim"}
    assert results["counts"]["subset models"] == results["counts"]["pairs of subset models"] == 2
    for path in (finished / "models").iterdir():
        content = json.loads(path.read_bytes())
        assert Run(tuple(content["removed"]), content["seed"]).name == path.stem
        assert list(content["outcomes"]) == QUERIES


def test_a_second_run_trains_nothing_and_writes_the_same_results(
    finished: Path, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, results = files(finished), (finished / "results.json").read_bytes()
    said = spoken(capsys, *options(toys, finished), *methods(toys))
    assert said[0] == f"{MODELS} models: {MODELS} finished, 0 missing."
    assert said[-1] == f"Results: {finished / 'results.json'}"
    assert "inside the noise floor" in "".join(said)
    assert files(finished) == before
    assert (finished / "results.json").read_bytes() == results


def test_list_says_what_is_missing_and_how_long_it_takes(
    finished: Path, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*options(toys, tmp_path / "study"), *methods(toys), "--list", "true"]
    first, second = spoken(capsys, *words)
    assert first == f"{MODELS} models: 0 finished, {MODELS} missing; the first one will show how long they take."
    assert second.startswith(f"{MODELS} models are still missing")
    assert files(tmp_path / "study") == {}
    for name in (Run((), 1).name, Run((), 2).name):
        content = json.loads((finished / "models" / f"{name}.json").read_bytes())
        (tmp_path / "study" / "models" / f"{name}.json").write_text(json.dumps({**content, "seconds": 60.0}))
    assert spoken(capsys, *words)[0] == f"{MODELS} models: 2 finished, {MODELS - 2} missing; about 8 min, 60 s each."
    share = spoken(capsys, *words, "--index", "1", "--count", "4")[0]
    assert share.endswith("missing, 2 of them this process's (share 1 of 4); about 2 min, 60 s each.")


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5340, "89 min"), (7500, "2 h 05 min")]
)
def test_times_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_slurm_array_deals_the_models_to_its_tasks(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study"
    words = [*options(toys, study, SMALL), "--weights", str(tmp_path / "weights")]
    for name, value in {"ID": 5, "MIN": 3, "STEP": 2, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    said = spoken(capsys, *words)
    assert "1 of them this process's (share 1 of 2)" in said[0]
    assert set(files(study)) == {f"{Run((), 2).name}.json"}
    assert said[-1].startswith("2 models are still missing")
    assert not (study / "results.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert "2 of them this process's (share 0 of 2)" in spoken(capsys, *words)[0]
    assert (study / "results.json").is_file()
    assert {path.stem for path in (tmp_path / "weights").iterdir()} == {Path(name).stem for name in files(study)}
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")  # finished: the next one has nothing to do
    before = files(study)
    spoken(capsys, *words)
    assert files(study) == before


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"ID": 0, "MIN": 0, "STEP": 1, "COUNT": 4}, (0, 4)),
        ({"ID": 4, "MIN": 1, "STEP": 1, "COUNT": 4}, (3, 4)),
        ({"ID": 30, "MIN": 10, "STEP": 10, "COUNT": 3}, (2, 3)),
        ({"ID": 7, "MIN": 7, "STEP": 0, "COUNT": 1}, (0, 1)),
        ({"ID": 7, "MIN": 1, "STEP": 1, "COUNT": 3}, (6, 3)),  # --array=1,2,7
    ],
)
def test_place_in_an_array_is_slurms(
    variables: dict[str, int], place: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ID", "MIN", "STEP", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert array_place() == place


# ---------------------------------------------------------------------------------- kill -9


def contents(study: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and bytes of each finished model's file."""
    return {name: (*found, (study / "models" / name).read_bytes()) for name, found in files(study).items()}


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_results(finished: Path, toys: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    words = [*options(toys, study), *methods(toys)]
    with Script(lightning_unlearn.__main__.__file__, *words) as script:
        deadline = time.monotonic() + 200
        while len(files(study)) < 2 and script.status is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert script.kill() == -signal.SIGKILL, script.said()
    before = contents(study)
    assert 2 <= len(before) < MODELS
    assert not (study / "results.json").exists()
    with Script(lightning_unlearn.__main__.__file__, *words) as script:
        assert script.wait(200) == 0, script.said()
        assert f"{MODELS} models: {len(before)} finished, {MODELS - len(before)} missing; about " in script.said()
    after = contents(study)
    assert {name: after[name] for name in before} == before
    assert len(after) == MODELS
    # The uninterrupted evaluation was another process's, in another folder and order of trainings.
    assert (study / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    for name in after:
        first, second = (json.loads((folder / "models" / name).read_bytes()) for folder in (study, finished))
        assert first["outcomes"] == second["outcomes"]


# ---------------------------------------------------------------------------------- errors, each in one sentence


def test_queries_that_are_missing_are_asked_for(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = options(toys, tmp_path / "study")
    place = words.index("--queries")
    assert "The queries are missing; give the shards" in refused(capsys, *words[:place], *words[place + 2 :])
    assert "no-such-folder" in refused(capsys, *words, "--queries", "no-such-folder")


@pytest.mark.parametrize(
    ("keys", "queries", "said"),
    [
        (KEYS[:-1], QUERIES, "are of 11 samples, but the shards hold 12 others; score the same shards."),
        ([*KEYS[:-1], "else"], QUERIES, "; score the same shards."),
        (KEYS, [*QUERIES[:2], "else"], "are not of the query 'query-00002'; attribute the same queries."),
    ],
)
def test_scores_of_other_samples_or_queries_are_refused(
    keys: list[str], queries: list[str], said: str, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_scores(tmp_path / "scores", np.zeros((len(keys), 3)), keys, queries)
    message = refused(capsys, *options(toys, tmp_path / "study"), "--scores", json.dumps({"one": str(folder)}))
    assert f"The scores in {folder} " in message
    assert said in message


def test_scores_of_sets_are_refused(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_scores(tmp_path / "scores", np.zeros((12, 3)))
    about = json.loads((folder / "run.json").read_text())
    about["targets"] = {query: {"members": [query, "another"]} for query in QUERIES}
    (folder / "run.json").write_text(json.dumps(about))
    message = refused(capsys, *options(toys, tmp_path / "study"), "--scores", json.dumps({"one": str(folder)}))
    assert f"The scores in {folder} are of sets of queries" in message
    assert message.endswith("attribute without targets_by.")


def test_a_querys_region_is_measured(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = [told(query_fields(0), np.eye(8)), query_fields(1), query_fields(2)]
    write_shards(masked, tmp_path / "queries")
    small = options(toys, tmp_path / "study", SMALL)
    run(*small, *methods(toys), "--queries", str(tmp_path / "queries"))
    assert "another measuring.queries_digest" in refused(capsys, *small, *methods(toys))


def test_a_methods_folder_that_is_not_there_is_refused(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *options(toys, tmp_path / "study"), "--scores", '{"one": "nowhere"}')
    assert "There are no scores in nowhere" in message
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--index", "2", "--count", "2"], "Share 2 of 2 is none"),
        (["--design.seeds", "0"], "The design's seeds are 0"),
        (["--design.k", "[0.999]"], "K = 0.999 of 12 samples can't be removed"),
        (["--design.subset_share", "1.0"], "Subsets with a share of 1.0"),
        (["--draws", "7"], "must be a multiple of 10"),
        (["--encoder", "no.such"], "no encoder 'no.such'"),
        (["--target", "unet"], "DiffusionModule has no 'unet'"),
        (["--trainer.devices", "2", "--trainer.strategy", "ddp"], "Each model is retrained by one process"),
        (["--data.keys", '["sample-00001"]'], "leave `keys` out"),
        (["--data", "AttributionDataModule", "--data.queries", "q"], "give one as data, not AttributionDataModule."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit_are_refused(
    change: list[str], said: str, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *options(toys, tmp_path / "study"), *change)
    assert files(tmp_path / "study") == {}


def test_a_key_that_stands_twice_is_refused(toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_shards(tmp_path / "train", 12, 4)
    write_shards([toy_fields(3)], tmp_path / "train" / "more")
    shards = json.dumps([str(tmp_path / "train"), str(tmp_path / "train" / "more")])
    message = refused(capsys, *options(toys, tmp_path / "study"), "--data.shards", shards)
    assert "The key 'sample-00003' stands twice in the training shards" in message
    write_shards([query_fields(0), query_fields(0)], tmp_path / "queries", samples_per_shard=1)
    words = options(toys, tmp_path / "study")
    assert "A query's key stands twice" in refused(capsys, *words, "--queries", tmp_path / "queries")


def test_a_study_of_another_recipe_is_refused_and_of_another_place_is_not(
    finished: Path, toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(finished)
    config = toy_config(toys)
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.02
    other = write_config(tmp_path / "other.yaml", config)
    message = refused(capsys, *options(toys, finished, config=other), *methods(toys))
    assert re.search(r"made with another recipe\.model\S*\.lr; choose another folder, or remove that one\.", message)
    assert "another measuring.draws;" in refused(capsys, *options(toys, finished), "--draws", "20")
    # Where and how fast it is trained is no part of the recipe.
    config = toy_config(toys)
    config["data"]["init_args"] |= {"num_workers": 1, "cache": False, "seed": 5}
    config["trainer"] |= {"enable_progress_bar": True, "callbacks": [{"class_path": "ModelCheckpoint"}]}
    words = options(toys, finished, config=write_config(tmp_path / "same.yaml", config))
    assert (
        spoken(capsys, *words, *methods(toys), "--list", "true")[0] == f"{MODELS} models: {MODELS} finished, 0 missing."
    )
    assert files(finished) == before
