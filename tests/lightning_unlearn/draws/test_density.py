"""Views, unlearning draws, training and rivals draw timesteps as often as the objective says that training did."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attribution_runs import decoded, ragged_fields, random_fisher, trainer
from baseline_toys import subject
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.baselines.gradients import shared_gradients
from lightning_unlearn.baselines.trak import TRAK
from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.draws.views import Views, place_timesteps
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.measuring import Measuring
from lightning_unlearn.scores.run_record import read_run
from lightning_unlearn.strategies import Newton
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.unlearning.module import UnlearningModule

LENGTH = 40


def uneven(length: int = LENGTH) -> Tensor:
    """Probabilities of which some are 0, at both ends and in the middle."""
    shares = torch.rand(length, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    shares[[0, 1, length // 2, length - 1]] = 0
    return shares / shares.sum()


def slow_place(uniform: float, low: float, high: float, density: list[float]) -> int:
    """Walk up the timesteps until so much of what lies in the range is behind."""
    length = len(density)
    inside = [
        share * max(0.0, min(high * length, number + 1) - max(low * length, number))
        for number, share in enumerate(density)
    ]
    left = uniform * sum(inside)
    for number, share in enumerate(inside):
        if left < share:
            return number
        left -= share
    return max(number for number, share in enumerate(inside) if share > 0)


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.2, 0.7), (0.013, 0.94), (0.26, 0.27)])
def test_numbers_are_placed_by_the_inverse_of_the_distribution(span: tuple[float, float]) -> None:
    # Away from the ends of timesteps, where rounding decides.
    uniform = (torch.arange(997, dtype=torch.float64) + 0.31) / 997
    found = place_timesteps(uniform, span, LENGTH, uneven())
    expected = [slow_place(float(value), *span, uneven().tolist()) for value in uniform]
    assert found.dtype == torch.int64
    assert found.tolist() == expected


def test_timesteps_that_were_never_drawn_are_never_placed() -> None:
    density = uneven()
    ends = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    found = place_timesteps(torch.cat([ends, torch.linspace(0, 1, 5001, dtype=torch.float64)]), (0, 1), LENGTH, density)
    assert bool((density[found] > 0).all())
    assert set(found.tolist()) == set(torch.nonzero(density).flatten().tolist())


def test_strata_have_equal_probability() -> None:
    density, strata = uneven(), 8
    cumulative = torch.cat([torch.zeros(1).double(), density.cumsum(0)])
    for seed in range(20):
        timesteps = Views(strata, seed=seed).draw_timesteps(LENGTH, density)
        for stratum, timestep in enumerate(timesteps.tolist()):
            # Part of what the timestep holds lies in the stratum.
            assert cumulative[timestep] < (stratum + 1) / strata
            assert cumulative[timestep + 1] > stratum / strata
    many = torch.cat([Views(strata, seed=seed).draw_timesteps(LENGTH, density) for seed in range(4000)])
    seen = torch.bincount(many, minlength=LENGTH).double() / len(many)
    # Strata only make the spread smaller than that of free draws.
    assert bool(((seen - density).abs() <= 6 * (density * (1 - density) / len(many)).sqrt()).all())


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.25, 0.5)])
def test_without_a_density_nothing_has_changed(span: tuple[float, float]) -> None:
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = span
    before = ((low + uniform * (high - low)) * 1000).floor().long().clamp(0, 999)
    assert torch.equal(place_timesteps(uniform, span, 1000), before)
    # An even density says the same but for rounding at the ends of timesteps.
    even = place_timesteps(uniform, span, 1000, torch.full((1000,), 1e-3))
    assert int((even - before).abs().max()) <= 1
    assert int((even != before).sum()) <= 5


def test_unlearning_draws_are_strata_of_the_density() -> None:
    density = uneven()
    timesteps, noise = draw_for_target("unlearning", 0, "key", range(16), 16, LENGTH, (1, 2, 2), density)
    plain, same = draw_for_target("unlearning", 0, "key", range(16), 16, LENGTH, (1, 2, 2))
    assert torch.equal(noise, same)
    assert not torch.equal(timesteps, plain)
    assert timesteps.tolist() == sorted(timesteps.tolist())


@pytest.mark.parametrize(
    ("density", "words"),
    [
        (torch.ones(3), r"shape \(3,\) for 40"),
        (torch.zeros(LENGTH), "numbers from 0 on"),
        (torch.full((LENGTH,), torch.nan), "numbers from 0 on"),
        (-torch.ones(LENGTH), "numbers from 0 on"),
        (torch.full((LENGTH,), torch.inf), "numbers from 0 on"),
    ],
)
def test_what_is_no_density_is_refused(density: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        place_timesteps(torch.tensor([0.5]), (0.0, 1.0), LENGTH, density)


def test_range_in_which_training_drew_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"no timestep in the range \(0.0, 0.05\)"):
        place_timesteps(torch.tensor([0.5]), (0.0, 0.05), LENGTH, uneven())


# ---------------------------------------------------------------------- everyone asks the objective


class Peaked(ToyObjective):
    """Trained on timesteps 3 and 7 alone; notes which it is asked for."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def density(self) -> Tensor:
        """Most often 7."""
        shares = torch.zeros(self.num_timesteps, dtype=torch.float64)
        shares[3], shares[7] = 0.2, 0.8
        return shares

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each view: ``(B,)``."""
        self.seen |= set(timesteps.tolist())
        return super().__call__(network, batch, timesteps, noise)


def attribute(objective: Peaked, folder: Path) -> None:
    """Unlearn and score."""
    queries = toy_shards(folder / "queries", 2, prefix="query")
    data, network = AttributionDataModule(str(toy_shards(folder / "train")), str(queries)), ToyDenoiser()
    fisher, strategy = random_fisher(network, "all"), Newton(target_increase=0.1)
    module = UnlearningModule(network, objective, fisher, "all", strategy, Views(4), rise_draws=8)
    run = trainer(folder, ScoreWriter(str(folder / "run")))
    run.fit(module, data)
    run.predict(module, data)
    about = read_run(folder / "run")
    assert about is not None
    assert set(about["timesteps"]) == {3, 7}


def rival(objective: Peaked, folder: Path) -> None:
    """Score by TRAK."""
    samples = [decoded(fields) for fields in ragged_fields(range(4))]
    TRAK().scores(subject(samples, samples[:1], Views(4), objective=objective))


def measure(objective: Peaked, folder: Path) -> None:
    """Measure a retrained model."""
    Measuring([decoded(fields) for fields in ragged_fields(range(2))], draws=20)(ToyDenoiser(), objective)


def train(objective: Peaked, folder: Path) -> None:
    """Train plainly."""
    data = TrainingDataModule(str(toy_shards(folder / "train")), batch_size=4)
    trainer(folder, max_epochs=4).fit(DiffusionModule(ToyDenoiser(), objective), data)


def rivals(objective: Peaked, folder: Path) -> None:
    """Take gradients by two output functions at once."""
    samples = [decoded(fields) for fields in ragged_fields(range(4))]
    with shared_gradients(subject(samples, samples[:1], Views(4), objective=objective), ["loss", "square"]):
        pass


@pytest.mark.parametrize("use", [attribute, rival, rivals, measure, train])
def test_everyone_draws_as_training_did(tmp_path: Path, use: Callable[[Peaked, Path], None]) -> None:
    objective = Peaked()
    use(objective, tmp_path)
    assert objective.seen == {3, 7}


# Where the objective's density is among the arguments, counted without `self`.
PLACES = {"of": 2, "draw_timesteps": 1, "draw_for_target": 7}


def calls_without_density(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        drawing = last in PLACES and (last != "of" or name.endswith("views.of"))
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        given = len(node.args) > PLACES.get(last, 0) or any(word.arg in {"density", None} for word in node.keywords)
        if drawing and not given and not starred:
            found.append(f"{path.name}:{node.lineno} {name}")
    return found


def test_nobody_forgets_the_density() -> None:
    """An argument that may be left out is; whoever leaves it out draws uniformly without a word."""
    root = Path(__file__).parents[3]
    folders = ("lightning_unlearn", "callbacks", "datamodules", "benchmarks", "scripts")
    paths = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert len(paths) > 100
    assert not [call for path in paths for call in calls_without_density(path)]
