"""Several queries as one target: its delta, its rise, its scores, and whatever order and processes they come in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import CHOSEN, ragged_fields, random_fisher, score, toy_data, trainer, unlearn
from lightning.pytorch.callbacks import ModelCheckpoint
from reference_attribution import Naive, mean_gradient, natural_step, toy_loss
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, done_shards, tiny_unet, told, toy_fields

from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import read_run, read_scores
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.module import UnlearningModule

DRAWS, DAMPING = 6, 0.1
ARTISTS = {0: "Marc", 1: "Klee", 2: "Marc", 3: "Marc", 4: "Klee"}
MEMBERS = {"Klee": ["query-00001", "query-00004"], "Marc": ["query-00000", "query-00002", "query-00003"]}
# `unlearning_fingerprint` of these queries without sets, whose settings hold nothing of sets.
BEFORE_SETS = "86960a51443c06cb810b63671682d79b"
ALPHA = Newton(alpha=0.7, N=50)


def queries(order: Any = range(5)) -> list[dict[str, Any]]:
    """Five queries of one to three captions; the artist stands in their json."""
    return [
        told(toy_fields(number, 1 + number % 3, prefix="query"), artist=ARTISTS[number], year=1900 + number)
        for number in order
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_shards(ragged_fields(range(6)), folder / "train", samples_per_shard=3)
    write_shards(queries(), folder / "queries", samples_per_shard=2)
    return folder


def module(name: str = "toy", strategy: Newton = ALPHA, **settings: Any) -> UnlearningModule:
    """A toy in float64, or a small U-Net in float32."""
    network: nn.Module = ToyDenoiser().double() if name == "toy" else tiny_unet()
    objective = ToyObjective() if name == "toy" else DenoisingObjective()
    chosen: Any = "all" if name == "toy" else CHOSEN
    fisher = random_fisher(network, chosen)
    defaults: dict[str, Any] = {"damping": DAMPING, "rise_draws": 5, "views": Views(2)}
    return UnlearningModule(network, objective, fisher, chosen, strategy, **{**defaults, **settings})


def unlearned(folder: Path, found: UnlearningModule, checkpoint: Path | None = None, **data: Any) -> dict[str, Tensor]:
    unlearn(found, toy_data(folder, **{"draws": DRAWS, "draw_batch_size": 4, **data}), checkpoint)
    assert found.deltas is not None
    return {name: delta.detach().clone() for name, delta in found.deltas.named().items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, delta in theirs.items():
        assert float(delta.norm()) > 0
        assert float((ours[name] - delta).norm()) <= tolerance * float(delta.norm()), name


# ---------------------------------------------------------------------------------- the delta of a set


@pytest.mark.parametrize(("name", "tolerance"), [("toy", 1e-13), ("U-Net", 1e-5)])
def test_delta_of_a_set_is_the_sum_of_its_members_deltas(name: str, tolerance: float, folder: Path) -> None:
    alone, together = module(name), module(name)
    each, sets = unlearned(folder, alone), unlearned(folder, together, targets_by="artist")
    assert together.targets == list(MEMBERS)
    rows = {key: row for row, key in enumerate(alone.targets)}
    for target, members in enumerate(MEMBERS.values()):
        summed = {key: delta[[rows[member] for member in members]].sum(0) for key, delta in each.items()}
        assert_close({key: delta[target] for key, delta in sets.items()}, summed, tolerance)


def by_hand(query: Sample, draw: int, timestep: int, noise: Tensor) -> Callable[[nn.Module], Tensor]:
    text = query.text[draw % len(query.text)].double()
    return lambda network: toy_loss(network, query.latent.double(), text, timestep, noise.double())


def test_delta_of_a_set_is_that_of_the_plain_loop_over_its_members(folder: Path) -> None:
    found = module()
    sets = unlearned(folder, found, targets_by="artist")
    fisher = random_fisher(ToyDenoiser().double(), "all")
    means = {key: total / fisher.count for key, total in fisher.sums.items()}
    naive = Naive(ToyDenoiser(), list(sets))
    nothing = {key: torch.zeros_like(value) for key, value in naive.base.items()}
    members = {query.key: query for query in map(decode_sample, queries())}
    for target, keys in enumerate(MEMBERS.values()):
        total = nothing
        for key in keys:
            query = members[key]
            timesteps, noises = draw_for_target("unlearning", 0, key, range(DRAWS), DRAWS, 10, LATENT)
            losses = [
                by_hand(query, draw, int(timestep), noise)
                for draw, (timestep, noise) in enumerate(zip(timesteps, noises, strict=True))
            ]
            gradient = mean_gradient(naive, nothing, losses)
            total = {name: value + gradient[name] for name, value in total.items()}
        expected = natural_step(total, means, DAMPING, 0.7 / 50)
        assert_close({key: delta[target] for key, delta in sets.items()}, expected, 1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_wanted_rise_is_that_of_the_sum_of_its_members_losses(steps: int, folder: Path) -> None:
    alone, together = module(), module(strategy=Newton(steps, target_increase=0.1))
    unlearned(folder, alone)
    unlearned(folder, together, targets_by="artist")
    for name, members in MEMBERS.items():
        before = sum(alone.results[key]["loss_before"] for key in members)
        result = together.results[name]
        assert result["loss_before"] == pytest.approx(before, rel=1e-12)
        assert result["loss_after"] == pytest.approx(1.1 * before, rel=1e-5)


def test_sets_of_one_are_the_queries_themselves(folder: Path) -> None:
    alone, together = module(), module()
    assert_close(unlearned(folder, together, targets_by="year"), unlearned(folder, alone), 1e-13)
    assert together.targets == ["1900", "1901", "1902", "1903", "1904"]


@pytest.mark.parametrize(("order", "samples_per_shard"), [([4, 3, 2, 1, 0], 5), ([2, 0, 4, 1, 3], 1)])
def test_order_and_cut_of_shards_change_no_bit(
    order: list[int], samples_per_shard: int, folder: Path, tmp_path: Path
) -> None:
    write_shards(queries(order), tmp_path / "queries", samples_per_shard=samples_per_shard)
    write_shards(ragged_fields(range(6)), tmp_path / "train")
    first, second = module(), module()
    ours, theirs = unlearned(folder, first, targets_by="artist"), unlearned(tmp_path, second, targets_by="artist")
    assert first.targets == second.targets
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert first.fingerprints() == second.fingerprints()
    chosen = [f"query-{number:05d}" for number in reversed(range(5))]
    third = module()
    again = unlearned(folder, third, targets_by="artist", query_keys=chosen)
    assert third.targets == first.targets
    assert all(torch.equal(ours[name], again[name]) for name in ours)


# ---------------------------------------------------------------------------------- what goes along


def fingerprint(folder: Path, **data: Any) -> str:
    made = toy_data(folder, draws=DRAWS, **data)
    made.setup("fit")
    return module().unlearning_fingerprint(made)


def test_fingerprints_tell_members_apart_and_know_nothing_of_sets_without(folder: Path, tmp_path: Path) -> None:
    # The same queries in the same order, of two sets; the third goes from one to the other, or one has another name.
    parts = {"first": "aabbb", "second": "aaabb", "third": "aaacc"}
    fields = [told(made, **{name: part[n] for name, part in parts.items()}) for n, made in enumerate(queries())]
    write_shards(fields, tmp_path / "queries")
    write_shards(ragged_fields(range(2)), tmp_path / "train")
    assert len({fingerprint(tmp_path, targets_by=name) for name in (None, *parts)}) == 4
    assert fingerprint(folder) == fingerprint(tmp_path) == BEFORE_SETS


def test_scores_and_record_are_those_of_sets(folder: Path, tmp_path: Path) -> None:
    found = module(views=Views(2, noise="per_sample"))
    unlearned(folder, found, tmp_path / "deltas.ckpt", targets_by="artist")
    score(found, toy_data(folder, targets_by="artist"), tmp_path / "run", None)
    table = read_scores(tmp_path / "run")
    assert table.queries == list(MEMBERS)
    targets = table.run["targets"]
    assert {name: about["members"] for name, about in targets.items()} == MEMBERS
    assert all("captions" not in about and about["rise"] > 0 for about in targets.values())
    assert table.run["unlearning"]["targets_by"] == "artist"
    assert [len(table.top(name, 3)) for name in table.queries] == [3, 3]

    # Whoever scores from the checkpoint need not form the sets again.
    later = module(views=found.views)
    score(later, toy_data(folder), tmp_path / "later", tmp_path / "deltas.ckpt")
    assert later.members == MEMBERS
    again = read_scores(tmp_path / "later")
    assert again.run["targets"] == targets
    assert np.array_equal(again.scores, table.scores)


def test_scoring_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    found = module()
    unlearned(folder, found, targets_by="artist")
    data = {"targets_by": "artist"}
    score(found, toy_data(folder, **data), tmp_path / "run", None)
    whole = read_scores(tmp_path / "run")
    next((tmp_path / "run" / "scores").iterdir()).unlink()
    assert score(found, toy_data(folder, **data), tmp_path / "run", None).scored == 3
    assert len(done_shards(tmp_path / "run")) == 2
    assert np.array_equal(read_scores(tmp_path / "run").scores, whole.scores)
    # Other members in the same folder are another run.
    other = module()
    unlearned(folder, other, query_keys=["query-00000", "query-00001"], **data)
    assert other.targets == found.targets
    with pytest.raises(InputError, match=r"scores of another run \(other unlearning, deltas\)"):
        score(other, toy_data(folder, **data), tmp_path / "run", None)


def test_unlearning_goes_on_from_a_checkpoint_of_the_same_sets_alone(folder: Path, tmp_path: Path) -> None:
    strategy = Newton(2, target_increase=0.1)
    whole = unlearned(folder, module(strategy=strategy), targets_by="artist")

    class Stops(Newton):
        def after_step(self, problem: Any, before: Any, step: int) -> None:
            super().after_step(problem, before, step)
            if step == 2:
                raise KeyboardInterrupt

    stopped = module(strategy=Stops(2, target_increase=0.1))
    data = toy_data(folder, draws=DRAWS, draw_batch_size=4, targets_by="artist")
    keeps = ModelCheckpoint(tmp_path, filename="step", every_n_epochs=1, save_on_train_epoch_end=True)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, keeps, enable_checkpointing=True).fit(stopped, data)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    # Other names, and the same names for other queries.
    for changed in ({"targets_by": "year"}, {}, {"targets_by": "artist", "query_keys": ["query-00000", "query-00001"]}):
        other = toy_data(folder, draws=DRAWS, draw_batch_size=4, **changed)
        with pytest.raises(InputError, match="other queries"):
            trainer(tmp_path).fit(module(strategy=strategy), other, ckpt_path=str(checkpoint), weights_only=True)
    resumed = module(strategy=strategy)
    data = toy_data(folder, draws=DRAWS, draw_batch_size=4, targets_by="artist")
    trainer(tmp_path).fit(resumed, data, ckpt_path=str(checkpoint), weights_only=True)
    assert resumed.deltas is not None
    assert resumed.members == MEMBERS
    assert all(torch.equal(whole[name], delta) for name, delta in resumed.deltas.named().items())


def test_queries_that_do_not_say_their_target_are_refused_before_any_work(folder: Path) -> None:
    for stage in ("fit", "predict"):
        with pytest.raises(InputError, match="'query-00000' has no 'painter' in its json"):
            toy_data(folder, targets_by="painter").setup(stage)
    with pytest.raises(InputError, match=r"'query-00000' has .* as 'captions', which can't name its target"):
        toy_data(folder, targets_by="captions").setup("fit")


def test_run_without_sets_is_recorded_as_before(folder: Path, tmp_path: Path) -> None:
    found = module()
    unlearned(folder, found)
    score(found, toy_data(folder), tmp_path / "run", None)
    about = read_run(tmp_path / "run")
    assert about is not None
    assert set(about["targets"]["query-00001"]) == {
        *("captions", "loss_before", "loss_after", "rise", "penalty", "length", "linear", "out_of_range")
    }
    assert "targets_by" not in json.dumps(about)
    assert "members" not in json.dumps(about)
