"""A deviation depends on the weights, the target, the sample and the seed, and on nothing else.

All scores here come from one saved delta that doubles each loss, in float32, of a UNet that learned a little of its
data.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import (
    SAMPLES_PER_SHARD,
    SCORED,
    ragged_fields,
    score,
    toy_data,
    toy_deltas,
    toy_model,
    toy_module,
)
from lightning.pytorch import Callback
from processes import Script
from toys import done_shards

from lightning_unlearn.data.shards import MANIFEST, write_shards
from lightning_unlearn.draws.views import Views
from lightning_unlearn.scores.files import read_scores, shard_path
from lightning_unlearn.scores.table import ScoreTable

SCRIPT = Path(__file__).parents[1] / "helpers" / "attribution_runs.py"
# Of the standard deviation over samples.
TOLERANCE = 1e-4
VIEWS = Views(2, noise="per_sample", flips=True)


def scored(out: Path, *callbacks: Callback, shards: str = "train", views: Views = VIEWS, **data: Any) -> ScoreTable:
    folder = toy_model()
    score(toy_module(folder, views=views), toy_data(folder, shards, **data), out, toy_deltas(), *callbacks)
    return read_scores(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> ScoreTable:
    return scored(tmp_path_factory.mktemp("expected") / "out", batch_size=4)


def assert_same(found: ScoreTable, expected: ScoreTable) -> None:
    assert found.keys == expected.keys
    assert found.queries == expected.queries
    spread = expected.scores.std(0)
    assert (abs(found.scores - expected.scores).max(0) <= TOLERANCE * spread).all()
    assert (abs(found.base_losses - expected.base_losses) <= 1e-5).all()


def test_scores_have_something_to_agree_on(expected: ScoreTable) -> None:
    assert expected.scores.shape == (SCORED, 2)
    assert (expected.scores.std(0) > 1e-3).all()
    rises = [target["rise"] for target in expected.run["targets"].values()]
    assert rises == pytest.approx([0.5, 0.5], rel=1e-4)
    # Unlearning two pictures is not the same: otherwise any mix-up of them would pass here.
    assert abs(np.corrcoef(expected.scores.T)[0, 1]) < 0.95


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores_do_not_depend_on_the_batch_size(expected: ScoreTable, tmp_path: Path, batch_size: int) -> None:
    assert_same(scored(tmp_path / "out", batch_size=batch_size), expected)


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_scores_do_not_depend_on_workers(expected: ScoreTable, tmp_path: Path, start: str) -> None:
    assert_same(scored(tmp_path / "out", batch_size=4, num_workers=2, multiprocessing_context=start), expected)


def test_scores_do_not_depend_on_the_order_of_shards(expected: ScoreTable, tmp_path: Path) -> None:
    folder = toy_model()
    names = sorted(path.name for path in (folder / "train").glob("*.tar"))
    for new, old in zip(names, reversed(names), strict=True):
        (folder / "reversed").mkdir(exist_ok=True)
        shutil.copy(folder / "train" / old, folder / "reversed" / new)
    found = scored(tmp_path / "out", shards="reversed")
    assert_same(found, expected)
    assert dict(zip(found.keys, found.shards, strict=True))["sample-00000"].startswith(names[-1].removesuffix(".tar"))


@pytest.mark.parametrize("samples_per_shard", [1, 7, 99])
def test_scores_do_not_depend_on_how_shards_are_cut(
    expected: ScoreTable, tmp_path: Path, samples_per_shard: int
) -> None:
    folder = toy_model()
    order = torch.randperm(SCORED, generator=torch.Generator().manual_seed(3)).tolist()
    cut = folder / f"cut-{samples_per_shard}"
    write_shards(ragged_fields(order), cut, samples_per_shard=samples_per_shard)
    (cut / MANIFEST).unlink()
    assert_same(scored(tmp_path / "out", shards=cut.name, batch_size=5), expected)


def test_scores_do_not_depend_on_the_global_random_state(expected: ScoreTable, tmp_path: Path) -> None:
    torch.manual_seed(123)
    np.random.seed(5)
    assert (scored(tmp_path / "out", batch_size=4).scores == expected.scores).all()


def test_a_samples_score_does_not_depend_on_the_other_samples(expected: ScoreTable, tmp_path: Path) -> None:
    folder = toy_model()
    write_shards(ragged_fields([2, 11, 13]), folder / "few")
    found = scored(tmp_path / "out", shards="few")
    rows = [expected.keys.index(key) for key in found.keys]
    assert found.keys == ["sample-00002", "sample-00011", "sample-00013"]
    assert (abs(found.scores - expected.scores[rows]).max(0) <= TOLERANCE * expected.scores.std(0)).all()


def test_scores_do_depend_on_the_seed_and_the_kind_of_noise(expected: ScoreTable, tmp_path: Path) -> None:
    write_shards(ragged_fields([0, 1]), toy_model() / "two")
    seeded = scored(tmp_path / "seeded", shards="two", views=Views(2, noise="per_sample", flips=True, seed=1))
    shared = scored(tmp_path / "shared", shards="two", views=Views(2, noise="shared", flips=True))
    for other in (seeded, shared):
        assert other.keys == expected.keys[:2]
        assert (abs(other.scores - expected.scores[:2]).max(0) > 0.01 * expected.scores.std(0)).all()


def test_shared_noise_gives_two_copies_of_a_picture_one_score_and_noise_of_their_own_does_not(tmp_path: Path) -> None:
    folder = toy_model()
    (fields,) = ragged_fields([4])
    write_shards([fields, {**fields, "__key__": "copy"}], folder / "copies")
    shared = scored(tmp_path / "shared", shards="copies", views=Views(4, noise="shared")).scores
    own = scored(tmp_path / "own", shards="copies", views=Views(4, noise="per_sample")).scores
    np.testing.assert_allclose(shared[0], shared[1], rtol=1e-4)
    assert (abs(own[0] - own[1]) > 1e-3 * abs(own[0])).all()


class StopError(RuntimeError):
    pass


class StopAfter(Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.batches:
            raise StopError


@pytest.mark.parametrize("batches", [0, 1, 5])
def test_run_that_is_stopped_and_started_again_gives_the_same_scores(
    expected: ScoreTable, tmp_path: Path, batches: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        scored(out, StopAfter(batches), batch_size=3)
    done = done_shards(out)
    assert len(done) == batches // 2  # a shard of five samples takes two batches of three
    times = {shard: shard_path(out, shard).stat().st_mtime_ns for shard in done}
    assert_same(scored(out, batch_size=4), expected)
    assert times == {shard: shard_path(out, shard).stat().st_mtime_ns for shard in done}


def test_run_that_is_killed_and_started_again_gives_the_same_scores(expected: ScoreTable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    job = {"kind": "predict", "folder": str(toy_model()), "out": str(out), "deltas": str(toy_deltas()), "stall": 2}
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": [job], "trainer": {}}))
    with Script(str(SCRIPT), tmp_path / "jobs.json") as script:
        while not (out / "stalled").exists():
            assert script.status is None, script.said()
            time.sleep(0.1)
        assert script.kill() == -signal.SIGKILL
    done = done_shards(out)
    assert len(done) == 2
    times = {shard: shard_path(out, shard).stat().st_mtime_ns for shard in done}
    writer = score(toy_module(toy_model()), toy_data(toy_model()), out, toy_deltas())
    assert writer.scored == SCORED - 2 * SAMPLES_PER_SHARD
    assert_same(read_scores(out), expected)
    assert times == {shard: shard_path(out, shard).stat().st_mtime_ns for shard in done}
