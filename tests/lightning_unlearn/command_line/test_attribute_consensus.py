"""``lightning-unlearn attribute --method Consensus`` on toy shards and a toy YAML, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import run, toy_config, write_config

from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.scores.files import read_scores

QUIET = ["--trainer.enable_progress_bar", "false"]
CONSENSUS = ["--method", "Consensus"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)  # Lightning may leave its logs where a command is started
    content = toy_config()
    del content["model"]["init_args"]["strategy"]
    return write_config(tmp_path / "toy.yaml", content)


def test_the_table_keeps_what_each_method_said(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("attribute", "--config", config, "--output", folder, *CONSENSUS, *QUIET)
    table = read_scores(folder)
    assert list(table.parts) == ["das", "d_trak", "unlearning"]
    parts = {name: torch.from_numpy(values) for name, values in table.parts.items()}
    expected = combined(parts, dict.fromkeys(parts, 1.0)).numpy()
    # Parts are kept in float32; standardised scores are of size 1.
    np.testing.assert_allclose(table.scores, expected, rtol=0, atol=1e-4)
    # Unlearning's own run stands beside it, and is the same part.
    alone = read_scores(folder / "unlearning")
    assert alone.run["rule"] == "difference"
    assert alone.run["unlearning"]["target_increase"] == 0.3
    np.testing.assert_array_equal(table.parts["unlearning"], alone.scores)
    for method in ("DAS", "DTRAK"):
        ridge = {"DAS": "0.001", "DTRAK": "0.01"}[method]
        other = tmp_path / method
        run("attribute", "--config", config, "--output", other, "--method", method, "--method.ridge", ridge, *QUIET)
        said, by_itself = table.parts[{"DAS": "das", "DTRAK": "d_trak"}[method]], read_scores(other).scores
        np.testing.assert_allclose(said, by_itself, rtol=1e-3, atol=1e-4 * np.abs(by_itself).max())


def test_each_query_says_how_sure_it_is(config: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("attribute", "--config", config, "--output", folder, *CONSENSUS, *QUIET)
    written = json.loads((folder / "run.json").read_text())
    assert written["parts"] == ["das", "d_trak", "unlearning"]
    for target in written["targets"].values():
        assert target["sure"]["words"] in ("methods agree", "caption only", "pixels only", "not sure")
        assert 0 <= target["sure"]["first_ten"] <= 1
    page = (folder / "report.html").read_text()
    assert all(target["sure"]["words"] in page.lower() for target in written["targets"].values())


def test_it_goes_on_where_it_was_stopped(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run("attribute", "--config", config, "--output", folder, *CONSENSUS, *QUIET)
    before = read_scores(folder).scores
    for shard in (folder / "scores").glob("*.parquet"):
        shard.unlink()
    capsys.readouterr()
    run("attribute", "--config", config, "--output", folder, *CONSENSUS, *QUIET)
    assert "unlearned already" in capsys.readouterr().out
    np.testing.assert_array_equal(read_scores(folder).scores, before)
    capsys.readouterr()
    assert main(["attribute", "--config", config, "--output", str(folder), *CONSENSUS, "--method.rise", "0.2", *QUIET])
    assert "another run (other method, unlearning)" in capsys.readouterr().err


def test_a_step_of_its_own_is_refused(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    strategy = ["--model.init_args.strategy", "Newton", "--model.init_args.strategy.target_increase", "2.0"]
    assert main(["attribute", "--config", config, "--output", str(folder), *CONSENSUS, *strategy, *QUIET])
    assert "says itself how far a step goes" in capsys.readouterr().err
    assert not folder.exists()
