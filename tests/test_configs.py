"""The YAML in configs/ runs as it stands; what omegaconf does within a YAML file, and what it does not."""

from __future__ import annotations

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_toys import run, toy_config, write_config

from lightning_unlearn.command_line.cli import main
from lightning_unlearn.scores.files import read_scores

CONFIGS = Path(str(files("lightning_unlearn.configs")))
SAMPLE = Path(str(files("lightning_unlearn.datamodules"))) / "sample"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The settings that a command would run with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--print_config"])
    assert ended.value.code == 0
    settings: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return settings


def test_these_are_all_the_configs_that_there_are() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {
        *("sample.yaml", "train_sample.yaml"),
        *("mscoco.yaml", "train_mscoco.yaml", "custom_diffusion.yaml"),  # tests/test_papers.py runs them
    }
    assert {path.name for path in CONFIGS.glob("*.sh")} == {"slurm.sh", "torchrun.sh"}


def test_sample_config_attributes_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(
        *("attribute", "--config", "sample.yaml", "--output", "run", "--trainer.enable_progress_bar", "false"),
        *("--data.init_args.query_keys", "[generated-tiger]", "--data.init_args.draws", "4"),
        *("--data.init_args.shards", SAMPLE / "shards" / "emoji-000000.tar"),
        *("--model.init_args.rise_draws", "2", "--model.init_args.views.timesteps", "1"),
    )
    table = read_scores(tmp_path / "run")
    assert len(table.keys) == 136
    assert table.queries == ["generated-tiger"]
    assert table.run["targets"]["generated-tiger"]["captions"] == ["tiger face"]
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_training_config_trains_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="FisherAccumulator took no batch"):  # it waits for step 1,500
        run(
            *("fit", "--config", "configs/train_sample.yaml", "--trainer.max_steps", "2"),
            *("--data.init_args.batch_size", "4", "--trainer.enable_progress_bar", "false"),
            *("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=saved"),
            *("--trainer.callbacks.every_n_train_steps=1",),
        )
    (saved,) = (tmp_path / "saved").glob("*.ckpt")
    assert "step=2" in saved.name


@pytest.mark.parametrize(
    ("name", "weights"), [("sample", str(SAMPLE / "model.safetensors")), ("mscoco", "data/mscoco/model.bin")]
)
def test_both_configs_train_and_attribute_one_and_the_same_network(
    name: str, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    attributed = printed(capsys, "attribute", "--config", f"{name}.yaml")["model"]["init_args"]
    trained = printed(capsys, "fit", "--config", f"train_{name}.yaml")["model"]["init_args"]
    assert attributed["network"] == trained["network"]
    assert attributed["objective"] == trained["objective"]
    assert attributed["weights"] == weights


def test_config_of_ones_own_comes_before_a_ready_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = toy_config()
    content["data"]["init_args"]["draws"] = 17
    write_config(tmp_path / "sample.yaml", content)
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "attribute", "--config", "sample.yaml")["data"]["init_args"]["draws"] == 17
    assert printed(capsys, "attribute", "--config=configs/sample.yaml")["data"]["init_args"]["draws"] == 128


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_launch_scripts_name_options_that_there_are(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(CONFIGS / script)], check=True)
    command = (CONFIGS / script).read_text().partition(" attribute ")[2].replace("\\\n", " ")
    for variable, value in {
        '"$@"': "--config sample.yaml --output run",
        '"$SLURM_JOB_NUM_NODES"': "2",
        '"$NNODES"': "2",
        '"$SLURM_NTASKS_PER_NODE"': "4",
        '"${DEVICES:-1}"': "4",
    }.items():
        command = command.replace(variable, value)
    settings = printed(capsys, "attribute", *command.split())
    assert settings["output"] == "run"
    assert settings["trainer"]["strategy"] == "ddp"
    assert (settings["trainer"]["num_nodes"], str(settings["trainer"]["devices"])) == (2, "4")
    assert settings["data"]["init_args"]["num_workers"] == {"slurm.sh": 4, "torchrun.sh": 0}[script]


# ---------------------------------------------------------------------- omegaconf


def test_environment_and_values_used_twice_are_resolved_within_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = toy_config()
    content["data"]["init_args"]["draw_batch_size"] = "${data.init_args.batch_size}"
    content["trainer"]["default_root_dir"] = "${oc.env:SOMEWHERE}/runs"
    path = write_config(tmp_path / "toy.yaml", content)
    monkeypatch.setenv("SOMEWHERE", "/mnt/disk")
    for command in ("attribute", "fit", "predict", "fisher"):
        settings = printed(capsys, command, "--config", path)
        assert settings["data"]["init_args"]["draw_batch_size"] == settings["data"]["init_args"]["batch_size"] == 4
        assert settings["trainer"]["default_root_dir"] == "/mnt/disk/runs"


def test_option_on_the_command_line_does_not_reach_what_the_file_interpolates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = toy_config()
    content["data"]["init_args"]["draw_batch_size"] = "${data.init_args.batch_size}"
    path = write_config(tmp_path / "toy.yaml", content)
    settings = printed(capsys, "attribute", "--config", path, "--data.init_args.batch_size", "9")["data"]["init_args"]
    # Interpolations are resolved when the file is read, before options are looked at.
    assert (settings["batch_size"], settings["draw_batch_size"]) == (9, 4)


def test_second_file_does_not_see_the_values_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_config(tmp_path / "first.yaml")
    (tmp_path / "second.yaml").write_text("data: {init_args: {draw_batch_size: '${data.init_args.batch_size}'}}")
    with pytest.raises(SystemExit) as ended:
        main(["attribute", "--config", first, "--config", str(tmp_path / "second.yaml")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "batch_size" in said


def test_unset_variable_gets_one_sentence_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "toy.yaml")
    monkeypatch.delenv("TOYS")
    with pytest.raises(SystemExit) as ended:
        main(["attribute", "--config", path])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "TOYS" in said
