"""A race from its first stage to its table: whoever is finished has the scores of a run without a race."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import decoded, partly_used_module, race, ragged_fields, score, strategy_of, toy_data, unlearn
from command_toys import run, write_config
from lightning.pytorch import Callback
from processes import run_ranks
from torch import Tensor
from toys import ToyObjective

from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.finished_words import outcome
from lightning_unlearn.scores.race_folder import FIRST, RaceFolder
from lightning_unlearn.scores.racing import Race
from lightning_unlearn.scores.table import ScoreTable

SCRIPT = Path(__file__).parents[2] / "helpers" / "attribution_runs.py"
VIEWS: dict[str, Any] = {"timesteps": 8, "noise": "per_sample"}
RACE: dict[str, Any] = {"top": 2, "views": 4, "share": 0.4}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("race")
    write_shards(ragged_fields(range(24)), folder / "train", samples_per_shard=5)
    write_shards(ragged_fields(range(1, 3), prefix="query"), folder / "queries")
    unlearn(partly_used_module(strategy_of({"target_increase": 0.5})), toy_data(folder, draws=10), folder / "deltas")
    return folder


def raced(folder: Path, out: Path, *callbacks: Callback, **data: Any) -> ScoreTable:
    module = partly_used_module(views=Views(**VIEWS))
    race(module, toy_data(folder, draws=10, **data), out, folder / "deltas", RACE, *callbacks)
    return read_scores(out)


@pytest.fixture(scope="module")
def plain(toys: Path) -> ScoreTable:
    score(partly_used_module(views=Views(**VIEWS)), toy_data(toys, draws=10), toys / "plain", toys / "deltas")
    return read_scores(toys / "plain")


@pytest.fixture(scope="module")
def alone(toys: Path) -> ScoreTable:
    return raced(toys, toys / "alone")


def assert_same(found: ScoreTable, expected: ScoreTable) -> None:
    assert found.keys == expected.keys
    assert found.finished is not None
    assert expected.finished is not None
    assert (found.finished == expected.finished).all()
    assert (abs(found.scores - expected.scores).max(0) <= 1e-4 * expected.scores.std(0)).all()


def test_finished_samples_have_the_scores_of_a_run_without_a_race(
    toys: Path, plain: ScoreTable, alone: ScoreTable
) -> None:
    finished = alone.finished
    assert finished is not None
    assert 4 <= finished.sum() <= 10  # of 24; the leaders of two queries, and 40 % in all
    for name in ("scores", "errors", "base_losses"):
        ours, theirs = getattr(alone, name), getattr(plain, name)
        np.testing.assert_allclose(ours[finished], theirs[finished], rtol=1e-4, atol=1e-7)
        assert (ours[~finished] != theirs[~finished]).any()
    first = read_scores(toys / "alone" / "race" / FIRST)
    assert (alone.scores[~finished] == first.scores[~finished]).all()
    for query in plain.queries:
        assert set(alone.order(query)[:2]) <= set(np.flatnonzero(finished))
        assert [alone.rank(query, key) for key, _ in alone.top(query, 24)] == list(range(24))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_race_does_not_depend_on_the_batch_size(toys: Path, alone: ScoreTable, tmp_path: Path, batch_size: int) -> None:
    assert_same(raced(toys, tmp_path / "out", batch_size=batch_size), alone)


def test_race_of_two_processes_is_that_of_one(toys: Path, alone: ScoreTable, tmp_path: Path) -> None:
    job = {"kind": "race", "folder": str(toys), "out": str(tmp_path / "out"), "deltas": str(toys / "deltas")}
    job |= {"network": "partly used", "views": VIEWS, "race": RACE, "data": {"draws": 10}}  # type: ignore[dict-item]
    (tmp_path / "out").mkdir()
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [job], "trainer": {"strategy": "ddp", "devices": 2}}))
    run_ranks(str(SCRIPT), str(tmp_path / "jobs.json"))
    assert_same(read_scores(tmp_path / "out"), alone)


class StopError(RuntimeError):
    pass


class StopAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_predict_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError


@pytest.mark.parametrize("batches", [3, 13])  # in the first stage, in the leaders' round
def test_race_that_is_stopped_goes_on_where_it_was(toys: Path, alone: ScoreTable, tmp_path: Path, batches: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        raced(toys, out, StopAfter(batches))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    assert before
    assert_same(raced(toys, out), alone)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    table = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    raced(toys, out)  # all of it is done
    assert table == {path: path.stat().st_mtime_ns for path in table}


def test_broken_promise_is_seen(toys: Path, alone: ScoreTable) -> None:
    about = alone.run["race"]
    assert about["left_in_reach"] > 0  # the cap
    assert "nothing is promised; raise the share" in outcome(about)
    assert "with a probability of at least 95%" in outcome({**about, "left_in_reach": 0})
    assert "is broken" in outcome({**about, "left_in_reach": 0, "beyond": 0.06})
    # Scores by the few views that say nothing of those by all: their upper ends don't hold.
    found = RaceFolder(toys / "alone" / "race", Race(**RACE))
    found._uppers = np.full_like(alone.scores, alone.scores.min(), dtype=np.float64)
    missing = np.zeros_like(alone.finished)
    assert found._outcome(alone.scores, alone.finished, missing)["beyond"] > 0.9
    # Nobody else could be among the best, but for a sample that should have been finished and is not.
    missing[np.flatnonzero(~alone.finished)[0]] = True
    of_missing = found._outcome(alone.scores, alone.finished, missing)
    assert (of_missing["missing"], of_missing["left_in_reach"]) == (1, 1)
    said = outcome({**about, **of_missing, "share": None})
    assert "1 more should have been, but got no finite score there. What is missing could be among" in said
    assert "beyond the cap" not in said
    assert "2 more could be among" in outcome({**about, **of_missing, "left_in_reach": 3})


def test_leader_that_is_bad_on_all_draws_only_is_left_out_and_the_promise_with_it(
    toys: Path, alone: ScoreTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = RaceFolder(toys / "alone" / "race", Race(**RACE)).first.top(alone.queries[0], 1)[0][0]
    (latent,) = (decoded(fields).latent for fields in ragged_fields(range(24)) if fields["__key__"] == key)
    module, loss = partly_used_module(views=Views(**VIEWS)), ToyObjective.__call__

    def bad_on_all_draws(self: Any, network: Any, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        bad = (batch.latents == latent).flatten(1).all(1) & (module.views.every == 1)
        return loss(self, network, batch, timesteps, noise).masked_fill(bad, torch.nan)

    monkeypatch.setattr(ToyObjective, "__call__", bad_on_all_draws)
    settings = {**RACE, "share": None}
    race(module, toy_data(toys, draws=10), tmp_path, toys / "deltas", settings, writer={"on_bad_sample": "skip"})
    table = read_scores(tmp_path)
    assert table.finished is not None
    assert not table.finished[table.keys.index(key)]
    assert table.run["race"]["missing"] == table.run["race"]["left_in_reach"] == 1
    assert "nothing is promised; check the samples and the model" in outcome(table.run["race"])


@pytest.fixture
def stages(toys: Path, alone: ScoreTable, tmp_path: Path) -> Path:
    """A copy of the stages of :func:`alone`."""
    return Path(shutil.copytree(toys / "alone" / "race", tmp_path / "race"))


def test_table_of_another_race_is_not_taken_in(stages: Path, toys: Path, plain: ScoreTable, tmp_path: Path) -> None:
    assert plain.finished is None  # all samples, whoever contends
    shutil.rmtree(stages / "contenders", ignore_errors=True)
    shutil.copytree(toys / "plain", stages / "contenders")
    with pytest.raises(InputError, match=r"race/contenders holds scores of another race \(other keys\)"):
        RaceFolder(stages, Race(**RACE)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_round_that_the_race_has_not_is_not_taken_in(stages: Path, toys: Path, tmp_path: Path) -> None:
    found = RaceFolder(stages, Race(**RACE))
    found._uppers = np.full_like(found.first.scores, -np.inf, dtype=np.float64)  # so that nobody contends
    shutil.rmtree(stages / "contenders", ignore_errors=True)
    assert found.write(tmp_path / "out").run["race"]["left_in_reach"] == 0
    shutil.copytree(toys / "plain", stages / "contenders")
    with pytest.raises(InputError, match=r"race/contenders holds scores of another race \(other keys\)"):
        found.write(tmp_path / "other")


def test_table_is_not_written_before_all_rounds_are_scored(stages: Path, tmp_path: Path) -> None:
    shutil.rmtree(stages / "leaders")
    with pytest.raises(InputError, match=r"race/leaders lacks scores of the \d samples that are to be scored by all"):
        RaceFolder(stages, Race(**RACE)).write(tmp_path / "out")


def test_stage_of_another_race_is_refused(toys: Path, alone: ScoreTable) -> None:
    with pytest.raises(InputError, match="scores of another race"):
        RaceFolder(toys / "alone" / "race", Race(top=1, views=4)).turn()


QUIET = ["--trainer.enable_progress_bar", "false"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path / "toy.yaml")


def test_commands_one_after_the_other_give_the_table_of_attribute(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = ["--config", config, "--model.init_args.views.timesteps", "4", *QUIET]
    options = ["--race.top", "1", "--race.views", "2", "--race.share", "0.2"]
    run("attribute", *four, "--output", "run", *options)
    assert "nothing is promised" in (tmp_path / "run" / "report.html").read_text()
    table = read_scores("run")
    assert table.finished is not None
    assert table.finished.sum() == 5

    race_options = ["race", "--output", "steps", "--top", "1", "--share", "0.2"]
    writer = ["--trainer.callbacks+=ScoreWriter", "--trainer.callbacks.folder=steps/race/"]
    predict = ["predict", *four, "--ckpt_path", "run/deltas.ckpt"]
    run(*predict, "--model.init_args.views.every", "2", writer[0], writer[1] + "first")
    run(*race_options)
    said = capsys.readouterr().out
    assert re.search(r"Score 5 samples of steps/race/leaders.txt by all views", said)
    run(*predict, "--data.init_args.keys", "steps/race/leaders.txt", writer[0], writer[1] + "leaders")
    run(*race_options)
    found = read_scores("steps")
    assert (found.scores == table.scores).all()
    assert (found.finished == table.finished).all()
    assert found.run["fingerprints"] == table.run["fingerprints"]
    # The same folder without a race, or with another one.
    capsys.readouterr()
    for others in ([], ["--race.top", "2", *options[2:]]):
        assert main(["attribute", *four, "--output", "run", *others]) == 1
        assert "run holds scores of another run (other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--race.views", "2"], "too few to tell how a score scatters"),
        (["--race.views", "5"], "A race on 5 of 8 views"),
        (["--race.views", "8"], "A race on 8 of 8 views"),
        (["--race.views", "4", "--data.init_args.keys", "[sample-00001]"], "leave keys out"),
        (["--race.views", "4", "--keep_deviations", "true"], "keep_deviations"),
    ],
)
def test_race_that_can_not_be_run_is_one_sentence(
    options: list[str], part: str, config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["attribute", "--config", config, "--model.init_args.views.timesteps", "8", "--output", "none", *QUIET]
    assert main([*words, *options]) == 1
    said = capsys.readouterr().err
    assert part in said
    assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()
