"""Training models again: the same from the seed alone, without the removed samples, whole or not at all."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_toys import KEYS, QUERIES, Builder, Own, Plain, files, finish, queries
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Measuring, Retrainer, Run, Study, Training, fit_run
from lightning_unlearn.evaluation.retraining import Share
from lightning_unlearn.evaluation.runs import seed_runs, without

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|treespec).*")

RUN = without(KEYS[3:6], 1)
OTHERS = [Run((), 1), without(KEYS[3:6], 2), without(KEYS[:2], 1)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_shards(tmp_path_factory.mktemp("retraining"), 12, 4)


def retrainer(build: Any, folder: Path, **settings: Any) -> Retrainer:
    """A retrainer of :class:`Own`, or with other settings; weights are kept."""
    defaults = {"target": "parts.denoiser", "objective": ToyObjective(), "weights": folder / "weights"}
    return Retrainer(build, Measuring(queries(), draws=10), Study(folder / "study", {}), **{**defaults, **settings})


def kept(retrainer: Retrainer, run: Run) -> dict[str, Tensor]:
    """The weights of a finished model."""
    return load_file(retrainer.weights / f"{run.name}.safetensors")  # type: ignore[operator]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


class Late(Plain):
    """Makes its parts when the Trainer asks for them."""

    def __init__(self) -> None:
        super().__init__()
        del self.parts

    def configure_model(self) -> None:
        if not hasattr(self, "parts"):
            self.parts = nn.ModuleDict({"denoiser": ToyDenoiser(int(torch.randint(1000, ())))})


class Stopped(Own):
    """Somebody stops it, or it fails, in the second step."""

    error: type[BaseException] = KeyboardInterrupt

    def training_step(self, batch: SampleBatch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise self.error


class Failed(Stopped):
    error = ArithmeticError


class Steps(Callback):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})


# ---------------------------------------------------------------------------------- the law of seeds


def test_a_model_is_the_same_from_its_seed_alone_whatever_was_trained_before(shards: Path, tmp_path: Path) -> None:
    alone, among = (retrainer(Builder(shards), tmp_path / name) for name in ("alone", "among"))
    alone.train([RUN])
    torch.rand(7)
    assert among.train([*OTHERS, RUN]) == 4
    assert same(kept(alone, RUN), kept(among, RUN))
    assert alone.study.read(RUN).outcomes == among.study.read(RUN).outcomes
    # Another seed, or other samples, make another model.
    assert [run for run in OTHERS if same(kept(among, run), kept(among, RUN))] == []
    assert [run for run in OTHERS if among.study.read(run).outcomes == among.study.read(RUN).outcomes] == []


def test_a_loss_that_knows_nothing_of_regions_is_refused_before_training(shards: Path, tmp_path: Path) -> None:
    asked = [*queries(2), replace(queries(3)[2], mask=torch.ones(LATENT[1:]))]
    made = retrainer(Builder(shards), tmp_path)
    made.measure = Measuring(asked, draws=10)
    with pytest.raises(InputError, match=f"{asked[2].key!r} has a mask, of which ToyObjective knows nothing"):
        made._checked(RUN)


# ---------------------------------------------------------------------------------- which samples


@pytest.mark.parametrize("run", [Run(), RUN, without(KEYS[1:], 3)], ids=["all", "some", "one left"])
def test_removed_samples_are_never_seen_and_all_others_are(run: Run, shards: Path) -> None:
    module = fit_run(Builder(shards, max_steps=-1, max_epochs=2), run)
    assert isinstance(module, Own)
    assert len(module.seen) == 48
    assert set(module.seen) == set(KEYS) - set(run.removed)


# ---------------------------------------------------------------------------------- anybody's module


def test_any_module_is_measured_by_its_own_objective_or_a_given_one(shards: Path, tmp_path: Path) -> None:
    builder = Builder(shards, Plain)
    plain = retrainer(builder, tmp_path / "plain", objective=None)
    plain.train([RUN])
    (module,) = builder.made
    assert isinstance(module, Plain)
    expected = Measuring(queries(), draws=10)(module.parts["denoiser"], ToyObjective())
    assert plain.study.read(RUN).outcomes == expected
    assert list(expected) == QUERIES
    given = retrainer(Builder(shards, Own), tmp_path / "given")
    given.train([RUN])
    assert given.study.read(RUN).outcomes == expected
    assert same(kept(plain, RUN), module.parts["denoiser"].state_dict())


def test_a_module_may_make_its_parts_when_the_trainer_asks(shards: Path, tmp_path: Path) -> None:
    late = retrainer(Builder(shards, Late), tmp_path, objective=None)
    late.train([RUN])
    assert late.study.is_finished(RUN)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": None}, "Own has no attribute `objective`"),
        ({"target": "unet"}, "Own has no 'unet'; set the target to one of its parts: parts."),
    ],
)
def test_what_cannot_be_measured_is_not_trained(wrong: dict[str, Any], said: str, shards: Path, tmp_path: Path) -> None:
    builder = Builder(shards)
    with pytest.raises(InputError, match=r"\.$") as error:
        retrainer(builder, tmp_path, **wrong).train([RUN])
    assert said in str(error.value)
    (module,) = builder.made
    assert isinstance(module, Own)
    assert module.seen == []


def test_averaged_weights_are_those_that_are_measured(shards: Path, tmp_path: Path) -> None:
    steps = Steps()
    # The average takes each step's weights before the other callback sees them.
    callbacks = [EMAWeightAveraging(decay=0.75), steps]
    averaging = retrainer(Builder(shards, max_steps=4, callbacks=callbacks), tmp_path)
    averaging.train([RUN])
    expected = {name: value.double() for name, value in steps.weights[0].items()}
    for weights in steps.weights[1:]:
        expected = {name: 0.75 * value + 0.25 * weights[name].double() for name, value in expected.items()}
    found = kept(averaging, RUN)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[f"parts.denoiser.{name}"], rtol=1e-5, atol=1e-7)
    last = {name.removeprefix("parts.denoiser."): value for name, value in steps.weights[-1].items()}
    assert len(steps.weights) == 4
    assert not any(torch.allclose(value, last[name], rtol=1e-4) for name, value in found.items())
    network = ToyDenoiser()
    network.load_state_dict(found)
    assert averaging.study.read(RUN).outcomes == Measuring(queries(), draws=10)(network, ToyObjective())


# ---------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("module", [Stopped, Failed])
def test_a_training_that_does_not_end_leaves_no_file(module: type[Stopped], shards: Path, tmp_path: Path) -> None:
    first = retrainer(Builder(shards), tmp_path)
    first.train([OTHERS[0]])
    before = files(tmp_path / "study")
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit) if module is Stopped else ArithmeticError):  # type: ignore[arg-type]
            retrainer(Builder(shards, module), tmp_path).train([OTHERS[0], RUN])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert files(tmp_path / "study") == before
    assert len(list((tmp_path / "study" / "models").iterdir())) == len(list((tmp_path / "weights").iterdir())) == 1
    assert first.study.missing([OTHERS[0], RUN]) == [RUN]


def test_finished_models_are_left_as_they_are(shards: Path, tmp_path: Path) -> None:
    runs = [RUN, OTHERS[0], RUN]
    builder = Builder(shards)
    assert retrainer(builder, tmp_path).train(runs) == 2
    before = files(tmp_path / "study")
    assert retrainer(builder, tmp_path).train(runs) == 0
    assert files(tmp_path / "study") == before
    assert len(builder.made) == 2


def test_a_model_that_another_process_finished_meanwhile_is_not_trained_again(shards: Path, tmp_path: Path) -> None:
    builder = Builder(shards)

    def build(run: Run) -> Training:
        finish(found.study, OTHERS[0], [1.0, 2.0, 3.0])  # while RUN is trained
        return builder(run)

    found = retrainer(build, tmp_path)
    assert found.train([RUN, OTHERS[0]]) == 1
    assert found.study.read(OTHERS[0]).outcomes[QUERIES[0]].loss == 1.0


def test_several_processes_a_model_are_refused(shards: Path, tmp_path: Path) -> None:
    builder = Builder(shards, devices=2, strategy="ddp")
    with pytest.raises(InputError, match=r"retrained by one process; set devices to 1 .* by index\.$"):
        retrainer(builder, tmp_path).train([RUN])
    assert files(tmp_path / "study") == {}
    (module,) = builder.made
    assert isinstance(module, Own)
    assert module.seen == []


# ---------------------------------------------------------------------------------- several processes


@given(st.lists(st.integers(0, 20)), st.integers(1, 7))
def test_shares_are_a_partition_and_nearly_equal(seeds: list[int], count: int) -> None:
    runs = [Run((), seed) for seed in seeds]
    shares = [Share(index, count).of(runs) for index in range(count)]
    dealt = [run for share in shares for run in share]
    assert sorted(run.seed for run in dealt) == sorted(set(seeds))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_that_starts_later_takes_the_same_share(shards: Path, tmp_path: Path) -> None:
    runs = seed_runs(5)
    study = Study(tmp_path / "study", {})
    for run in (runs[0], runs[2], runs[3]):
        finish(study, run, [1.0, 2.0, 3.0])
    # Dealt anew, the two that are left would go to one process each.
    assert retrainer(Builder(shards), tmp_path).train(runs, Share(0, 2)) == 1
    assert study.missing(runs) == [runs[1]]
    assert retrainer(Builder(shards), tmp_path).train(runs, Share(0, 2)) == 0


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(index: int, count: int) -> None:
    with pytest.raises(InputError, match=r"is none; .*\.$"):
        Share(index, count)
