"""One command from a model and a folder to a report: once, stopped and started again, and asked something else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_toys
import pytest
import yaml
from command_toys import run

from lightning_unlearn.command_line import ask_run, fisher_command
from lightning_unlearn.command_line.ask_config import method_for
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.command_line.signals import Stopped
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable

# Lightning's advice on loaders is a matter of the commands' own tests.
pytestmark = pytest.mark.filterwarnings("ignore")

ASKED = ["--prompt", "a dog on the moon", "--seed", "7", "--steps", "2", "--passes", "2"]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def sdxl(toys: Path) -> list[str]:
    return lora_toys.write_sdxl(toys)


@pytest.fixture(scope="module")
def answered(sdxl: list[str], toys: Path) -> Path:
    """An answer about the LoRA on SDXL."""
    run("ask", *sdxl, *ASKED, "--output", toys / "answer")
    return toys / "answer"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config(answer: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((answer / "ask.yaml").read_text()))


def only_table(answer: Path) -> ScoreTable:
    (folder,) = (answer / "answers").iterdir()
    return read_scores(folder)


def queries(answer: Path) -> list[Any]:
    shards = list_shards(config(answer)["data"]["init_args"]["queries"])
    return [sample for shard in shards for sample in read_samples(shard, pictures=True)]


def test_a_lora_on_sdxl_and_a_kohya_folder_become_a_report(answered: Path) -> None:
    assert "a dog on the moon" in (answered / "report.html").read_text()
    table = only_table(answered)
    assert table.queries == ["a-dog-on-the-moon-seed-7"]
    assert len(table.keys) == lora_toys.PICTURES
    (query,) = queries(answered)
    made = {name: query.metadata[name] for name in ("kind", "seed", "steps", "adapter", "scheduler")}
    scheduler = "EulerDiscreteScheduler"
    assert made == {
        "kind": "generated",
        "seed": 7,
        "steps": 2,
        "adapter": "sdxl_lora.safetensors",
        "scheduler": scheduler,
    }
    model = config(answered)["model"]["init_args"]
    assert model["parameters"] == "adapter"
    # The folder's number of repeats is the pictures' weight, and no query's.
    samples = [sample for shard in list_shards(str(answered / "shards")) for sample in read_samples(shard)]
    assert {sample.metadata["weight"] for sample in samples} == {3}
    assert "weight" not in query.metadata


def test_what_it_decided_is_a_config_of_the_main_commands(answered: Path, tmp_path: Path) -> None:
    ask = answered / "ask.yaml"
    run("attribute", "--config", ask, "--method", "unlearning", "--output", tmp_path / "again")
    ours, theirs = only_table(answered), read_scores(tmp_path / "again")
    assert (ours.keys, ours.queries) == (theirs.keys, theirs.queries)
    assert (ours.scores == theirs.scores).all()
    run("fit", "--config", ask, "--trainer.default_root_dir", tmp_path, "--trainer.logger", "false")
    (deltas,) = (
        tmp_path.rglob("*.ckpt") if not (tmp_path / "checkpoints").is_dir() else (tmp_path / "checkpoints").iterdir()
    )
    writer = ("--trainer.callbacks+=ScoreWriter", f"--trainer.callbacks.folder={tmp_path / 'predicted'}")
    run("predict", "--config", ask, "--ckpt_path", deltas, "--trainer.logger", "false", *writer)
    assert (read_scores(tmp_path / "predicted").scores == ours.scores).all()


def test_the_same_command_again_makes_nothing_anew(
    answered: Path, sdxl: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # A report, and the record of a run, are written again.
    files = [path for path in answered.rglob("*.*") if path.name not in ("report.html", "run.json", "ask.yaml")]
    before = {path: path.stat().st_mtime_ns for path in files}
    run("ask", *sdxl, *ASKED, "--output", answered)
    said = capsys.readouterr().out
    for words in ("prepared already", "1 picture there already", "Fisher: there already", "unlearned already"):
        assert words in said
    assert "What is left" not in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_prompt_takes_shards_fisher_and_pictures_that_are_there(
    answered: Path, sdxl: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second"
    shutil.copytree(answered, second)
    refuse: Callable[[list[str]], None] = lambda words: pytest.fail(f"a second Fisher: {words}")  # noqa: E731
    monkeypatch.setattr(fisher_command, "fisher", refuse)
    words = ["--prompt", "b b", *ASKED, "--output", str(second), "--method", "TextSimilarity"]
    # The picture of this folder and that one are the same files, wherever they lie.
    run("ask", *sdxl, *words)
    said = capsys.readouterr().out
    assert "Queries: 2 pictures generated, 1 of them there already" in said
    assert "Fisher: TextSimilarity needs none" in said
    assert [query.key for query in queries(second)] == ["b-b-seed-7", "a-dog-on-the-moon-seed-7"]
    kept = [path.read_bytes() for path in sorted((answered / "pictures").glob("*.png"))]
    assert set(kept) < {path.read_bytes() for path in (second / "pictures").glob("*.png")}
    assert len(list((second / "answers").iterdir())) == 2


def test_stopped_at_any_stage_it_goes_on_and_ends_with_the_same_answer(
    answered: Path, sdxl: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one folder it is stopped one stage later each time, and does nothing that was done before."""
    folder, usual = tmp_path / "stopped", ask_run._command
    for stage in ("query", "fisher", "attribute"):
        begun: list[str] = []

        def stopping(name: str, words: list[str], stage: str = stage, begun: list[str] = begun) -> None:
            name = "query" if name == "prepare" and str(folder / "shards") not in words else name
            begun.append(name)
            if name == stage:
                raise Stopped(2)
            usual("prepare" if name == "query" else name, words)

        with monkeypatch.context() as patched:
            patched.setattr(ask_run, "_command", stopping)
            assert main(["ask", *sdxl, *ASKED, "--output", str(folder)]) == 128 + 2
        assert (
            begun
            == {
                "query": ["prepare", "query"],
                "fisher": ["query", "fisher"],
                "attribute": ["fisher", "attribute"],
            }[stage]
        )
    run("ask", *sdxl, *ASKED, "--output", folder)
    assert (only_table(folder).scores == only_table(answered).scores).all()
    assert (folder / "report.html").is_file()


def test_a_lora_on_flux_becomes_a_report(toys: Path) -> None:
    flux = lora_toys.write_flux(toys)
    run("ask", *flux, *ASKED, "--output", toys / "flux_answer")
    assert only_table(toys / "flux_answer").queries == ["a-dog-on-the-moon-seed-7"]
    objective = config(toys / "flux_answer")["model"]["init_args"]["objective"]
    assert objective["init_args"]["guidance"] == 1.0


def test_methods_for_kinds_of_models() -> None:
    assert method_for("model") is None
    assert method_for("adapter") == method_for("customised") == "unlearning"
