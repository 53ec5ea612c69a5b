"""More trainings as people have them: EKFAC's two windows, scales, and what changes or frees a layer's input.

As in ``test_fisher_variants.py``: the Fisher is right against one backward pass a sample, or one sentence names what
can't be counted. With EKFAC, both windows are held against the samples that the training step saw, in their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from variant_runs import (
    BATCH,
    HIDDEN,
    WIDTH,
    Losses,
    Net,
    Sample,
    Training,
    assert_eigenvalues,
    assert_is_right,
    assert_right,
    assert_right_or_refused,
    assert_windows,
    fitted,
    fitted_or_refused,
    plain_losses,
    plain_step,
    samples,
    squared_error,
    standing,
)

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import load_fisher

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

LAYERS = ("first", "second")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ EKFAC's windows


class Seen(Training):
    """Writes down the samples of its steps, in their order."""

    def __init__(self, step: Any = None, optimizers: Any = None, *, automatic: bool = True) -> None:
        super().__init__(Net(), step, optimizers, automatic=automatic)
        self.samples_seen: list[Sample] = []
        self.other = nn.Linear(WIDTH, 1, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for row in range(len(batch["x"])):
            self.samples_seen.append({name: value[row] for name, value in batch.items()})
        self.log("constant", torch.ones(()), on_epoch=True, on_step=False, batch_size=len(batch["x"]))
        return self.step(self, batch, batch_idx)

    @property
    def losses(self) -> Losses:
        """Of the samples that were seen."""
        return plain_losses(self.net, self.samples_seen)


def each_batch(module: Any, batch: Sample, number: int) -> None:
    """Manual optimization, a step a batch."""
    module.optimizers().zero_grad()
    module.manual_backward(plain_step(module, batch, number))
    module.optimizers().step()


def every_third(module: Any, batch: Sample, number: int) -> None:
    """Manual optimization, a step every three batches."""
    module.manual_backward(plain_step(module, batch, number))
    if number % 3 == 2:
        module.optimizers().step()
        module.optimizers().zero_grad()


def with_another(module: Any, batch: Sample, number: int) -> None:
    """Another network has three steps of its own for each of the target's."""
    others, own = module.optimizers()
    for _ in range(3):
        others.zero_grad()
        module.manual_backward(module.other(batch["x"]).square().mean())
        others.step()
    own.zero_grad()
    module.manual_backward(plain_step(module, batch, number))
    own.step()


def two_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    return [standing(module.other), standing(module.net)]


class Stops(Callback):
    """Sets ``trainer.should_stop`` after some batches, as early stopping by a rule of one's own does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.should_stop = True


def of_length(batches: int) -> list[Sample]:
    return samples(BATCH * batches)


class Stream(IterableDataset[Sample]):
    """Samples without a length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Sample]:
        return iter(of_length(self.batches))


WINDOWS: dict[str, tuple[Callable[[], Seen], int, dict[str, Any], dict[str, Any], int]] = {
    # name: (module, batches an epoch, of the Trainer, of the accumulator, batches at least in the second window)
    "manual optimization": (lambda: Seen(each_batch, automatic=False), 8, {"max_epochs": 2}, {}, 4),
    "a step every three batches by hand": (lambda: Seen(every_third, automatic=False), 9, {"max_epochs": 2}, {}, 4),
    "by hand, from step 3 of 6": (
        lambda: Seen(every_third, automatic=False),
        9,
        {"max_epochs": 2},
        {"start_step": 3},
        2,
    ),
    "another network's steps": (lambda: Seen(with_another, two_optimizers, automatic=False), 8, {}, {}, 2),
    "another network's steps, max_steps": (
        lambda: Seen(with_another, two_optimizers, automatic=False),
        20,
        {"max_steps": 32},
        {},
        2,
    ),
    "another network's steps, from step 16 of 32": (
        lambda: Seen(with_another, two_optimizers, automatic=False),
        8,
        {},
        {"start_step": 16},
        1,
    ),
    "accumulation of three in seven batches": (Seen, 7, {"max_epochs": 3, "accumulate_grad_batches": 3}, {}, 5),
    "accumulation of four in three batches": (Seen, 3, {"max_epochs": 4, "accumulate_grad_batches": 4}, {}, 3),
    "max_steps in the middle of an epoch": (
        Seen,
        8,
        {"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2},
        {},
        2,
    ),
    "limit_train_batches": (Seen, 8, {"max_epochs": 4, "limit_train_batches": 3}, {}, 3),
    "limit_train_batches as a share": (Seen, 8, {"max_epochs": 3, "limit_train_batches": 0.5}, {}, 3),
    "a stream with max_steps": (Seen, 0, {"max_epochs": -1, "max_steps": 9}, {}, 2),
    "a stream with max_steps that ends before": (Seen, 0, {"max_epochs": 1, "max_steps": 100}, {}, 1),
    "a stream with limit_train_batches": (Seen, 0, {"max_epochs": 2, "limit_train_batches": 4}, {}, 2),
    "stopped in the first quarter": (Seen, 8, {"max_epochs": 100, "callbacks": [Stops]}, {}, 1),
    "stopped by hand with manual optimization": (
        lambda: Seen(each_batch, automatic=False),
        8,
        {"max_epochs": 50, "callbacks": [Stops]},
        {},
        1,
    ),
    "stopped by a metric": (Seen, 4, {"max_epochs": 90, "callbacks": [EarlyStopping]}, {}, 1),
    "another accumulation later": (Seen, 8, {"max_epochs": 4, "callbacks": [GradientAccumulationScheduler]}, {}, 6),
    "the second window never begins": (Seen, 4, {"max_epochs": 2}, {"eigenvalue_step": 1000}, 1),
    "one batch in all": (Seen, 1, {"max_epochs": 1}, {}, 1),
    "fewer epochs than max_epochs by max_steps": (Seen, 4, {"max_epochs": 50, "max_steps": 6}, {}, 2),
}


@pytest.mark.parametrize("way", WINDOWS)
def test_both_windows_are_right_or_the_file_is_of_another_kind_and_right(tmp_path: Path, way: str) -> None:
    """A training that was let begin leaves a file; one whose length can't be known may be refused at its start."""
    make, batches, trainer, settings, at_least = WINDOWS[way]
    made: dict[Any, Callable[[], Callback]] = {
        Stops: lambda: Stops(9),
        EarlyStopping: lambda: EarlyStopping("constant", patience=1, check_on_train_epoch_end=True),
        GradientAccumulationScheduler: lambda: GradientAccumulationScheduler({0: 4, 2: 1}),
    }
    if "callbacks" in trainer:
        trainer = {**trainer, "callbacks": [made[kind]() for kind in trainer["callbacks"]]}
    data: Any = of_length(batches) if batches else DataLoader(Stream(6), batch_size=BATCH)
    module = make()
    path = fitted_or_refused(
        tmp_path, module, data, "eigenvalue_step|eigenvalue_epoch", trainer=trainer, fisher="ekfac", **settings
    )
    if path is None:
        assert not module.samples_seen, "refused after training, and not at its start"
        assert not batches, "its length is known"
        return
    seen = module.losses
    if "start_step" in settings:  # what was counted is the end of what was seen; how much the file says
        assert_tail(path, module.net, seen, at_least * BATCH)
    else:
        assert_windows(path, module.net, seen, LAYERS, at_least * BATCH)


def assert_tail(path: Path, net: nn.Module, seen: Losses, at_least: int) -> None:
    """Eigenvalues of the last samples, whatever the covariances' first one was."""
    assert path.exists(), "a whole training, and there is no Fisher"
    fisher = load_fisher(path)
    assert at_least <= fisher.count < len(seen)
    assert_eigenvalues(fisher, net, seen[len(seen) - fisher.count :], LAYERS)


class Uneven(Seen):
    """An epoch is longer or shorter than the one before."""

    lengths = (8, 2, 5)

    def train_dataloader(self) -> Any:
        return DataLoader(of_length(self.lengths[self.current_epoch % 3]), batch_size=BATCH)


@pytest.mark.parametrize("lengths", [(8, 2, 5), (1, 6, 2), (2, 1, 9)])
def test_epochs_of_uneven_length(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    module = Uneven()
    module.lengths = lengths
    trainer = {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1}
    path = fitted(tmp_path, module, None, trainer, {"fisher": "ekfac"})
    assert_windows(path, module.net, module.losses, LAYERS, BATCH)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("automatic", [True, False])
def test_training_that_goes_on_from_a_checkpoint_has_the_same_windows(
    tmp_path: Path, epoch: int, automatic: bool
) -> None:
    """Of four epochs the checkpoint is in the first window, between them, or in the second."""

    def module() -> Seen:
        torch.manual_seed(0)
        return Seen(None if automatic else each_batch, automatic=automatic)

    trainer = {"max_epochs": 4, "enable_checkpointing": True}
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = module()
    fitted(tmp_path / "whole", whole, of_length(3), {**trainer, "callbacks": [keep]}, {"fisher": "ekfac"})
    again = module()
    path = fitted(
        tmp_path / "again",
        again,
        of_length(3),
        trainer,
        {"fisher": "ekfac"},
        resume=tmp_path / "kept" / f"epoch={epoch - 1}.ckpt",
    )
    assert_windows(path, whole.net, whole.losses, LAYERS, 3 * BATCH)


def test_time_limit_that_ends_a_training_leaves_a_fisher_that_is_right(tmp_path: Path) -> None:
    """A timer that runs out stops the training after an epoch."""
    module = Seen()
    timer = Timer(duration={"seconds": 3600}, interval="epoch")
    timer._offset = 3599.999  # all but spent, so that it does not depend on the machine
    trainer = {"max_epochs": 40, "callbacks": [timer]}
    path = fitted(tmp_path, module, of_length(4), trainer, {"fisher": "ekfac"})
    assert len(module.samples_seen) < 40 * 4 * BATCH
    assert_windows(path, module.net, module.losses, LAYERS, 1)


# --------------------------------------------------------------------------------------------------------- scales


def test_sum_and_mean_give_the_same(tmp_path: Path) -> None:
    net, data = Net(), samples(7)
    step = lambda module, batch, _: BATCH * 0.5 * squared_error(module.net(batch["x"]), batch["y"]).sum()  # noqa: E731
    losses = plain_losses(net, data)
    settings = {"reduction": "sum", "loss_scale": BATCH * 0.5}
    assert_is_right(tmp_path, Training(net, step), data, losses, trainer={"accumulate_grad_batches": 3}, **settings)


@pytest.mark.parametrize("every", [2, 3, 5])
def test_accumulation_with_batches_left_over(tmp_path: Path, every: int) -> None:
    net, data = Net(), samples(15)
    trainer = {"accumulate_grad_batches": every, "gradient_clip_val": 1e-3}
    assert_is_right(tmp_path, Training(net), data, plain_losses(net, data), trainer=trainer)


class LossScaling(Precision):
    """A precision plugin that multiplies the loss, and takes gradients back before the step, as a GradScaler does."""

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        scaled: Tensor = super().pre_backward(tensor, module) * 1024
        return scaled

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        def unscaled() -> Any:
            loss = closure()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= 1024
            return loss

        return super().optimizer_step(optimizer, model, unscaled, **kwargs)


def test_precision_plugin_with_a_scale_of_its_own(tmp_path: Path) -> None:
    net, data = Net(), samples()
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "loss_scale", trainer={"plugins": [LossScaling()]})


class OwnBackward(Training):
    """Multiplies the loss in a ``backward`` of its own."""

    def backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        (128 * loss).backward()


class SumOfTwoBackward(Training):
    """Divides by what it knows of its accumulation, in a ``backward`` of its own, by the gradient it begins with."""

    def backward(self, loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        loss.backward(gradient=torch.full_like(loss, 0.25))


@pytest.mark.parametrize(("kind", "scale"), [(OwnBackward, 128.0), (SumOfTwoBackward, 0.25)])
def test_factor_in_a_backward_of_ones_own(tmp_path: Path, kind: type[Training], scale: float) -> None:
    net, data = Net(), samples()
    assert_right_or_refused(tmp_path / "unsaid", kind(net), data, plain_losses(net, data), "loss_scale")
    assert_is_right(tmp_path / "said", kind(net), data, plain_losses(net, data), loss_scale=scale)


def test_mean_over_samples_and_tokens(tmp_path: Path) -> None:
    net, data = Net(), samples(7, (3, WIDTH))
    step = lambda module, batch, _: functional.mse_loss(module.net(batch["x"]), batch["y"])  # noqa: E731
    losses: Losses = [
        lambda sample=sample: functional.mse_loss(net(sample["x"][None]), sample["y"][None]) for sample in data
    ]
    assert_is_right(tmp_path, Training(net, step), data, losses)


def prior(module: Any, batch: Sample, _: int) -> Tensor:
    """Prior preservation: pictures of the subject and of its class in one pass, the sum of two means."""
    found = module.net(torch.cat([batch["x"], batch["y"]]))
    instance, class_ = found.square().sum(1).chunk(2)
    return instance.mean() + class_.mean()


@pytest.mark.parametrize("stacked", [False, True])
def test_sum_of_two_means_of_two_parts_of_the_rows(tmp_path: Path, stacked: bool) -> None:
    """Where the batch has both parts as one tensor, rows are samples, and only ``loss_scale`` can say the factor."""
    net, data = Net(), samples()
    if not stacked:  # a sample of the batch is a pair of pictures
        losses: Losses = [lambda s=s: net(s["x"][None]).square().sum() + net(s["y"][None]).square().sum() for s in data]
        assert_right_or_refused(tmp_path, Training(net, prior), data, losses, r"(?=.*rows)(?=.*(first|second))")
        return

    def collate(batch: list[Sample]) -> dict[str, Tensor]:
        return {"both": torch.cat([torch.stack([s[name] for s in batch]) for name in ("x", "y")])}

    def step(module: Any, batch: Sample, _: int) -> Tensor:
        instance, class_ = module.net(batch["both"]).square().sum(1).chunk(2)
        return instance.mean() + class_.mean()

    alone: Losses = [lambda s=s, n=n: net(s[n][None]).square().sum() for s in data for n in ("x", "y")]
    loader: Any = DataLoader(data, batch_size=BATCH, collate_fn=collate)
    assert_is_right(tmp_path, Training(net, step), loader, alone, loss_scale=2.0)


# ---------------------------------------------------------- inputs changed in place, checkpointing, mixed samples


class AddsInPlace(nn.Module):
    """A residual stream that is added to in place, by attention-like and feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.add_(self.first(x))
        x[..., :2] += torch.sigmoid(self.second(x))[..., :2]
        out: Tensor = self.third(x)
        return out


class MasksInPlace(AddsInPlace):
    """What a layer was given is masked and scaled in place afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x * 2
        out = self.first(hidden)
        hidden.mul_(0.25)
        out = out + self.second(hidden)
        hidden.masked_fill_(hidden > 0.1, 0.0)
        return out + self.third(hidden)


class ActivatesInPlace(AddsInPlace):
    """Two branches of one tensor; the second one's activation and dropout work in place."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.layer_norm(x, (WIDTH,))
        out = self.second(hidden) + self.first(hidden)
        return out + self.third(functional.dropout(functional.leaky_relu(hidden, inplace=True), 0.0, inplace=True))


class OverwritesABuffer(AddsInPlace):
    """A buffer is filled anew for each layer."""

    def forward(self, x: Tensor) -> Tensor:
        buffer, out = torch.empty_like(x), torch.zeros_like(x)
        for number, layer in enumerate((self.first, self.second, self.third)):
            buffer = buffer.detach().copy_(x * (number + 1))
            out = out + layer(buffer)
        return out


IN_PLACE = [AddsInPlace, MasksInPlace, ActivatesInPlace, OverwritesABuffer]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_input_that_is_changed_in_place_after_its_use_under_autocast(tmp_path: Path, kind: type[nn.Module]) -> None:
    """A pass rounds some ten times to bfloat16, whose unit is 2⁻⁸, and the gradient is squared: 2 · 10 · 2⁻⁸ < 0.1."""
    net, data = kind(), samples(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right_or_refused(
            tmp_path,
            Training(net),
            data,
            plain_losses(net, data),
            "first|second|third",
            trainer={"precision": "bf16-mixed"},
            rtol=0.1,
            totals=True,
        )


class Checkpointed(Net):
    """Both layers are run again in the backward pass."""

    reentrant, inside = False, False

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_(True)

        def part(x: Tensor) -> Tensor:
            hidden = torch.tanh(self.first(x))
            if self.inside:
                hidden = checkpoint(self.second, hidden, use_reentrant=False)
                return torch.cat([hidden, hidden], -1)[..., :WIDTH]
            out: Tensor = self.second(hidden)
            return out

        out: Tensor = checkpoint(part, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("fisher", ["diagonal", "ekfac"])
@pytest.mark.parametrize(("reentrant", "inside"), [(False, False), (True, False), (False, True), (True, True)])
def test_checkpointing_of_either_kind_is_right(tmp_path: Path, reentrant: bool, inside: bool, fisher: Any) -> None:
    net, data = Checkpointed(), samples()
    net.reentrant, net.inside = reentrant, inside
    plain = Net()
    plain.load_state_dict(net.state_dict())
    module = Training(net)
    path = fitted(tmp_path, module, data, {}, {"fisher": fisher})
    losses = plain_losses(plain, data)
    if fisher == "ekfac":
        assert_windows(path, plain, losses, LAYERS, BATCH)
        return
    assert_right(path, plain, losses)


class CheckpointedTwice(Checkpointed):
    """One checkpointed block at two places."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        again = checkpoint(self.first, out, use_reentrant=self.reentrant)
        return out + checkpoint(self.second, again, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layer_at_two_places_is_right(tmp_path: Path, reentrant: bool) -> None:
    net, data = CheckpointedTwice(), samples()
    net.reentrant = reentrant

    class Unrolled(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            again: Tensor = out + self.second(self.first(out))
            return again

    plain = Unrolled()
    plain.load_state_dict(net.state_dict())
    path = fitted(tmp_path, Training(net), data, {}, {})
    assert_right(path, plain, plain_losses(plain, data))


class Normalised(Net):
    """A norm between the layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.between = norm.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.between(self.first(x))))
        return out


def refused_or_said(folder: Path, module: Any, trainer: dict[str, Any] | None = None) -> str:
    """All that is said of a fit, by an InputError or by warnings."""
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitted(folder, module, samples(), trainer or {}, {})
        except InputError as error:
            said = str(error)
    return "\n".join([said, *[str(warning.message) for warning in caught]])


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(HIDDEN),
        nn.BatchNorm1d(HIDDEN, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(HIDDEN),
        nn.LazyBatchNorm1d(),
    ],
    ids=["plain", "bare", "sync", "lazy"],
)
def test_norm_over_the_batch_is_named(tmp_path: Path, norm: nn.Module) -> None:
    net = Normalised(norm)
    if isinstance(norm, nn.LazyBatchNorm1d):
        net(samples(4)[0]["x"].expand(2, WIDTH))
    assert "between" in refused_or_said(tmp_path, Training(net))


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(HIDDEN), nn.GroupNorm(2, HIDDEN), nn.BatchNorm1d(HIDDEN).eval()],
    ids=["layer", "group", "eval"],
)
def test_norm_that_mixes_no_samples_is_right(tmp_path: Path, norm: nn.Module) -> None:
    """A BatchNorm in eval mode has fixed statistics, and is no reason to say anything."""
    net, data = Normalised(norm), samples()

    class KeepsEval(Training):
        def on_train_start(self) -> None:
            if isinstance(norm, nn.BatchNorm1d):
                norm.eval()

    assert_is_right(tmp_path, KeepsEval(net), data, plain_losses(net, data), leaving="between")


@pytest.mark.parametrize("automatic", [True, False])
def test_optimizer_that_evaluates_a_batch_many_times_is_named(tmp_path: Path, automatic: bool) -> None:
    def step(module: Any, batch: Sample, number: int) -> Tensor | None:
        if automatic:
            return plain_step(module, batch, number)
        optimizer = module.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = plain_step(module, batch, number)
            module.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def lbfgs(module: LightningModule) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    assert "LBFGS" in refused_or_said(tmp_path, Training(Net(), step, lbfgs, automatic=automatic))
