"""``lightning-unlearn index`` and ``attribute --index`` on toy shards and a toy YAML, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import SAMPLES, run, toy_config, toy_folder, write_config

from lightning_unlearn import Index
from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.scores.files import read_scores

QUIET = ["--trainer.enable_progress_bar", "false"]
TOP = 4
ONE_QUERY = ["--data.init_args.query_keys", "[query-00000]"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    content = toy_config()
    del content["model"]["init_args"]["strategy"]
    return write_config(tmp_path_factory.mktemp("config") / "toy.yaml", content)


@pytest.fixture(scope="module")
def index(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    run("index", "--config", config, "--output", folder, *QUIET)
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning may leave its logs where a command is started


def test_it_is_made_once(config: str, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(Index.open(index)) == SAMPLES
    before = {path: path.stat().st_mtime_ns for path in (index / "shards").iterdir()}
    run("index", "--config", config, "--output", index, *QUIET)
    assert {path: path.stat().st_mtime_ns for path in (index / "shards").iterdir()} == before
    assert f"Index of {SAMPLES} samples" in capsys.readouterr().out


def test_the_shortlist_is_scored_exactly_and_comes_first(config: str, index: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wanted = ["--index", str(index), "--shortlist", str(TOP), "--method", "Consensus"]
    run("attribute", "--config", config, "--output", folder, *wanted, *QUIET)
    table, exact = read_scores(folder), read_scores(folder / "unlearning")
    assert len(table.keys) == SAMPLES
    assert table.finished is not None
    finished = {key for key, done in zip(table.keys, table.finished, strict=True) if done}
    assert finished == set(exact.keys)
    parts = {name: torch.from_numpy(values) for name, values in table.parts.items()}
    by_index = combined(parts, {"das": 1.0, "d_trak": 1.0})
    rows = [table.keys.index(key) for key in exact.keys]
    said = {name: values[rows] for name, values in parts.items()} | {"unlearning": torch.from_numpy(exact.scores)}
    for column, query in enumerate(table.queries):
        first = {table.keys[row] for row in by_index[:, column].topk(TOP).indices.tolist()}
        assert first <= finished
        best = [key for key, _ in table.top(query, TOP)]
        # In units of the query's own shortlist.
        mine = [row for row, key in enumerate(exact.keys) if key in first]
        columns = [values[:, column].double() for values in said.values()]
        expected = torch.stack([(one - one[mine].mean()) / one[mine].std(correction=0) for one in columns]).mean(0)
        order = sorted(exact.keys, key=lambda key: -float(expected[exact.keys.index(key)]))
        assert best == order[:TOP]
        # On the scale of the index, which the others keep.
        own = torch.from_numpy(table.scores[rows, column]).double()
        torch.testing.assert_close(own[mine].mean(), by_index[rows, column][mine].mean(), rtol=0, atol=1e-5)
        others = [row for row in range(SAMPLES) if row not in rows]
        np.testing.assert_allclose(table.scores[others, column], by_index[others, column], rtol=0, atol=1e-4)
    written = json.loads((folder / "run.json").read_text())
    assert written["race"] == {"index": str(index), "top": TOP, "samples": SAMPLES, "finished": len(rows)}
    # A query asked alone has the same scores.
    run("attribute", "--config", config, "--output", tmp_path / "alone", *wanted, *QUIET, *ONE_QUERY)
    alone = read_scores(tmp_path / "alone")
    (query,) = alone.queries
    together = dict(zip(table.keys, table.scores[:, table.queries.index(query)].tolist(), strict=True))
    # Beside others, one of their shortlists may come before one of its own; it keeps its score all the same.
    for key, score in alone.top(query, TOP):
        assert score == pytest.approx(together[key], abs=1e-3)
    assert all(target["sure"]["words"] for target in written["targets"].values())
    assert "what is kept of all 24 images says which 4 of each query" in (folder / "report.html").read_text()


def test_unlearning_alone_scores_the_shortlist_and_a_second_run_leaves_it(
    config: str, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["attribute", "--config", config, "--output", str(tmp_path / "run"), "--index", str(index)]
    wanted += ["--method", "unlearning"]
    run(*wanted, "--shortlist", "3", *QUIET)
    table, exact = read_scores(tmp_path / "run"), read_scores(tmp_path / "run" / "unlearning")
    assert exact.run["rule"] == "ratio"
    assert table.run["method"] == {"method": "index", "exactly": "unlearning"}
    page = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "None is a change of a loss." in page
    assert "scored by the index only" in page
    assert "The loss rose for" not in page
    assert "on few draws only" not in page
    for column, query in enumerate(table.queries):
        order = np.argsort(-exact.scores[:, column])
        assert [key for key, _ in table.top(query, 3)] == [exact.keys[row] for row in order[:3]]
    run(*wanted, "--shortlist", "3", *QUIET)
    assert "All shards are scored already" in capsys.readouterr().out
    assert main([*wanted, "--shortlist", "2", *QUIET])
    assert "another run (other shortlist)" in capsys.readouterr().err
    assert main([*wanted, "--shortlist", "3", "--trainer.precision", "bf16-mixed", *QUIET])
    assert "another run (other precision)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "DTRAK"], "by unlearning or Consensus, not by DTRAK"),
        (["--shortlist", "0"], "--shortlist must be at least 1"),
        (["--keep_deviations", "true"], "leave race and keep_deviations out"),
        (["--method", "Consensus", "--method.unlearning", "0"], "give it a weight above 0"),
        (["--model.init_args.views.timesteps", "3"], "made with other views than this model's"),
        (["--method", "Consensus", "--method.das_ridge", "0.1"], "leave --method.das_ridge out"),
        (["--method", "Consensus", "--method.influence", "1"], "leave --method.influence out"),
        (["--method", "Consensus", "--method.every", "1"], "leave --method.every out"),
        (["--data.init_args.on_bad_sample", "skip"], "was made with on_bad_sample error, not skip"),
        (["--data.init_args.keys", "[sample-00001]"], "leave keys out of the data"),
    ],
)
def test_what_does_not_fit_is_refused_before_long_work(
    config: str, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    wanted = ["attribute", "--config", config, "--index", str(index), "--output", str(tmp_path / "run")]
    assert main([*wanted, *options, *QUIET])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_index_of_other_shards_is_refused(
    config: str, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = next(iter(sorted((toy_folder() / "train").glob("*.tar"))))
    wanted = ["attribute", "--config", config, "--index", str(index), "--output", str(tmp_path / "run")]
    assert main([*wanted, "--data.init_args.shards", str(some), *QUIET])
    assert "is of other shards than the data (4 shards differ" in capsys.readouterr().err
    assert main(["index", "--config", config, "--output", str(tmp_path / "other"), "--numbers", "3", *QUIET])
    assert "choose fewer layers, or more numbers" in capsys.readouterr().err
