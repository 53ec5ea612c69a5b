"""The strategy ``penalised``: the minimum itself, where there is one."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import partly_used_module, random_fisher, toy_data, trainer, unlearn
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from reference import damped, joined
from reference_attribution import Naive, layer_means, mean_gradient, natural_step, toy_loss
from torch import Tensor, nn
from torch.func import functional_call
from toys import DIM, LATENT, TOKENS, ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.data.samples import Sample, ViewBatch
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import DiagonalFisher, EKFACFisher, Fisher
from lightning_unlearn.strategies import STRATEGIES, Newton, Penalised, Strategy
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.parameters import layer_specs, select_layers

# The last layer alone: the prediction is linear in its weights, so the squared error is quadratic.
LAYER = "conv_out"
# Three captions don't divide five draws, so other draws would be of other captions, too.
DRAWS, CAPTIONS = 5, 3
# So much that steps of the plain gradient converge fast.
DAMPING = 3.0

Loss = Callable[[nn.Module], Tensor]
# Exact on a quadratic with a condition below some 30.
SGD = functools.partial(torch.optim.SGD, momentum=0.5)


class LinearObjective(ToyObjective):
    """Linear in the weights of the last layer."""

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        loss: Tensor = 5 + (prediction * noise).flatten(1).mean(1)
        return loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("penalised")
    toy_shards(folder / "train", 2, 2)
    toy_shards(folder / "queries", 2, 2, captions=CAPTIONS, prefix="query")
    return folder


# ---------------------------------------------------------------------------------- Fishers, and their matrices


def diagonal() -> DiagonalFisher:
    return random_fisher(ToyDenoiser().double(), [LAYER])


def ekfac(parameters: Sequence[str] = (LAYER,)) -> EKFACFisher:
    """Of random pictures."""
    network = ToyDenoiser().double()
    layers = select_layers(network, list(parameters))
    generator = torch.Generator().manual_seed(3)
    shapes = ((20, *LATENT), (20, TOKENS, DIM), (20, *LATENT))
    latents, text, noise = (torch.randn(shape, generator=generator).double() for shape in shapes)
    fisher = EKFACFisher(layer_specs(layers))
    for _ in fisher.stages:
        if fisher.count:
            fisher.next_stage()
        with GradientCapture(layers) as capture:
            ToyObjective()(network, ViewBatch(latents, {"text": text}), torch.arange(20) % 10, noise).sum().backward()
        fisher.update(capture.take())
    return fisher


FISHERS: dict[str, Callable[[], Fisher]] = {"diagonal": diagonal, "ekfac": ekfac}


def matrix(fisher: Fisher, damping: float = DAMPING) -> Tensor:
    """The damped Fisher of the last layer as a matrix over ``(o, i + 1)``, row by row."""
    tensors = fisher.tensors()
    if isinstance(fisher, DiagonalFisher):
        means = joined(tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.bias"]) / fisher.count
        return damped(torch.diag(means), damping)
    basis = torch.kron(tensors[f"bases/{LAYER}/outputs"], tensors[f"bases/{LAYER}/inputs"])
    return damped(basis @ torch.diag(tensors[f"eigenvalues/{LAYER}"].flatten() / fisher.count) @ basis.T, damping)


# ---------------------------------------------------------------------------------- losses by hand


def losses(query: Sample) -> list[Loss]:
    """A query's loss for each of its draws, which take its captions in turn."""
    timesteps, noises = draw_for_target("unlearning", 0, query.key, range(DRAWS), DRAWS, 10, query.latent.shape)

    def loss(draw: int) -> Loss:
        text = query.text[draw % CAPTIONS].double()
        arguments = (query.latent.double(), text, int(timesteps[draw]), noises[draw].double())
        return lambda network: toy_loss(network, *arguments)

    return [loss(draw) for draw in range(DRAWS)]


def derivatives(query: Sample) -> tuple[Tensor, Tensor]:
    """Gradient and curvature of a query's mean loss in the last layer, over ``(o, i + 1)`` row by row."""
    network = ToyDenoiser().double().requires_grad_(False)
    layer = network.get_submodule(LAYER)
    shape = layer.weight.shape

    def mean_loss(flat: Tensor) -> Tensor:
        rows = flat.reshape(shape[0], -1)
        weights = {f"{LAYER}.weight": rows[:, :-1].reshape(shape), f"{LAYER}.bias": rows[:, -1]}
        under: Any = lambda *arguments: functional_call(network, weights, arguments)  # noqa: E731
        return torch.stack([loss(under) for loss in losses(query)]).mean()

    at = joined(layer.weight, layer.bias)
    gradient = torch.autograd.functional.jacobian(mean_loss, at)
    return gradient, torch.autograd.functional.hessian(mean_loss, at)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def curved(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Gradient and curvature of each query."""
    data = toy_data(folder)
    data.setup("fit")
    return [derivatives(query) for query in data.queries]


def steepest(fisher: Tensor, curvature: Tensor) -> float:
    """The N from which on the penalty exceeds a curvature."""
    return float(torch.linalg.eigvals(torch.linalg.solve(fisher, curvature)).real.max())


# ---------------------------------------------------------------------------------- runs


def fit(
    folder: Path,
    strategy: Strategy,
    fisher: Fisher,
    *callbacks: Callback,
    objective: Objective | None = None,
    parameters: list[str] | None = None,
    checkpoint: Path | None = None,
    settings: dict[str, Any] | None = None,
    **data: Any,
) -> UnlearningModule:
    network = ToyDenoiser().double()
    module = UnlearningModule(
        network, objective or ToyObjective(), fisher, parameters or [LAYER], strategy, damping=DAMPING, rise_draws=3
    )
    run = trainer(folder, *callbacks, **(settings or {}))
    draws = {"draws": DRAWS, "draw_batch_size": 4, **data}
    run.fit(module, toy_data(folder, **draws), ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return module


def found(module: UnlearningModule) -> dict[str, Tensor]:
    assert module.deltas is not None
    return {name: delta.detach().clone() for name, delta in module.deltas.named().items()}


def row(module: UnlearningModule, target: int) -> Tensor:
    """A target's delta of the last layer over ``(o, i + 1)``."""
    deltas = found(module)
    return joined(deltas[f"{LAYER}.weight"][target], deltas[f"{LAYER}.bias"][target])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    assert ours.dtype == torch.float64
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def descent(name: str, fisher: Tensor, N: float) -> dict[str, Any]:
    """Steps to convergence: ``steps``, ``optimizer``."""
    if name == "default":
        return {"steps": 25}
    # No eigenvalue of the objective's curvature is above N times the largest of the Fisher.
    longest = 1 / (N * float(torch.linalg.eigvalsh(fisher).max()))
    return {"steps": 80, "optimizer": functools.partial(SGD, lr=longest)}


OPTIMIZERS = ("default", "SGD")


# ---------------------------------------------------------------------------------- the minimum


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", FISHERS)
def test_on_a_linear_loss_the_minimum_is_newtons_delta(kind: str, optimizer: str, folder: Path) -> None:
    fisher, N = FISHERS[kind](), 40.0
    expected = found(fit(folder, Newton(alpha=1.0, N=40), fisher, objective=LinearObjective()))
    strategy = Penalised(N, **descent(optimizer, matrix(fisher), N))
    ours = found(fit(folder, strategy, fisher, objective=LinearObjective()))
    for name, delta in expected.items():
        for target in range(2):
            assert_close(ours[name][target], delta[target])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", FISHERS)
def test_on_a_quadratic_loss_the_minimum_solves_its_equation(
    kind: str, optimizer: str, folder: Path, curved: list[tuple[Tensor, Tensor]]
) -> None:
    fisher = FISHERS[kind]()
    dense = matrix(fisher)
    N = 2 * max(steepest(dense, curvature) for _, curvature in curved)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*have not converged")
        module = fit(folder, Penalised(N, **descent(optimizer, dense, N)), fisher)
    for target, (gradient, curvature) in enumerate(curved):
        expected = torch.linalg.solve(N * dense - curvature, gradient)
        assert_close(row(module, target), expected)
        # Far enough from a Newton step to tell them apart.
        newton = torch.linalg.solve(N * dense, gradient)
        assert float((newton - expected).norm()) > 0.05 * float(expected.norm())


def test_on_a_curved_loss_of_all_layers_the_gradient_of_the_objective_is_zero(folder: Path) -> None:
    fisher, N = random_fisher(ToyDenoiser().double(), [".*"]), 3.0
    module = fit(folder, Penalised(N, 60), fisher, parameters=[".*"])
    means = {name: total / fisher.count for name, total in fisher.sums.items()}
    naive = Naive(ToyDenoiser(), list(means))
    for target, query in enumerate(module.trainer.datamodule.queries):  # type: ignore[attr-defined]
        delta = {name: stack[target] for name, stack in found(module).items()}
        expected = natural_step(mean_gradient(naive, delta, losses(query)), means, DAMPING, 1 / N)
        start = {name: torch.zeros_like(value) for name, value in delta.items()}
        newton = natural_step(mean_gradient(naive, start, losses(query)), means, DAMPING, 1 / N)
        for name, value in delta.items():
            assert_close(value, expected[name], 1e-9)
            assert float((newton[name] - value).norm()) > 0.01 * float(value.norm())


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
        functools.partial(torch.optim.Adam, lr=5e-4),
    ],
)
def test_an_optimizer_takes_the_steps_that_it_takes_on_the_objective_written_out(optimizer: Any, folder: Path) -> None:
    fisher, N, steps = random_fisher(ToyDenoiser().double(), [".*"]), 7.0, 6
    with pytest.warns(UserWarning, match="have not converged"):
        module = fit(folder, Penalised(N, steps, optimizer), fisher, parameters=[".*"])
    means = {name: total / fisher.count for name, total in fisher.sums.items()}
    layers = layer_means(means)
    damped_means = {name: mean + DAMPING * layers[name.rpartition(".")[0]] for name, mean in means.items()}
    network = ToyDenoiser().double().requires_grad_(False)
    base = dict(network.named_parameters())
    for target, query in enumerate(module.trainer.datamodule.queries):  # type: ignore[attr-defined]
        delta = {name: nn.Parameter(torch.zeros_like(value)) for name, value in base.items()}
        by_hand = optimizer(list(delta.values()))
        for _ in range(steps):
            by_hand.zero_grad()
            weights = {name: base[name] + change for name, change in delta.items()}
            under: Any = lambda *arguments, at=weights: functional_call(network, at, arguments)  # noqa: E731
            loss = torch.stack([one(under) for one in losses(query)]).mean()
            penalty = sum(((damped_means[name] * delta[name] ** 2).sum() for name in delta), torch.zeros(()))
            (-loss + N / 2 * penalty).backward()
            by_hand.step()
        for name, change in delta.items():
            assert_close(found(module)[name][target], change.detach(), 1e-9)


def test_one_step_of_the_default_is_newtons_with_alpha_1(folder: Path) -> None:
    fisher = random_fisher(ToyDenoiser().double(), [".*"])
    newton = found(fit(folder, Newton(alpha=1.0, N=30), fisher, parameters=[".*"]))
    with pytest.warns(UserWarning, match="before the last of 1 steps 'query-0000[01]' was 1 times as far"):
        ours = found(fit(folder, Penalised(30.0, 1), fisher, parameters=[".*"]))
    for name, delta in newton.items():
        assert_close(ours[name], delta, 1e-12)


def test_steps_of_another_length_end_at_the_same_minimum(folder: Path) -> None:
    one, half = (fit(folder, Penalised(1000.0, steps, lr=lr), ekfac()) for lr, steps in ((1.0, 12), (0.5, 30)))
    for target in range(2):
        assert_close(row(half, target), row(one, target))


@pytest.mark.parametrize("optimizer", [None, functools.partial(torch.optim.Adam, lr=1e-4)])
def test_the_minimum_does_not_depend_on_how_draws_are_cut(optimizer: Any, folder: Path) -> None:
    fisher = ekfac()
    whole, cut = (fit(folder, Penalised(400.0, 4, optimizer), fisher, draw_batch_size=size) for size in (DRAWS, 2))
    for target in range(2):
        assert_close(row(cut, target), row(whole, target), 1e-10)


# ---------------------------------------------------------------------------------- no minimum


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", FISHERS)
def test_a_target_without_a_minimum_is_an_error_that_names_it(
    kind: str, optimizer: str, folder: Path, curved: list[tuple[Tensor, Tensor]]
) -> None:
    fisher = FISHERS[kind]()
    dense = matrix(fisher)
    edges = [steepest(dense, curvature) for _, curvature in curved]
    assert edges[0] < edges[1]
    settings = {**descent(optimizer, dense, edges[0]), "steps": 400}
    # Between the two: the first has a minimum, the second none.
    with pytest.raises(InputError, match=r"'query-00001' diverges: .* choose a larger N, more damping or"):
        fit(folder, Penalised(edges[0] * 1.2, **settings), fisher)
    with pytest.raises(InputError, match=r"'query-00000' diverges: "):
        fit(folder, Penalised(edges[0] / 2, **settings), fisher, query_keys=["query-00000"])


def test_what_is_further_away_in_the_end_than_at_the_start_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match=r"diverges: it is [1-9][.\d]* times as far from a minimum as at the start"):
        fit(folder, Penalised(0.2, 3), diagonal())


class Exploding(ToyObjective):
    """Beyond all numbers a little way off."""

    def __call__(self, *arguments: Any) -> Tensor:
        return torch.exp(super().__call__(*arguments))


def test_a_step_that_leads_to_infinity_is_an_error(folder: Path) -> None:
    far = functools.partial(torch.optim.SGD, lr=1e4)
    with pytest.raises(InputError, match=r"loss of 'query-00000' is (inf|nan) after unlearning; .* a larger N"):
        fit(folder, Penalised(5.0, 5, far), diagonal(), objective=Exploding())


def test_what_has_not_converged_is_a_warning_that_says_how_far_it_is(
    folder: Path, curved: list[tuple[Tensor, Tensor]]
) -> None:
    fisher, steps, N = diagonal(), 3, 2.0
    dense = matrix(fisher)
    lefts = []
    for gradient, curvature in curved:
        delta = torch.zeros_like(gradient)
        distances = []
        for _ in range(steps):
            residual = torch.linalg.solve(N * dense, gradient + curvature @ delta) - delta
            distances.append(math.sqrt(float(residual @ dense @ residual)))
            delta = delta + residual
        lefts.append(distances[-1] / distances[0])
    assert min(lefts) > 0.01
    worst = lefts.index(max(lefts))
    said = f"2 of 2 targets have not converged: before the last of 3 steps 'query-0000{worst}' was {max(lefts):.2g} "
    with pytest.warns(UserWarning, match=said):
        fit(folder, Penalised(N, steps), fisher)


def test_nan_in_the_weights_is_an_error_that_names_a_query(folder: Path) -> None:
    class Broken(ToyObjective):
        def __call__(self, *arguments: Any) -> Tensor:
            return super().__call__(*arguments) * torch.nan

    with pytest.raises(InputError, match="loss of 'query-00000' has no finite gradient"):
        fit(folder, Penalised(50.0), diagonal(), objective=Broken())


# ---------------------------------------------------------------------------------- targets alone and together


ALL_KINDS = [
    None,
    functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    functools.partial(torch.optim.Adam, lr=3e-4),
    # Joins all entries of a tensor in one step size.
    functools.partial(torch.optim.Adafactor, lr=1.0),
]


@pytest.mark.parametrize(("N", "steps", "rise"), [(400.0, 6, None), (300.0, 30, 0.01)])
@pytest.mark.parametrize("optimizer", ALL_KINDS)
def test_a_targets_delta_is_the_same_alone_as_beside_others(
    optimizer: Any, N: float, steps: int, rise: float | None, folder: Path
) -> None:
    strategy = functools.partial(Penalised, N, steps, optimizer, target_increase=rise)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have not converged")
        both = fit(folder, strategy(), ekfac())
        alone = [fit(folder, strategy(), ekfac(), query_keys=[f"query-0000{n}"]) for n in range(2)]
    for target in range(2):
        assert_close(row(alone[target], 0), row(both, target), 1e-10)


# ---------------------------------------------------------------------------------- a wanted rise


class Watch(Callback):
    """Keeps the deltas after every step."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append([row(pl_module, target) for target in range(2)])


@pytest.mark.parametrize("optimizer", [None, *ALL_KINDS[1:3]])
def test_each_target_stops_where_its_loss_has_risen_as_wanted_while_others_go_on(optimizer: Any, folder: Path) -> None:
    # Small steps, of which the two take different numbers.
    settings = {"lr": 0.02} if optimizer is None else {"optimizer": optimizer}
    watch, rise = Watch(), 0.0095 if optimizer is None else 0.008
    module = fit(folder, Penalised(150.0, 60, target_increase=rise, **settings), ekfac(), watch)
    assert [result["rise"] for result in module.results.values()] == pytest.approx([rise, rise], rel=1.1e-6)
    moves = [[True, True]]
    moves += [
        [not torch.equal(ours, theirs) for ours, theirs in zip(*pair, strict=True)]
        for pair in zip(watch.seen, watch.seen[1:], strict=False)
    ]
    lasts = [max(step for step, moved in enumerate(moves) if moved[target]) for target in range(2)]
    assert lasts[0] != lasts[1]
    for target, last in enumerate(lasts):
        assert all(moved[target] == (step <= last) for step, moved in enumerate(moves))
        assert last > 0
    assert module.trainer.global_step == len(moves) == max(lasts) + 1 < 60


def test_only_the_last_step_is_shortened(folder: Path) -> None:
    stopped, free = Watch(), Watch()
    fit(folder, Penalised(150.0, 60, lr=0.05, target_increase=0.01), ekfac(), stopped)
    with pytest.warns(UserWarning, match="have not converged"):
        fit(folder, Penalised(150.0, len(stopped.seen), lr=0.05), ekfac(), free)
    for target in range(2):
        ours, theirs = ([step[target] for step in watch.seen] for watch in (stopped, free))
        last = next(place for place in range(len(ours)) if not torch.equal(ours[place], theirs[place]))
        assert last > 1
        before = ours[last - 1]
        shortened, step = ours[last] - before, theirs[last] - before
        share = float(shortened.norm() / step.norm())
        assert 0 < share < 1
        assert_close(shortened, share * step, 1e-9)


@pytest.mark.parametrize("objective", [ToyObjective(), Exploding()])
def test_a_first_step_that_goes_too_far_ends_where_newtons_does(objective: Objective, folder: Path) -> None:
    # With this N the step would be 10,000 times as long, and where the loss explodes there is none at its end.
    newton = fit(folder, Newton(target_increase=0.01), diagonal(), objective=objective)
    ours = fit(folder, Penalised(0.001, 9, target_increase=0.01), diagonal(), objective=objective)
    assert ours.trainer.global_step == 1
    for target in range(2):
        assert_close(row(ours, target), row(newton, target), 3e-6)


def test_a_rise_that_the_minimum_does_not_have_is_an_error_that_says_how_far_it_got(folder: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"'query-00000' has risen by 0\.0\d+ in 4 steps, not by 0\.5; take more steps, or .* smaller N",
    ):
        fit(folder, Penalised(5.0, 4, target_increase=0.5), diagonal())


# ---------------------------------------------------------------------------------- checkpoints


RESUMED: dict[str, dict[str, Any]] = {
    "default": {"steps": 5},
    "momentum": {"steps": 5, "optimizer": ALL_KINDS[1]},
    "Adam": {"steps": 5, "optimizer": ALL_KINDS[2]},
    "rise": {"steps": 60, "lr": 0.02, "target_increase": 0.0095},
    "rise by Adam": {"steps": 60, "optimizer": ALL_KINDS[2], "target_increase": 0.008},
}


@pytest.mark.filterwarnings("ignore:.*have not converged")
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(name: str, folder: Path, tmp_path: Path) -> None:
    strategy = functools.partial(Penalised, 150.0 if "rise" in name else 400.0, **RESUMED[name])
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = fit(folder, strategy(), ekfac(), keeper, settings={"enable_checkpointing": True})
    paths = [tmp_path / f"epoch={epoch}.ckpt" for epoch in range(whole.trainer.global_step)]
    states = [torch.load(path, weights_only=True)["optimizer_states"][0] for path in paths]
    if "rise" in name:
        # One of the two has stopped already.
        middle = next(place for place, state in enumerate(states) if state["finished"].count(True) == 1)
    else:
        middle = 1
    # No Fisher, no rows: Adam's two moments, at most.
    kept = [value for state in states[middle]["targets"] for value in state["state"].values()]
    numel = sum(tensor.numel() for one in kept for tensor in one.values() if isinstance(tensor, Tensor))
    assert numel <= 2 * 2 * (row(whole, 0).numel() + 1)
    assert states[middle]["state"] == {}

    again = fit(folder, strategy(), ekfac(), checkpoint=paths[middle])
    assert again.trainer.global_step == whole.trainer.global_step
    for theirs, ours in zip(found(whole).values(), found(again).values(), strict=True):
        assert torch.equal(theirs, ours)
    assert again.results == whole.results
    assert again.fingerprints() == whole.fingerprints()
    # What is left is measured by the start of the whole run.
    ours, theirs = (one.trainer.optimizers[0].state_dict() for one in (again, whole))
    assert ours["left"] == theirs["left"]


def test_a_run_does_not_go_on_with_another_optimizer(folder: Path, tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with pytest.warns(UserWarning, match="have not converged"):
        fit(folder, Penalised(400.0, 2, ALL_KINDS[1]), ekfac(), keeper, settings={"enable_checkpointing": True})
    faster = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    with pytest.raises(InputError, match="without ckpt_path"):
        fit(folder, Penalised(400.0, 2, faster), ekfac(), checkpoint=tmp_path / "epoch=0.ckpt")


# ---------------------------------------------------------------------------------- where nothing may move


@pytest.mark.filterwarnings("ignore:.*have not converged")
@pytest.mark.parametrize("optimizer", ALL_KINDS[:3])
@pytest.mark.parametrize("kind", FISHERS)
def test_a_layer_without_a_fisher_does_not_move(kind: str, optimizer: Any, folder: Path) -> None:
    fisher = random_fisher(ToyDenoiser().double(), [LAYER, "text"]) if kind == "diagonal" else ekfac([LAYER, "text"])
    fisher.load_tensors(
        {
            name: torch.zeros_like(value) if "text" in name and fisher.is_sum(name) else value
            for name, value in fisher.tensors().items()
        }
    )
    N = 5.0 if kind == "diagonal" else 400.0
    with pytest.warns(UserWarning, match="Fisher of layer text is all zero"):
        module = fit(folder, Penalised(N, 3, optimizer), fisher, parameters=[LAYER, "text"])
    for name, delta in found(module).items():
        assert delta.isfinite().all()
        assert bool(delta.any()) == name.startswith(LAYER)


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_a_layer_that_no_loss_depends_on_does_not_move(folder: Path) -> None:
    module = partly_used_module(Penalised(20.0, 3, ALL_KINDS[1]))
    unlearn(module, toy_data(folder, draws=DRAWS))
    assert {name for name, delta in found(module).items() if not delta.any()} == {"unused.weight", "unused.bias"}


@pytest.mark.parametrize("kind", FISHERS)
def test_the_quadratic_form_has_the_derivative_of_the_damped_matrix(kind: str) -> None:
    fisher = FISHERS[kind]()
    fisher.finalize(DAMPING)
    generator = torch.Generator().manual_seed(8)
    deltas = {
        name: torch.randn(2, *shape, generator=generator).double().requires_grad_()
        for name, shape in fisher.parameter_shapes.items()
    }
    with torch.no_grad():
        for delta in deltas.values():
            delta[0, 0] = 0.0
    gradients = torch.autograd.grad(fisher.quadratic(deltas).sum(), list(deltas.values()))
    for target in range(2):
        ours = joined(gradients[0][target], gradients[1][target])
        at = joined(*(delta[target].detach() for delta in deltas.values()))
        assert_close(ours, 2 * matrix(fisher) @ at, 1e-12)


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.LBFGS, "does not take a step from the gradients it is given .*closure.*use one that does"),
        (torch.optim.AdamW, r"AdamW's weight_decay of 0\.01 pulls deltas towards zero .*set it to 0"),
        (functools.partial(torch.optim.SGD, lr=-1.0), "Invalid learning rate"),
    ],
)
def test_an_optimizer_that_can_not_be_used_gets_one_sentence(optimizer: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Penalised(100.0, optimizer=optimizer)
    assert str(caught.value).endswith(".")
    assert ". " not in str(caught.value)


def test_an_optimizer_that_does_not_take_a_weight_gets_one_sentence(folder: Path) -> None:
    # It takes matrices only.
    muon = functools.partial(torch.optim.Muon, weight_decay=0.0)
    with pytest.raises(InputError, match=r"^The optimizer can't be used for these weights \(.*2D.*\.$"):
        fit(folder, Penalised(100.0, optimizer=muon), diagonal())


@pytest.mark.parametrize(
    "wrong",
    [
        {"N": 0.0},
        {"N": math.nan},
        {"N": math.inf},
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"target_increase": -0.1},
        {"target_increase": math.nan},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at least one step, and finite N, lr and target_increase above 0"):
        Penalised(**{"N": 10.0, **wrong})


def test_a_learning_rate_beside_an_optimizer_is_refused() -> None:
    with pytest.raises(InputError, match="give the optimizer its own"):
        Penalised(10.0, lr=0.1, optimizer=torch.optim.SGD)


def test_settings_tell_strategies_apart() -> None:
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    different = [
        Penalised(10.0),
        Penalised(20.0),
        Penalised(10.0, 3),
        Penalised(10.0, lr=0.5),
        Penalised(10.0, target_increase=0.1),
        Penalised(10.0, optimizer=adam),
        Penalised(10.0, optimizer=functools.partial(adam, betas=(0.5, 0.9))),
        Penalised(10.0, optimizer=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)),
    ]
    assert len({json.dumps(one.settings(), sort_keys=True) for one in different}) == len(different)
    assert Penalised(10.0).settings() == Penalised(10.0, lr=1.0).settings()
    assert all(json.loads(json.dumps(one.settings())) == one.settings() for one in different)
    assert {STRATEGIES[one.settings()["strategy"]] for one in different} == {Penalised}


def test_it_can_be_named_in_a_config_with_its_optimizer() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Strategy, "strategy")
    given = {"N": 100, "steps": 7, "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.25}}}
    config = parser.parse_object({"strategy": {"class_path": "Penalised", "init_args": given}})
    strategy = parser.instantiate_classes(config)["strategy"]
    assert isinstance(strategy, Penalised)
    assert strategy.settings() == Penalised(100, 7, functools.partial(torch.optim.Adam, lr=0.25)).settings()
