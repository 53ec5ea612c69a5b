"""Unlearning and scoring in one process, in three, and in two on two nodes give the same; real processes over gloo.

Starting processes is slow, so each number of them runs all its jobs in one go and the tests look at what they left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import SAMPLES_PER_SHARD, SCORED, loud_fields, ragged_fields, run_jobs, toy_deltas, toy_model
from processes import run_ranks
from torch import Tensor
from toys import done_shards

from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.scores.files import FAILED, read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies.newton import LEAST_RISE

SCRIPT = Path(__file__).parents[1] / "helpers" / "attribution_runs.py"
SHARDS = -(-SCORED // SAMPLES_PER_SHARD)
# 31 draws in batches of 7: neither two nor three ranks, nor batches, divide them.
FITS: dict[str, dict[str, Any]] = {
    "alpha": {"strategy": {"alpha": 1.0, "N": 100}},
    "increase": {"strategy": {"target_increase": 0.1}},
    # On samples that the model knows so badly that it is their mean loss that says how far, not the least rise.
    "toward data": {"strategy": {"toward_data": 0.5}, "shards": "loud"},
    "steps": {"strategy": {"steps": 2, "target_increase": 0.1}},
    "few draws": {"strategy": {"alpha": 1.0, "N": 100}, "data": {"draws": 2}},
    # Sets of two and three queries, one of them with a region.
    "sets": {"strategy": {"target_increase": 0.1}, "data": {"queries": "grouped", "targets_by": "artist"}},
    "partly used": {"strategy": {"target_increase": 0.1}, "network": "partly used", "data": {"draws": 10}},
    "penalised": {"strategy": {"name": "penalised", "N": 1e6, "steps": 3}, "data": {"draws": 10}},
    "penalised, by momentum": {
        "strategy": {
            "name": "penalised",
            "N": 1e6,
            "steps": 3,
            "optimizer": {"name": "SGD", "lr": 7e-5, "momentum": 0.9},
        },
        "data": {"draws": 10},
    },
    # It stops after fewer steps, of which the last is shortened.
    "penalised, to a rise": {
        "strategy": {"name": "penalised", "N": 5, "steps": 9, "lr": 0.2, "target_increase": 0.1},
        "network": "partly used",
        "data": {"draws": 10},
        "takes": 3,
    },
}
PREDICTS: dict[str, dict[str, Any]] = {
    "scores": {"data": {"batch_size": 4}},
    "workers": {"data": {"batch_size": 4, "num_workers": 2, "multiprocessing_context": "fork"}},
    "one shard": {"shards": "one"},
    "failing": {"shards": "failing"},
}
RUNS: dict[str, dict[str, Any]] = {
    "3 processes": {"strategy": "ddp", "devices": 3},
    "2 nodes": {"strategy": "ddp", "devices": 1, "num_nodes": 2},
}


def jobs(out: Path) -> list[dict[str, Any]]:
    folder = toy_model()
    found = []
    for name, settings in {**FITS, **PREDICTS}.items():
        (out / name).mkdir(parents=True)
        job: dict[str, Any] = {"kind": "fit" if name in FITS else "predict", "folder": str(folder)}
        job |= {"out": str(out / name), "deltas": str(toy_deltas()), **settings}
        if name in FITS:
            job["data"] = {"draws": 31, **job.get("data", {})}
        found.append(job)
    return found


@pytest.fixture(scope="module")
def data() -> Path:
    folder = toy_model()
    write_shards(ragged_fields(range(3)), folder / "one")
    write_shards(loud_fields(10), folder / "loud", samples_per_shard=SAMPLES_PER_SHARD)
    shards = write_shards(ragged_fields(range(SCORED)), folder / "failing", samples_per_shard=SAMPLES_PER_SHARD)
    for shard in shards[1:3]:
        path = Path(shard.url)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


@pytest.fixture(scope="module", params=sorted(RUNS))
def spread(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, str]:
    """Where one run of all jobs left its files, its number of processes, and what it printed."""
    out = tmp_path_factory.mktemp("spread")
    settings = RUNS[request.param]
    (out / "jobs.json").write_text(json.dumps({"jobs": jobs(out), "trainer": settings}))
    nodes = settings.get("num_nodes", 1)
    said = run_ranks(str(SCRIPT), out / "jobs.json", processes=settings["devices"], nodes=nodes)
    return out, nodes * settings["devices"], said


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    run_jobs([job for job in jobs(out) if "failing" not in job["out"]], {})
    return out


def deltas(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(folder / "deltas.ckpt", weights_only=True)["state_dict"]
    return found


def ranks(folder: Path, world_size: int) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    assert {rank["world_size"] for rank in found} == {world_size}
    return found


@pytest.mark.parametrize("name", FITS)
def test_deltas_are_those_of_one_process(spread: tuple[Path, int, str], alone: Path, name: str) -> None:
    ours, theirs = deltas(spread[0] / name), deltas(alone / name)
    assert ours.keys() == theirs.keys()
    for target in range(2):
        distance = sum(float((ours[key][target] - theirs[key][target]).square().sum()) for key in ours) ** 0.5
        norm = sum(float(theirs[key][target].square().sum()) for key in ours) ** 0.5
        assert norm > 0
        assert distance <= 1e-5 * norm


@pytest.mark.parametrize("name", FITS)
def test_all_ranks_hold_the_same_deltas_after_the_same_steps(spread: tuple[Path, int, str], name: str) -> None:
    found = ranks(spread[0] / name, spread[1])
    assert len({rank["deltas"] for rank in found}) == 1
    assert {rank["steps"] for rank in found} == {FITS[name].get("takes", FITS[name]["strategy"].get("steps", 1))}
    assert all(rank["results"] == found[0]["results"] for rank in found)
    wanted = FITS[name]["strategy"].get("target_increase")
    for result in found[0]["results"].values():
        assert wanted is None or result["rise"] == pytest.approx(wanted, rel=1e-4)
        assert name != "toward data" or result["rise"] > 1.1 * LEAST_RISE


def assert_same(found: ScoreTable, expected: ScoreTable) -> None:
    assert found.keys == expected.keys
    assert found.queries == expected.queries
    assert (abs(found.scores - expected.scores).max(0) <= 1e-4 * expected.scores.std(0)).all()


@pytest.mark.parametrize("name", ["scores", "workers", "one shard"])
def test_scores_are_those_of_one_process_and_each_sample_is_scored_once(
    spread: tuple[Path, int, str], alone: Path, name: str
) -> None:
    out, world_size, _ = spread
    expected = read_scores(alone / name)
    assert_same(read_scores(out / name), expected)
    counts = [rank["scored"] for rank in ranks(out / name, world_size)]
    assert sum(counts) == len(expected.keys) == (3 if name == "one shard" else SCORED)
    if name == "one shard":
        assert sorted(counts) == [0] * (world_size - 1) + [3]  # the others have nothing to do, which is no error
    else:
        assert max(counts) > min(counts) > 0  # uneven, as shards of five, five and four on two or three ranks must be


def test_shards_that_fail_on_some_ranks_leave_the_others_work_whole(spread: tuple[Path, int, str]) -> None:
    out, world_size, said = spread
    found = ranks(out / "failing", world_size)
    failed = {shard for rank in found for shard in rank["failures"]}
    assert len(failed) == 2
    assert {path.stem for path in (out / "failing" / FAILED).iterdir()} == failed
    assert len(done_shards(out / "failing")) == SHARDS - 2
    assert sum(rank["scored"] for rank in found) == len(read_scores(out / "failing", partial=True).keys)
    assert "shards could not be scored, the others are kept." in said
    assert "can't be read past its sample" in said


def test_a_run_started_in_several_processes_is_the_one_that_one_process_would_go_on_with(
    spread: tuple[Path, int, str], alone: Path
) -> None:
    ours, theirs = read_scores(spread[0] / "scores").run, read_scores(alone / "scores").run
    assert ours["fingerprints"] == theirs["fingerprints"]
    assert ours["shards"] == theirs["shards"]
    assert (ours["world_size"], theirs["world_size"]) == (spread[1], 1)
