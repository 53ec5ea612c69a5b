"""The strategy ``mirrored``: steps up the query's clipped loss and down that of real samples."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import random_fisher, run_jobs, toy_data, trainer
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_ranks
from reference_attribution import Naive, mirrored_gradient, toy_loss
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, tiny_unet, toy_fields, toy_shards

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.strategies import STRATEGIES, Mirrored, Newton, Strategy
from lightning_unlearn.unlearning.fixed_draws import newly_initialised
from lightning_unlearn.unlearning.guards import check_needs
from lightning_unlearn.unlearning.module import UnlearningModule

SCRIPT = Path(__file__).parents[2] / "helpers" / "attribution_runs.py"
LAYERS = ["text", "conv_out"]
# Neither three captions nor batches of four divide them, and there are more real draws than samples.
DRAWS, REAL, RISE = 5, 11, 3
# Above some of the draws' losses and below others.
NULL = 1.2
SGD = functools.partial(torch.optim.SGD, lr=0.1)

Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirrored")
    toy_shards(folder / "train", 7, 3, captions=2)
    toy_shards(folder / "queries", 2, 2, captions=3, prefix="query")
    return folder


def fit(
    folder: Path,
    strategy: Strategy,
    *callbacks: Callback,
    network: nn.Module | None = None,
    fisher: Any = None,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    **data: Any,
) -> UnlearningModule:
    """Unlearn in float64, without a Fisher if none is given."""
    network = (network or ToyDenoiser()).double()
    module = UnlearningModule(network, ToyObjective(), fisher, LAYERS, strategy, rise_draws=RISE)
    run = trainer(folder, *callbacks, **(settings or {}))
    found = toy_data(folder, **{"draws": DRAWS, "draw_batch_size": 4, **data})
    run.fit(module, found, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return module


def mirrored(steps: int = 2, **settings: Any) -> Mirrored:
    """With a rise that no step reaches."""
    defaults = {"optimizer": SGD, "real_draws": REAL, "null_loss": NULL, "target_increase": 100.0}
    return Mirrored(steps, **{**defaults, **settings})


def deltas(module: UnlearningModule) -> dict[str, Tensor]:
    assert module.deltas is not None
    return {name: delta.detach().clone() for name, delta in module.deltas.named().items()}


def loss_of(latent: Tensor, text: Tensor, timestep: Tensor, noise: Tensor) -> Loss:
    arguments = (latent.double(), text.double(), int(timestep), noise.double())
    return lambda network: toy_loss(network, *arguments)


def query_losses(query: Sample, stream: Any, first: int, total: int) -> list[Loss]:
    numbers = range(first, first + total)
    drawn = draw_for_target(stream, 0, query.key, numbers, total, 10, LATENT)
    return [loss_of(query.latent, query.text[n % 3], t, noise) for n, t, noise in zip(numbers, *drawn, strict=True)]


def real_losses(samples: list[Sample], stream: Any, first: int) -> list[Loss]:
    numbers = range(first, first + len(samples))
    drawn = draw_for_target(stream, 0, "", numbers, len(samples), 10, LATENT)
    return [
        loss_of(sample.latent, sample.text[seed_of(stream, "caption", 0, n) % 2], t, noise)
        for sample, n, t, noise in zip(samples, numbers, *drawn, strict=True)
    ]


def samples_of(folder: Path, stream: Any, first: int, count: int, **settings: Any) -> list[Sample]:
    data = toy_data(folder, **settings)
    data.setup("fit")
    return data.real_samples(stream, 0).take(first, count)


def queries_of(module: UnlearningModule) -> list[Sample]:
    return list(module.trainer.datamodule.queries)  # type: ignore[attr-defined]


def mean(losses: list[Loss], naive: Naive, delta: Mapping[str, Tensor] | None) -> float:
    return math.fsum(naive.value(delta, loss) for loss in losses) / len(losses)


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == torch.float64
        assert float((ours[name] - value).norm()) <= tolerance * float(value.norm())


def assert_moved(delta: Mapping[str, Tensor]) -> None:
    assert {name for name, value in delta.items() if value.any()} == {f"{layer}.weight" for layer in LAYERS}


# ---------------------------------------------------------------------------------- the objective


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_steps_are_those_of_the_objective_written_out(folder: Path) -> None:
    strength = 0.7
    module = fit(folder, mirrored(2, strength=strength))
    naive = Naive(ToyDenoiser(), list(deltas(module)))
    clipped = 0
    for target, query in enumerate(queries_of(module)):
        delta = {name: torch.zeros_like(value) for name, value in naive.base.items()}
        for step in range(2):
            own = query_losses(query, "unlearning", step * DRAWS, DRAWS)
            real = real_losses(samples_of(folder, "real", step * REAL, REAL), "real", step * REAL)
            clipped += sum(naive.value(delta, loss) > NULL for loss in own)
            gradient = mirrored_gradient(naive, delta, real, own, strength, NULL)
            delta = {
                name: value - 0.1 * gradient[name] if name.endswith(".weight") else value
                for name, value in delta.items()
            }
        ours = {name: stack[target] for name, stack in deltas(module).items()}
        assert_close(ours, delta)
        assert_moved(ours)
    assert 0 < clipped < 4 * DRAWS


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_a_query_all_of_whose_draws_are_beyond_the_untrained_loss_is_pushed_no_further(folder: Path) -> None:
    module = fit(folder, mirrored(1, null_loss=1e-6))
    naive = Naive(ToyDenoiser(), list(deltas(module)))
    start = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    gradient = mirrored_gradient(naive, start, real_losses(samples_of(folder, "real", 0, REAL), "real", 0), [], 0.2, 0)
    for target in range(2):  # the same real draws for both
        for name in ("text.weight", "conv_out.weight"):
            assert_close({name: deltas(module)[name][target]}, {name: -0.1 * gradient[name]})


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_a_delta_depends_neither_on_other_targets_nor_on_how_draws_are_cut(folder: Path) -> None:
    strategy = functools.partial(mirrored, 3, optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    expected = deltas(fit(folder, strategy()))
    for target in range(2):
        alone = deltas(fit(folder, strategy(), query_keys=[f"query-0000{target}"]))
        assert_close({name: stack[0] for name, stack in alone.items()}, {n: s[target] for n, s in expected.items()})
    assert_close(deltas(fit(folder, strategy(), draw_batch_size=3)), expected, 1e-8)


def test_two_processes_find_the_deltas_of_one(folder: Path, tmp_path: Path) -> None:
    strategy = {"name": "mirrored", "steps": 20, "real_draws": REAL, "strength": 5.0, "null_loss": 3.0}
    strategy |= {"target_increase": 0.1, "optimizer": {"name": "SGD", "lr": 0.02}}
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        job = {"kind": "fit", "folder": str(folder), "out": str(tmp_path / name), "network": "partly used"}
        jobs.append({**job, "strategy": strategy, "data": {"draws": DRAWS}})
    run_jobs(jobs[:1], {})
    (tmp_path / "job.json").write_text(
        json.dumps({"jobs": jobs[1:], "trainer": {"strategy": "ddp", "devices": 2, "accelerator": "cpu"}})
    )
    run_ranks(str(SCRIPT), tmp_path / "job.json")
    theirs, ours = (
        torch.load(tmp_path / name / "deltas.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    )
    for name, delta in theirs.items():
        for target in range(2):
            assert float((ours[name][target] - delta[target]).norm()) <= 1e-5 * float(delta[target].norm())
    alone, *ranks = (
        json.loads((tmp_path / place).read_text())
        for place in ("one/rank-0.json", "two/rank-0.json", "two/rank-1.json")
    )
    assert ranks[0] == ranks[1]
    assert (alone["world_size"], ranks[0]["world_size"]) == (1, 2)
    assert 1 < alone["steps"] == ranks[0]["steps"] < 20
    for target, result in alone["results"].items():
        theirs = dict(ranks[0]["results"][target])
        assert result.pop("out_of_range") == theirs.pop("out_of_range")
        assert result == pytest.approx(theirs, rel=1e-4)


# ---------------------------------------------------------------------------------- real samples


def keys(samples: list[Sample]) -> list[str]:
    return [sample.key for sample in samples]


def test_real_samples_come_shuffled_over_and_over_in_an_order_of_their_own(folder: Path) -> None:
    found = keys(samples_of(folder, "real", 0, 21))
    turns = [found[start : start + 7] for start in range(0, 21, 7)]
    every = [f"sample-{number:05d}" for number in range(7)]
    assert all(sorted(turn) == every for turn in turns)
    assert len({tuple(turn) for turn in [*turns, every]}) == 4
    assert keys(samples_of(folder, "others", 0, 7)) not in turns
    # From any place on, forwards and back.
    data = toy_data(folder)
    data.setup("fit")
    stream = data.real_samples("real", 0)
    for first in (2, 9, 4, 0):
        assert keys(stream.take(first, 5)) == found[first : first + 5]
    assert keys(data.real_samples("real", 1).take(0, 21)) != found
    # In whatever order the shards are named.
    data.shards.reverse()
    assert keys(data.real_samples("real", 0).take(0, 21)) == found


def test_bad_real_samples_are_an_error_or_left_out(folder: Path, tmp_path: Path) -> None:
    fields = [toy_fields(number) for number in range(5)]
    fields[3] = {**fields[3], "latent.npy": b"no array"}
    write_shards(fields, tmp_path / "some", samples_per_shard=5)
    write_shards(fields[3:4], tmp_path / "none")
    toy_shards(tmp_path / "queries", 1, 1, prefix="query")
    with pytest.raises(InputError, match=r"latent\.npy is not a plain NumPy array"):
        samples_of(tmp_path, "real", 0, 10, shards="some")
    found = keys(samples_of(tmp_path, "real", 0, 8, shards="some", on_bad_sample="skip"))
    assert sorted(found) == sorted([f"sample-{number:05d}" for number in (0, 1, 2, 4)] * 2)
    with pytest.raises(InputError, match=r"hold no sample that can be used, .*; name shards"):
        samples_of(tmp_path, "real", 0, 1, shards="none", on_bad_sample="skip")


# ---------------------------------------------------------------------------------- what it reports


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_results_say_what_it_cost_in_the_loss_of_everything_else(folder: Path) -> None:
    module = fit(folder, mirrored())
    naive = Naive(ToyDenoiser(), list(deltas(module)))
    others = real_losses(samples_of(folder, "others", 0, RISE), "others", 0)
    for target, query in enumerate(queries_of(module)):
        delta = {name: stack[target] for name, stack in deltas(module).items()}
        own = query_losses(query, "rise", 0, RISE)
        result = module.results[query.key]
        expected = {
            "loss_before": mean(own, naive, None),
            "loss_after": mean(own, naive, delta),
            "others_before": mean(others, naive, None),
            "others_after": mean(others, naive, delta),
        }
        rise = expected["loss_after"] / expected["loss_before"] - 1
        wanted = {**expected, "rise": rise}
        assert {name: result[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
        assert result.keys() - wanted.keys() == {"length", "out_of_range"}
        assert module.trainer.logged_metrics[f"others_after/{query.key}"] == pytest.approx(expected["others_after"])
    assert module.fingerprints()["fisher"] == module.fisher_fingerprint() == "none"


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_with_a_fisher_the_penalty_is_reported_and_the_deltas_are_the_same(folder: Path) -> None:
    plain = fit(folder, mirrored())
    penalised = fit(folder, mirrored(), fisher=random_fisher(ToyDenoiser().double(), LAYERS))
    for name, delta in deltas(plain).items():
        assert torch.equal(delta, deltas(penalised)[name])
    for target, result in penalised.results.items():
        assert result.pop("penalty") > 0
        assert result == plain.results[target]


# ---------------------------------------------------------------------------------- the untrained network


class Configured(ToyDenoiser):
    """Can be made anew, as networks of diffusers can, and is then far worse."""

    config: Mapping[str, Any] = {"gain": 4.0}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Configured:
        made = cls(int(torch.randint(10**6, ())))
        made.conv_out.weight.data *= config["gain"]
        return made


class Watch(Callback):
    """Keeps the deltas after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(deltas(pl_module))


@pytest.mark.parametrize("null_loss", [None, 2.0])
def test_each_target_stops_by_itself_just_at_its_share_of_the_untrained_loss(
    null_loss: float | None, folder: Path
) -> None:
    share, watch = 0.9, Watch()
    strategy = Mirrored(60, optimizer=SGD, strength=2.0, real_draws=4, null_loss=null_loss, stop_share=share)
    module = fit(folder, strategy, watch, network=Configured())
    fresh = Naive(newly_initialised(Configured(), 0), list(deltas(module)))
    lasts = []
    for target, query in enumerate(queries_of(module)):
        null = null_loss or mean(query_losses(query, "rise", 0, RISE), fresh, None)
        assert module.results[query.key]["loss_after"] == pytest.approx(share * null, rel=2e-6)
        moved = [
            any(not torch.equal(after[name][target], before[name][target]) for name in after)
            for before, after in zip(watch.seen, watch.seen[1:], strict=False)
        ]
        lasts.append(sum(moved))
        assert moved == sorted(moved, reverse=True)
    assert lasts[0] != lasts[1]
    assert max(lasts) + 1 == module.trainer.global_step < 60


def test_an_untrained_unet_depends_on_the_seed_alone() -> None:
    trained = tiny_unet()
    before = torch.random.get_rng_state()
    first, again, other = (newly_initialised(trained, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.keys() == trained.state_dict().keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert any("ff.net" in name for name in changed)


def test_a_unet_is_unlearned_by_its_feed_forward_weights(folder: Path) -> None:
    # A network without training has about the loss of another one, unless that is told.
    strategy = Mirrored(1, real_draws=2, null_loss=50.0)
    module = UnlearningModule(tiny_unet(), DenoisingObjective(), None, "feed_forward", strategy, rise_draws=2)
    with pytest.warns(UserWarning, match=r"2 of 2 targets have not reached 0\.95 of the untrained network's loss in 1"):
        trainer(folder).fit(module, toy_data(folder, draws=2))
    moved = {name for name, delta in deltas(module).items() if delta.any()}
    assert moved
    assert all(".ff.net." in name and name.endswith(".weight") for name in moved)


def test_a_network_that_can_not_be_made_anew_gets_one_sentence(folder: Path) -> None:
    with pytest.raises(InputError, match=r"^ToyDenoiser has no config .*; give it to the strategy as null_loss\.$"):
        fit(folder, mirrored(null_loss=None))


def test_a_target_that_is_as_bad_as_untrained_already_gets_one_sentence(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"^The loss of 'query-00000' is .* before any step, \d+% of the untrained network's 1, so "
    ):
        fit(folder, mirrored(null_loss=1.0, target_increase=None))


# ---------------------------------------------------------------------------------- a wanted rise


def test_a_wanted_rise_is_met_and_what_has_not_risen_is_named_and_kept(folder: Path) -> None:
    strategy = functools.partial(mirrored, strength=5.0, null_loss=10.0, target_increase=0.2)
    module = fit(folder, strategy(60))
    assert [result["rise"] for result in module.results.values()] == pytest.approx([0.2, 0.2], rel=1.1e-6)
    steps = module.trainer.global_step
    assert 1 < steps < 60
    with pytest.warns(
        UserWarning, match=r"have not reached a rise of 0\.2 in 1 steps \('query-0000\d': 0\.\d+"
    ) as said:
        short = fit(folder, strategy(1))
    (text,) = [str(warning.message) for warning in said if "have not reached" in str(warning.message)]
    for target, result in short.results.items():
        assert f"{target!r}: {result['rise']:.3g}" in text
        assert 0 < result["rise"] < 0.2


@pytest.mark.filterwarnings("ignore:.*have not reached")
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    strategy = functools.partial(mirrored, 4, optimizer=functools.partial(torch.optim.Adam, lr=1e-3))
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(folder, strategy(), keeper, settings={"enable_checkpointing": True})
    again = fit(folder, strategy(), checkpoint=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(delta, deltas(again)[name]) for name, delta in deltas(whole).items())
    assert again.results == whole.results
    assert again.fingerprints() == whole.fingerprints()


# ---------------------------------------------------------------------------------- arguments


def test_a_datamodule_without_real_samples_gets_one_sentence(folder: Path) -> None:
    class Bare:
        queries: tuple[Sample, ...] = ()

    with pytest.raises(InputError, match=r"^Mirrored also trains on real samples, but Bare has no real_samples; use "):
        check_needs(mirrored(), None, Bare())
    with pytest.raises(InputError, match=r"^Newton measures its step by .* has no real_samples; .* a target_increase"):
        check_needs(Newton(), "fisher.safetensors", Bare())
    check_needs(Newton(target_increase=0.1), "fisher.safetensors", Bare())


def test_only_strategies_that_look_at_samples_know_of_the_shards(folder: Path, tmp_path: Path) -> None:
    toy_shards(tmp_path / "train", 3, 3)
    (tmp_path / "queries").symlink_to(folder / "queries")
    strategies = {"a rise": Newton(target_increase=1.0), "toward data": Newton(), "Mirrored": mirrored()}
    prints: dict[str, set[str]] = {name: set() for name in strategies}
    for place in (folder, tmp_path):
        data = toy_data(place, draws=DRAWS, draw_batch_size=DRAWS)
        data.setup("fit")
        assert len(data.train_dataloader()) == len(data.queries)
        for name, strategy in strategies.items():
            module = UnlearningModule(ToyDenoiser(), ToyObjective(), None, LAYERS, strategy)
            prints[name].add(module.unlearning_fingerprint(data))
    assert {name: len(found) for name, found in prints.items()} == {"a rise": 1, "toward data": 2, "Mirrored": 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "at least one step"),
        ({"real_draws": 0}, "one of real_draws"),
        ({"lr": 0.0}, "finite lr"),
        ({"strength": math.inf}, "finite lr, strength"),
        ({"null_loss": math.nan}, "null_loss"),
        ({"target_increase": -0.1}, "target_increase above 0"),
        ({"stop_share": 1.5}, r"within 0 and 1, not 1\.5"),
        ({"stop_share": 0.9, "target_increase": 0.1}, "give only one of them"),
        ({"lr": 0.1, "optimizer": SGD}, "give the optimizer its own"),
        ({"optimizer": torch.optim.AdamW}, "weight_decay of 0.01"),
        ({"optimizer": torch.optim.LBFGS}, "does not take a step"),
    ],
)
def test_arguments_that_make_no_sense_get_one_sentence(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Mirrored(**wrong)
    assert str(caught.value).endswith(".")


def test_settings_tell_strategies_apart_and_a_config_can_name_it() -> None:
    adam = functools.partial(torch.optim.Adam, lr=1e-5)
    different = [
        Mirrored(),
        Mirrored(50),
        Mirrored(lr=1e-4),
        Mirrored(optimizer=adam),
        Mirrored(strength=0.3),
        Mirrored(real_draws=32),
        Mirrored(null_loss=1.0),
        Mirrored(stop_share=0.9),
        Mirrored(target_increase=0.1),
    ]
    assert len({json.dumps(one.settings(), sort_keys=True) for one in different}) == len(different)
    assert Mirrored().settings() == Mirrored(100, 1e-5, None, 0.2, 64, None, 0.95).settings()
    assert all(json.loads(json.dumps(one.settings())) == one.settings() for one in different)
    assert {STRATEGIES[one.settings()["strategy"]] for one in different} == {Mirrored}
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    given = {"steps": 7, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.25}}}
    config = parser.parse_object({"strategy": {"class_path": "Mirrored", "init_args": given}})
    strategy = parser.instantiate_classes(config)["strategy"]
    assert strategy.settings() == Mirrored(7, optimizer=functools.partial(torch.optim.Adam, lr=0.25)).settings()
