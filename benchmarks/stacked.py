"""Many small models trained at once: the weights of all stand in one stack, and each step is one step of every model.

A model of the benches is so small that a training of it does little but start operations, on a GPU even more than on a
processor. So models are stacked (torch.func.vmap over weights and batches). What is random comes from the same places
as in the training of one model, its first weights, its batches, its timesteps and its noise: they are recorded from
Lightning's own fit of each run, without its arithmetic. Optimizer, schedule, clipping and averaging are those of the
training config; a config with more than these is refused. What differs is rounding alone:

    python benchmarks/stacked.py digits     # trains three models either way, and shows how far they are apart
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from benches import Bench, bench_parser, measuring
from common import quiet
from lightning.pytorch.callbacks import EMAWeightAveraging
from measured_together import Together
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_unlearn.command_line.retraining_cli import RetrainingCLI
from lightning_unlearn.data.conditions import Conditions, first_captions
from lightning_unlearn.data.samples import Sample, SampleBatch, ViewBatch
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.evaluation import Measuring, Outcome, Run, Training, fit_run
from lightning_unlearn.evaluation.study import Study
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.weights.precision import ExactFloat32


@dataclass(frozen=True)
class Recorded:
    """All that is random in a training.

    Attributes:
        run: Which.
        state: The first weights.
        rows: ``(steps, B)`` which samples, by their places.
        timesteps: ``(steps, B)``.
        noise: ``(steps, B, C, H, W)``.
    """

    run: Run
    state: dict[str, Tensor]
    rows: Tensor
    timesteps: Tensor
    noise: Tensor


class _Recorder(DiffusionModule):
    """A training that draws all that it would draw, and learns nothing."""

    places: dict[str, int]
    drawn: list[tuple[Tensor, Tensor, Tensor]]

    def training_step(self, batch: SampleBatch, batch_idx: int) -> Tensor:
        assert int(batch.caption_counts.max()) == 1, "a sample's caption is not recorded"
        _, timesteps, noise = self._draw(batch)
        self.drawn.append((torch.tensor([self.places[key] for key in batch.keys]), timesteps, noise))
        return 0.0 * next(self.parameters()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([next(self.parameters())], lr=0.0)


def record(cli: RetrainingCLI, run: Run, keys: Sequence[str]) -> Recorded:
    """What a run's training would draw."""
    state: dict[str, Tensor] = {}

    def build(run: Run) -> Training:
        training = cli.build(run, keys)
        assert type(training.module) is DiffusionModule
        state.update({name: value.clone() for name, value in training.module.network.state_dict().items()})
        training.module.__class__ = _Recorder
        training.module.places = {key: place for place, key in enumerate(keys)}
        training.module.drawn = []
        callbacks: list[Any] = training.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, EMAWeightAveraging)]
        return training

    module: Any = fit_run(build, run)
    rows, timesteps, noise = (torch.stack(values) for values in zip(*module.drawn, strict=True))
    return Recorded(run, state, rows, timesteps, noise)


class _Loss(nn.Module):
    """The mean loss of a batch, as a function of a network's weights."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, latents: Tensor, conditions: Conditions, timesteps: Tensor, noise: Tensor) -> Tensor:
        return self.objective(self.network, ViewBatch(latents, conditions), timesteps, noise).mean()


def plain_attention() -> AbstractContextManager[None]:
    """Attention written out in whatever network, since vmap has no rule for torch's own kernels."""
    return sdpa_kernel(SDPBackend.MATH)


def constant_buffers(network: nn.Module, recorded: Sequence[Recorded]) -> None:
    """See that what of a network is no weight is the same in all models: those of a stack share it."""
    for name, value in network.named_buffers():
        alike = all(torch.equal(one.state[name], value.cpu()) for one in recorded if name in one.state)
        assert alike, f"{name} differs from model to model, or changes in training"


def train(
    cli: RetrainingCLI, recorded: Sequence[Recorded], samples: Sequence[Sample], device: str
) -> tuple[Any, dict[str, Tensor]]:
    """Train all models together.

    Args:
        cli: The training config.
        recorded: What is random in each.
        samples: All samples, in the order of the recorded places.
        device: Where to.

    Returns:
        A module of the config, and the trained weights ``(models, …)`` of its network.
    """
    cli.instantiate_classes()
    module, trainer = cli.model, cli.trainer
    assert isinstance(module, DiffusionModule)
    assert trainer.accumulate_grad_batches == 1
    assert trainer.gradient_clip_algorithm in (None, "norm")
    average: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    assert all(type(callback) is EMAWeightAveraging for callback in average), "no other callback is known here"
    constant_buffers(module.network, recorded)
    loss = _Loss(module.network.to(device), module.objective)
    names = dict(loss.named_parameters())
    stack = {
        name: torch.stack([one.state[name.removeprefix("network.")] for one in recorded]).to(device) for name in names
    }
    weights = {name: value.requires_grad_() for name, value in stack.items()}
    optimizer = module.optimizer(list(weights.values()))  # type: ignore[arg-type]
    schedule = module.lr_scheduler(optimizer) if module.lr_scheduler is not None else None
    averaged: dict[str, Tensor] = {}
    of_all = vmap(lambda values, *batch: functional_call(loss, values, batch), randomness="error")
    latents = torch.stack([sample.latent for sample in samples]).to(device)
    given = first_captions([sample.conditions for sample in samples])
    conditions = {name: values.to(device) for name, values in given.items()}
    for step in range(recorded[0].rows.shape[0]):
        rows, timesteps, noise = (
            torch.stack([getattr(one, name)[step] for one in recorded]).to(device, non_blocking=True)
            for name in ("rows", "timesteps", "noise")
        )
        shown = {name: values[rows] for name, values in conditions.items()}
        with plain_attention():
            of_all(weights, latents[rows], shown, timesteps, noise).sum().backward()
        if trainer.gradient_clip_val:
            _clip(list(weights.values()), trainer.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        for callback in average:
            _average(callback, averaged, weights, step)
    found = averaged or weights
    constant_buffers(module.network, recorded)
    module.network.eval()
    return module, {name.removeprefix("network."): value.detach() for name, value in found.items()}


def _clip(weights: Sequence[Tensor], most: float) -> None:
    """Each model's gradient to a greatest norm, as ``torch.nn.utils.clip_grad_norm_`` does it for one."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # (models,)
    shares = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient *= shares.view(-1, *[1] * (gradient.ndim - 1))


@torch.no_grad()
def _average(callback: EMAWeightAveraging, averaged: dict[str, Tensor], weights: dict[str, Tensor], step: int) -> None:
    """The average of weights, as Lightning's callback takes it after a step."""
    if not callback.should_update(step_idx=step):
        return
    if not averaged:
        averaged.update({name: weight.detach().clone() for name, weight in weights.items()})
        return
    average = callback._kwargs["avg_fn"]
    for name, weight in weights.items():
        averaged[name] = average(averaged[name], weight.detach(), step)


def train_all(
    bench: Bench, cli: RetrainingCLI, runs: Sequence[Run], pictures: frozenset[Run], how: Stacks
) -> Iterator[tuple[Run, dict[str, Outcome], float]]:
    """Train runs, so many at once, and measure each.

    Args:
        bench: Whose.
        cli: Its training config.
        runs: Which.
        pictures: Those that generate the queries again, too.
        how: Where, and how many.

    Yields:
        A run, what its network makes of the queries, and the seconds that its training took.
    """
    samples, queries = bench.samples("shards"), bench.samples("queries")
    with recordings(bench, cli, runs, how.recorders) as all_recorded:
        for start in range(0, len(runs), how.together):
            part = runs[start : start + how.together]
            begun = time.monotonic()
            recorded = list(islice(all_recorded, len(part)))
            said = time.monotonic()
            with ExactFloat32():
                module, weights = train(cli, recorded, samples, how.device)
                ended = time.monotonic()
                measure = Measuring(queries, **measuring(bench))
                together = Together(module.network, module.objective, queries, measure, how.device)
                with plain_attention():
                    outcomes = together.outcomes(weights, pictures=bool(pictures & set(part)))
            for run, outcome in zip(part, outcomes, strict=True):
                yield run, outcome, (ended - begun) / len(part)
            each = [f"{seconds / len(part):.2f}" for seconds in (said - begun, ended - said, time.monotonic() - ended)]
            print(f"{len(part)} models: {' + '.join(each)} s each to record, train and measure", flush=True)


@dataclass(frozen=True)
class Stacks:
    """Where and how stacks are trained.

    Attributes:
        together: Models in one.
        device: Where to train.
        recorders: Processes that record what is random, ahead of the training.
    """

    together: int = 16
    device: str = "cpu"
    recorders: int = 0


@contextmanager
def recordings(bench: Bench, cli: RetrainingCLI, runs: Sequence[Run], recorders: int) -> Iterator[Iterator[Recorded]]:
    """What is random in each run, in their order."""
    keys = [sample.key for sample in bench.samples("shards")]
    if not recorders:
        yield (record(cli, run, keys) for run in runs)
        return
    torch.multiprocessing.set_sharing_strategy("file_system")  # a tensor a file descriptor would be too many
    with torch.multiprocessing.get_context("spawn").Pool(recorders, _start, (bench.name, keys)) as pool:
        yield pool.imap(_record_here, runs)


_here: dict[str, Any] = {}


def _start(name: str, keys: Sequence[str]) -> None:
    quiet()
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    _here.update(cli=Bench(name).cli(), keys=keys)


def _record_here(run: Run) -> Recorded:
    return record(_here["cli"], run, _here["keys"])


def retrain_stacked(bench: Bench, cli: RetrainingCLI, study: Study, runs: Sequence[Run], how: Stacks) -> None:
    """Train what is missing of runs, and keep what each makes of the queries."""
    # Subset models foretell losses alone.
    pictures = frozenset(runs) - frozenset(bench.plan().subsets) - frozenset(bench.plan().second)
    facts = {"torch": torch.__version__, "device": how.device, "stacked": how.together}
    for run, outcomes, seconds in train_all(bench, cli, runs, pictures, how):
        study.write(run, outcomes, seconds, facts)


def main() -> None:
    """Compare three models that are trained one by one with the same three in a stack."""
    bench = Bench(bench_parser(__doc__).parse_args().bench)
    quiet()
    torch.set_num_threads(1)
    cli = bench.cli()
    samples, queries = bench.samples("shards"), bench.samples("queries")
    runs = bench.plan().subsets[:3]
    for run, stacked, _ in list(train_all(bench, cli, runs, frozenset(runs), Stacks(together=len(runs)))):
        begun = time.monotonic()
        module: Any = fit_run(lambda run: cli.build(run, [sample.key for sample in samples]), run)
        ended = time.monotonic()
        alone = Measuring(queries, **measuring(bench))(module.network, module.objective)
        apart = [abs(alone[key].loss / stacked[key].loss - 1) for key in alone]
        moved = [abs((alone[key].mse or 0.0) - (stacked[key].mse or 0.0)) for key in alone]
        print(f"{ended - begun:.1f} s alone; losses are apart by {max(apart):.1e}, pictures by {max(moved):.1e}")


if __name__ == "__main__":
    main()
