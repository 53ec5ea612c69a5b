"""Trainings as people have them: the Fisher is right, or one sentence names what can't be counted.

Written against issue 14 before its cures, by kind: a layer is not what it seems, a row is not a sample, which backward
passes count (``test_fisher_variants_windows.py`` has the other kinds). What is right is one backward pass a sample in
float64 (``variant_runs.mean_squares``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
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
    fitted,
    fitted_or_refused,
    mean_squares,
    plain_losses,
    plain_step,
    samples,
    squared_error,
    standing,
)

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import load_fisher

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------- a layer is not what it seems


class SpectralLinear(nn.Linear):
    """Its weight is divided by its largest singular value in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight / torch.linalg.matrix_norm(self.weight, 2), self.bias)


class CosineLinear(nn.Linear):
    """Input and weight rows are normalised, as in cosine classifiers and attention of newer transformers."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.normalize(x, dim=-1), functional.normalize(self.weight, dim=-1), self.bias)


class HalfFrozenLinear(nn.Linear):
    """Only the last rows of its weight are trained; the others are detached."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, torch.cat([self.weight[:2].detach(), self.weight[2:]]), self.bias)


class ResidualLinear(nn.Linear):
    """A Linear with its shortcut inside."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, (0, HIDDEN - WIDTH)) + super().forward(x).tanh()


@pytest.mark.parametrize("kind", [SpectralLinear, CosineLinear, HalfFrozenLinear, ResidualLinear])
def test_linear_subclass_with_a_forward_of_its_own(tmp_path: Path, kind: type[nn.Linear]) -> None:
    net, data = Net(kind(WIDTH, HIDDEN)), samples()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first")


def test_linear_subclass_that_changes_nothing_is_right(tmp_path: Path) -> None:
    class Named(nn.Linear):
        pass

    net, data = Net(Named(WIDTH, HIDDEN)), samples()
    assert_is_right(tmp_path, Training(net), data, plain_losses(net, data))


class Functional(nn.Module):
    """A network that is called with other tensors in its parameters' places."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = Net(), factor

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.factor * parameter for name, parameter in self.inner.named_parameters()}
        out: Tensor = torch.func.functional_call(self.inner, weights, (x,))
        return out


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_layer_called_with_other_weights_by_functional_call(tmp_path: Path, factor: float) -> None:
    net, data = Functional(factor), samples()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), r"inner\.(first|second)")


def test_weight_that_is_orthogonal_by_a_parametrisation(tmp_path: Path) -> None:
    net, data = Net(), samples()
    nn.utils.parametrizations.orthogonal(net.first)
    # `all` leaves such layers out with a word; by a pattern they are asked for.
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "first", parameters=[".*"])


def test_parametrisation_of_ones_own(tmp_path: Path) -> None:
    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.triu() + weight.triu(1).mT

    net, data = Net(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)), samples()
    nn.utils.parametrize.register_parametrization(net.second, "weight", Symmetric())
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "second", parameters=[".*"])


@pytest.mark.parametrize("chosen", [[".*"], ["first"]])
def test_pruned_weight(tmp_path: Path, chosen: Any) -> None:
    net, data = Net(), samples()
    nn.utils.prune.l1_unstructured(net.first, "weight", amount=0.4)
    where = r"(?!)" if chosen == [".*"] else "second"
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "first", leaving=where, parameters=chosen)


class Averaged(Net):
    """The forward pass takes the weights' mean with their moving average, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", self.first.weight.detach().clone() + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight = 0.5 * self.first.weight + 0.5 * self.average
        out: Tensor = self.second(torch.tanh(functional.linear(x, weight, self.first.bias)))
        return out


def test_weight_that_is_merged_with_its_moving_average(tmp_path: Path) -> None:
    net, data = Averaged(), samples()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first")


def test_users_hook_that_changes_the_output_in_place(tmp_path: Path) -> None:
    net, data = Net(), samples()

    def triple(_: nn.Module, __: Any, output: Tensor) -> None:
        output.mul_(3)

    net.first.register_forward_hook(triple)
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first")


class HooksLater(Callback):
    """Puts a user's hook on when the training has begun, after those of other callbacks."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        net: Any = pl_module.net
        if batch_idx == 0:
            net.first.register_forward_hook(lambda layer, arguments, output: 2 * output)


def test_users_hook_that_comes_after_the_start_of_training(tmp_path: Path) -> None:
    net, data = Net(), samples()
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "first", trainer={"callbacks": [HooksLater()]})


class HooksLast(Callback):
    """A user's hook of the second batch on; the first batch shows nothing of it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        net: Any = pl_module.net
        if batch_idx == 1:
            net.first.forward = lambda x: 3 * functional.linear(x, net.first.weight, net.first.bias)


def test_forward_that_is_replaced_from_the_second_batch_on(tmp_path: Path) -> None:
    net, data = Net(), samples()
    original = copy.deepcopy(net)
    losses = plain_losses(net, data)  # called once the forward is replaced; right is what each batch had

    def first_of(sample: Sample) -> Tensor:
        weights = dict(net.named_parameters())
        out = torch.func.functional_call(original, weights, (sample["x"][None],))
        return squared_error(out, sample["y"][None])[0]

    mixed: Losses = [*[lambda sample=sample: first_of(sample) for sample in data[:BATCH]], *losses[BATCH:]]
    assert_right_or_refused(tmp_path, Training(net), data, mixed, "first", trainer={"callbacks": [HooksLast()]})


def test_users_pre_hook_that_changes_the_input_is_right(tmp_path: Path) -> None:
    net, data = Net(), samples()
    net.first.register_forward_pre_hook(lambda layer, arguments: (2 * arguments[0] + 1,))
    assert_is_right(tmp_path, Training(net), data, plain_losses(net, data))


class ClippedOutput(Net):
    """The gradient at a layer's output is clipped by a hook on the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
        out: Tensor = self.second(torch.tanh(hidden))
        return out


def test_gradient_that_is_clipped_at_the_layers_output(tmp_path: Path) -> None:
    net, data = ClippedOutput(), samples()
    # A sum, so that the bound is the same for a sample alone as in a batch.
    step = lambda module, batch, _: squared_error(module.net(batch["x"]), batch["y"]).sum()  # noqa: E731
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net, step), data, losses, "first", reduction="sum")


def test_weights_whose_gradient_is_masked_by_a_hook(tmp_path: Path) -> None:
    net, data = Net(), samples()
    mask = torch.zeros_like(net.first.weight)
    mask[:2] = 1
    net.first.weight.register_hook(lambda gradient: gradient * mask)
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first")


class TiedEmbedding(Net):
    """The last layer's weight is that of the embedding, as in language models."""

    def __init__(self) -> None:
        super().__init__(second=nn.Linear(HIDDEN, WIDTH, bias=False))
        self.table = nn.Embedding(WIDTH, HIDDEN, dtype=torch.float64)
        self.table.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        token = self.table(x[:, 0].abs().long() % WIDTH)
        out: Tensor = self.second(torch.tanh(self.first(x) + token))
        return out


def test_weight_that_an_embedding_shares(tmp_path: Path) -> None:
    net, data = TiedEmbedding(), samples()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "second")


class Bilinear(Net):
    """A layer's weight is the form of a bilinear function, too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.second(hidden) + functional.bilinear(x, hidden, self.first.weight.mT[None].contiguous())
        return out


def test_weight_that_a_bilinear_form_uses_too(tmp_path: Path) -> None:
    net, data = Bilinear(), samples()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first")


def test_weight_decay_of_ones_own_in_the_loss(tmp_path: Path) -> None:
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> Tensor:
        return plain_step(module, batch, 0) + 0.5 * module.net.first.weight.square().sum()

    plain = plain_losses(net, data)
    losses = [lambda loss=loss: loss() + 0.5 * net.first.weight.square().sum() for loss in plain]
    assert_right_or_refused(tmp_path, Training(net, step), data, losses, "first")


IMAGE = (2, 6, 6)
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(2, 4, 3, padding="same"),
    "grouped": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2),
    "strided": lambda: nn.Conv2d(2, 4, 3, padding=(1, 0), stride=(2, 1)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_all_sorts(tmp_path: Path, kind: str) -> None:
    net = nn.Sequential(CONVOLUTIONS[kind](), nn.Tanh()).double()
    data = samples(shape=IMAGE)
    step = lambda module, batch, _: module.net(batch["x"]).square().flatten(1).sum(1).mean()  # noqa: E731
    losses = [lambda sample=sample: net(sample["x"][None]).square().sum() for sample in data]
    check = assert_is_right if kind in ("dilated", "strided") else None
    if check is not None:
        check(tmp_path, Training(net, step), data, losses)
    else:
        assert_right_or_refused(tmp_path, Training(net, step), data, losses, r"[Ll]ayer 0\b")


class Block(nn.Module):
    """PyTorch's own transformer layer: its attention's output projection is never called as a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH + 1, 2, HIDDEN, dropout=0.0, batch_first=True)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


@pytest.mark.parametrize("chosen", ["all", [r"layer\.linear\d"], [r".*out_proj"]])
def test_transformer_layer_of_pytorch(tmp_path: Path, chosen: Any) -> None:
    net, data = Block(), samples(shape=(3, WIDTH + 1))
    leaving = r"in_proj|norm" if chosen == "all" else ""
    assert_right_or_refused(
        tmp_path, Training(net), data, plain_losses(net, data), "out_proj", leaving=leaving, parameters=chosen
    )


def test_copy_of_the_network_that_is_used_beside_it(tmp_path: Path) -> None:
    """A copy takes the hooks with it: what flows through the copy is none of the network's gradient."""
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> Tensor:
        teacher = copy.deepcopy(module.net)
        return (squared_error(module.net(batch["x"]), batch["y"]) + squared_error(teacher(batch["x"]), 0)).mean()

    assert_right_or_refused(tmp_path, Training(net, step), data, plain_losses(net, data), "first|second")


def test_copy_in_place_of_the_network(tmp_path: Path) -> None:
    """The loss never uses the network itself after the first batch, but a copy that took its place."""
    net, data = Net(), samples()
    replaced = copy.deepcopy(net)

    def step(module: Any, batch: Sample, number: int) -> Tensor:
        return squared_error((module.net if number == 0 else replaced)(batch["x"]), batch["y"]).mean()

    losses = plain_losses(net, data)[:BATCH]
    assert_right_or_refused(tmp_path, Training(net, step), data, losses, "first|second|net")


def test_scripted_block_beside_a_plain_one(tmp_path: Path) -> None:
    net, data = Net(), samples()
    net.second = torch.jit.script(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, WIDTH)).double())
    assert_right_or_refused(
        tmp_path, Training(net), data, plain_losses(net, data), "second", parameters=["first", r"second\..*"]
    )


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("way", ["layer", "block", "wrapped", "network"])
def test_compiled_block(tmp_path: Path, ran_before: bool, way: str) -> None:
    torch._dynamo.reset()
    net, data = Net(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))), samples()
    first: Any = net.first
    if way == "layer":
        first[0].compile(backend="eager")
    elif way == "block":
        first.compile(backend="eager")
    elif way == "wrapped":
        net.first = torch.compile(first, backend="eager")
    else:
        net.compile(backend="eager")
    if ran_before:  # with gradient, in batches of the training's size
        net(torch.stack([sample["x"] for sample in data[:BATCH]])).sum().backward()
        net.zero_grad()
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), "first|second|compile")


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """``(|∂f/∂x| - 1)²`` of each sample, as critics have it."""
    x = x.detach().clone().requires_grad_(True)
    slope = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
    return (slope.norm(dim=1) - 1).square()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gradient_penalty(tmp_path: Path, share: float) -> None:
    net, data = Net(), samples()

    def per_sample(x: Tensor, y: Tensor) -> Tensor:
        return 10 * penalty(net, x) + share * squared_error(net(x), y)

    step = lambda module, batch, _: per_sample(batch["x"], batch["y"]).mean()  # noqa: E731
    losses = [lambda sample=sample: per_sample(sample["x"][None], sample["y"][None])[0] for sample in data]
    assert_right_or_refused(tmp_path, Training(net, step), data, losses, "first|second|net")


class Twice(Net):
    """One layer at two places."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(self.second(torch.tanh(self.first(x))))))
        return out


def test_layer_at_two_places_is_right(tmp_path: Path) -> None:
    net, data = Twice(), samples()
    assert_is_right(tmp_path, Training(net), data, plain_losses(net, data))


class Adapted(nn.Module):
    """A frozen Linear with a small adapter beside it, by hand."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, HIDDEN).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, HIDDEN, bias=False)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "beside":
            out: Tensor = self.base(x) + 0.5 * self.up(self.down(x))
            return out
        merged = self.base.weight + 0.5 * self.up.weight @ self.down.weight
        return functional.linear(x, merged, self.base.bias)


@pytest.mark.parametrize("way", ["beside", "merged"])
def test_adapter_by_hand(tmp_path: Path, way: str) -> None:
    net, data = Net(Adapted(way)), samples()
    losses, chosen = plain_losses(net, data), [r"first\.(down|up)", "second"]
    if way == "beside":
        assert_is_right(tmp_path, Training(net), data, losses, parameters=chosen)
    else:
        assert_right_or_refused(tmp_path, Training(net), data, losses, r"first\.(down|up)", parameters=chosen)


class AdapterParameters(nn.Linear):
    """DoRA-like: bare parameters in a Linear subclass, with its own weight trained as well."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HIDDEN)
        self.magnitude = nn.Parameter(torch.rand(HIDDEN, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.magnitude * functional.normalize(self.weight, dim=1), self.bias)


def test_adapter_of_bare_parameters_in_a_subclass(tmp_path: Path) -> None:
    net, data = Net(AdapterParameters()), samples()
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, "first", parameters=[".*"])


# ------------------------------------------------------------------------------------------ a row is not a sample

ROWS = r"(?s)(?=.*(first|second|time|net))(?=.*rows)"


def blocks(module: Any, x: Tensor, copies: int) -> Tensor:
    """The network on copies of the batch, one after the other: ``(copies, B, *)``."""
    out = module.net(torch.cat([x * (1 + copy) for copy in range(copies)]))
    return out.unflatten(0, (copies, len(x)))


def guided(module: Any, batch: Sample, _: int) -> Tensor:
    """Guidance by picture and by text: three predictions of a sample in one pass."""
    none, picture, both = blocks(module, batch["x"], 3)
    return squared_error(none + 2 * (picture - none) + 3 * (both - picture), batch["y"]).mean()


def repeated(module: Any, batch: Sample, _: int) -> Tensor:
    """The batch at four timesteps in one pass; a sample's loss is their mean."""
    found = blocks(module, batch["x"], 4)
    return (found - batch["y"]).square().sum(-1).mean(0).mean()


def triplets(module: Any, batch: Sample, _: int) -> Tensor:
    """Anchor, positive and negative in one pass."""
    anchor, near, far = module.net(torch.cat([batch["x"], batch["y"], batch["z"]])).chunk(3)
    return functional.softplus((anchor - near).square().sum(1) - (anchor - far).square().sum(1)).mean()


def windows(module: Any, batch: Sample, _: int) -> Tensor:
    """A sample's windows are rows side by side."""
    x = batch["x"]  # (B, 3, WIDTH)
    found = module.net(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return (found - batch["y"]).square().sum((1, 2)).mean()


def beams(module: Any, batch: Sample, _: int) -> Tensor:
    """Each sample twice, side by side, with another noise."""
    x = batch["x"].repeat_interleave(2, 0)
    x = x + torch.tensor([0.0, 0.5], dtype=x.dtype).repeat(len(batch["x"]))[:, None]
    found = module.net(x).unflatten(0, (-1, 2)).mean(1)
    return squared_error(found, batch["y"]).mean()


def time_major(module: Any, batch: Sample, _: int) -> Tensor:
    """The network sees ``(T, B, WIDTH)``."""
    found = module.net(batch["x"].transpose(0, 1)).transpose(0, 1)
    return squared_error(found, batch["y"]).mean()


def side_by_side(rows: int, count: int) -> Tensor:
    """Rows of a sample lie side by side."""
    return torch.arange(rows) // (rows // count)


def losses_by(step: Callable[[Any, Any, int], Tensor], net: nn.Module, data: list[Sample]) -> Losses:
    """A sample's loss is the step's on a batch of it alone."""
    module = Training(net)
    return [
        lambda sample=sample: step(module, {name: value[None] for name, value in sample.items()}, 0) for sample in data
    ]


MANY_ROWS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], Any]] = {
    "guidance of three": (guided, (WIDTH,), 3),
    "four timesteps": (repeated, (WIDTH,), 4),
    "triplets": (triplets, (WIDTH,), 3),
    "windows": (windows, (3, WIDTH), side_by_side),
    "beams": (beams, (WIDTH,), side_by_side),
}


@pytest.mark.parametrize("count", [8, 7])
@pytest.mark.parametrize("way", MANY_ROWS)
def test_rows_that_are_more_than_the_samples_are_refused(tmp_path: Path, way: str, count: int) -> None:
    step, shape, _ = MANY_ROWS[way]
    net, data = Net(), samples(count, shape)
    assert_right_or_refused(tmp_path, Training(net, step), data, losses_by(step, net, data), ROWS)


@pytest.mark.parametrize("fisher", ["diagonal", "ekfac"])
@pytest.mark.parametrize("count", [8, 7])
@pytest.mark.parametrize("way", MANY_ROWS)
def test_rows_of_a_sample_that_are_said_are_right(tmp_path: Path, way: str, count: int, fisher: str) -> None:
    step, shape, rows = MANY_ROWS[way]
    net, data = Net(), samples(count, shape)
    losses = losses_by(step, net, data)
    settings = {"rows_per_sample": rows, "fisher": fisher}
    if fisher == "diagonal":
        assert_is_right(tmp_path, Training(net, step), data, losses, **settings)
    else:
        path = fitted(tmp_path, Training(net, step), data, {}, settings)
        assert_eigenvalues(load_fisher(path), net, losses[BATCH:], ["first", "second"])


@pytest.mark.parametrize("rows", [2, 3])
def test_rows_of_a_sample_that_are_said_wrongly_are_refused(tmp_path: Path, rows: int) -> None:
    net, data = Net(), samples()
    with pytest.raises(InputError, match=r"rows_per_sample"):
        fitted(tmp_path, Training(net, repeated), data, {}, {"rows_per_sample": rows})


@pytest.mark.parametrize("rows", [0, -1, 2.5, True, "2"])
def test_rows_of_a_sample_that_are_no_number_are_refused_at_once(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(InputError, match="rows_per_sample"):
        fitted(tmp_path, Training(Net()), samples(), {}, {"rows_per_sample": rows})


@pytest.mark.parametrize(
    "function",
    [
        lambda rows, count: torch.arange(rows),  # names samples that are not there
        lambda rows, count: torch.zeros(rows + 1, dtype=torch.long),
        lambda rows, count: torch.arange(rows) % count - 1,
        lambda rows, count: torch.rand(rows),
    ],
)
def test_function_from_rows_to_samples_that_is_wrong_is_refused(tmp_path: Path, function: Any) -> None:
    net, data = Net(), samples()
    with pytest.raises(InputError, match="rows_per_sample"):
        fitted(tmp_path, Training(net, repeated), data, {}, {"rows_per_sample": function})


def test_sequence_first_whose_length_is_now_and_then_that_of_the_batch(tmp_path: Path) -> None:
    """Two batches of four sequences of length four look right; the last, of two sequences, tells."""
    net, data = Net(), samples(10, (BATCH, WIDTH))
    assert_right_or_refused(tmp_path, Training(net, time_major), data, losses_by(time_major, net, data), ROWS)


def test_single_sequence_as_a_batch_of_rows(tmp_path: Path) -> None:
    net, data = Net(), samples(6, (3, WIDTH))
    loader: Any = DataLoader(data, batch_size=1)
    step = lambda module, batch, _: squared_error(module.net(batch["x"][0])[None], batch["y"]).mean()  # noqa: E731
    assert_right_or_refused(tmp_path, Training(net, step), loader, losses_by(step, net, data), ROWS)


def nested(batch: list[Sample]) -> dict[str, Any]:
    """Names first, then lists and dictionaries of tensors."""
    x, y = (torch.stack([sample[name] for sample in batch]) for name in ("x", "y"))
    return {"__key__": [f"sample {number}" for number in range(len(batch))], "views": [x, {"more": [2 * x, y]}]}


def as_pairs(batch: list[Sample]) -> tuple[Any, ...]:
    """WebDataset's tuples, texts first."""
    x, y = (torch.stack([sample[name] for sample in batch]) for name in ("x", "y"))
    return ["a caption that is longer than the batch"] * len(batch), x, y, 3


def ragged(batch: list[Sample]) -> dict[str, Any]:
    """A list of samples of several lengths, as collate functions for boxes and texts leave it."""
    return {
        "boxes": torch.zeros(11, 4),
        "x": [sample["x"].expand(2 + number, WIDTH) for number, sample in enumerate(batch)],
        "y": [sample["y"].expand(2 + number, WIDTH) for number, sample in enumerate(batch)],
    }


def nested_step(module: Any, batch: Any, _: int) -> Tensor:
    return squared_error(module.net(batch["views"][1]["more"][0]), batch["views"][1]["more"][1]).mean()


def pairs_step(module: Any, batch: Any, _: int) -> Tensor:
    return squared_error(module.net(batch[1]), batch[2]).mean()


def ragged_step(module: Any, batch: Any, _: int) -> Tensor:
    x, y = (nn.utils.rnn.pad_sequence(batch[name], batch_first=True) for name in ("x", "y"))
    kept = (y != 0).any(-1)
    return ((module.net(x) - y).square().sum(-1) * kept).sum(1).mean()


@pytest.mark.parametrize(("collate", "step"), [(nested, nested_step), (as_pairs, pairs_step), (ragged, ragged_step)])
def test_batches_of_nested_things_are_right(tmp_path: Path, collate: Any, step: Any) -> None:
    """The number of samples is not that of the first thing that has a length."""
    net, data = Net(), samples()
    loader: Any = DataLoader(data, batch_size=BATCH, collate_fn=collate)
    if collate is ragged:
        module = Training(net)
        losses: Losses = [lambda number=number: ragged_alone(module, data, number) for number in range(len(data))]
        assert_right_or_refused(tmp_path, Training(net, step), loader, losses, "samples|rows")
        return
    factor = 2 if collate is nested else 1
    losses = [
        lambda sample=sample: squared_error(net(factor * sample["x"][None]), sample["y"][None])[0] for sample in data
    ]
    assert_is_right(tmp_path, Training(net, step), loader, losses)


def ragged_alone(module: Any, data: list[Sample], number: int) -> Tensor:
    """A ragged sample without padding."""
    sample, length = data[number], 2 + number % BATCH
    x, y = (sample[name].expand(1, length, WIDTH) for name in ("x", "y"))
    out: Tensor = (module.net(x) - y).square().sum()
    return out


class Experts(Net):
    """A row goes to one of two layers, so that each sees some samples of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        out = torch.zeros(len(x), WIDTH, dtype=x.dtype)
        if chosen.any():
            out[chosen] = self.second(torch.tanh(self.first(x[chosen])))
        return out + 0 * x


class OneTime(Net):
    """One embedding of the timestep for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, HIDDEN, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(torch.ones(1, 1, dtype=x.dtype))
        out: Tensor = self.second(torch.tanh(self.first(x) + time))
        return out


class ChunkedTokens(Net):
    """Feed-forward by parts of the token axis: each part has all samples."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        size = 1 if self.axis == 1 else 2
        parts = [self.second(torch.tanh(self.first(part))) for part in x.split(size, self.axis)]
        return torch.cat(parts, self.axis)


class ChunkedBatch(ChunkedTokens):
    """Feed-forward by parts of the batch axis: each part has some samples."""

    axis = 0


@pytest.mark.parametrize("chosen", ["all", ["first"]])
def test_experts_that_see_some_of_the_samples(tmp_path: Path, chosen: Any) -> None:
    net, data = Experts(), samples()
    leaving = r"(?!)" if chosen == "all" else "second"
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, ROWS, leaving=leaving, parameters=chosen)


@pytest.mark.parametrize("chosen", ["all", ["time"]])
def test_one_row_that_all_samples_share(tmp_path: Path, chosen: Any) -> None:
    net, data = OneTime(), samples()
    leaving = r"(?!)" if chosen == "all" else "first|second"
    losses = plain_losses(net, data)
    assert_right_or_refused(tmp_path, Training(net), data, losses, ROWS, leaving=leaving, parameters=chosen)


@pytest.mark.parametrize("count", [8, 7])
def test_feed_forward_by_parts_of_the_batch(tmp_path: Path, count: int) -> None:
    net, data = ChunkedBatch(), samples(count, (3, WIDTH))
    assert_right_or_refused(tmp_path, Training(net), data, plain_losses(net, data), ROWS)


def test_feed_forward_by_parts_of_the_tokens_is_right(tmp_path: Path) -> None:
    net, data = ChunkedTokens(), samples(7, (3, WIDTH))
    assert_is_right(tmp_path, Training(net), data, plain_losses(net, data))


def test_anchor_positive_and_negative_in_three_calls_are_right(tmp_path: Path) -> None:
    net, data = Net(), samples(7)

    def step(module: Any, batch: Sample, _: int) -> Tensor:
        anchor, near, far = (module.net(batch[name]) for name in ("x", "y", "z"))
        return functional.softplus((anchor - near).square().sum(1) - (anchor - far).square().sum(1)).mean()

    # To the gradients it looks like real and generated pictures in one step; only the user knows that they are not.
    losses = losses_by(step, net, data)
    assert_is_right(tmp_path, Training(net, step), data, losses, rows_per_sample=3)
    assert_right_or_refused(tmp_path / "unsaid", Training(net, step), data, losses, ROWS)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_loop_over_parts_of_the_batch_with_one_backward_pass(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> Tensor:
        parts = zip(batch["x"].split(sizes), batch["y"].split(sizes), strict=True)
        return torch.stack([squared_error(module.net(x), y).sum() for x, y in parts]).sum() / BATCH

    assert_right_or_refused(tmp_path, Training(net, step), data, plain_losses(net, data), ROWS)


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_loop_over_parts_of_the_batch_with_a_backward_pass_each(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """As gradient caching does: one step of the optimizer, and each pass has other samples."""
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        for x, y in zip(batch["x"].split(sizes), batch["y"].split(sizes), strict=True):
            module.manual_backward(squared_error(module.net(x), y).sum() / BATCH)
        optimizer.step()

    module = Training(net, step, automatic=False)
    assert_right_or_refused(tmp_path, module, data, plain_losses(net, data), ROWS)


# --------------------------------------------------------------------------------- which backward passes count


def three_losses(module: Any, batch: Sample) -> list[Tensor]:
    """Three losses of the same samples: ``(B,)`` each."""
    out = module.net(batch["x"])
    return [squared_error(out, batch["y"]), out.abs().sum(1), out.pow(4).sum(1)]


@pytest.mark.parametrize("shared", [False, True])
def test_three_backward_passes_before_one_step(tmp_path: Path, shared: bool) -> None:
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        once = three_losses(module, batch)
        for number in range(3):
            loss = once[number] if shared else three_losses(module, batch)[number]
            module.manual_backward(loss.mean(), retain_graph=shared)
        optimizer.step()

    losses = losses_by(lambda module, batch, _: torch.stack(three_losses(module, batch)).sum(), net, data)
    module = Training(net, step, automatic=False)
    assert_right_or_refused(tmp_path, module, data, losses, "backward|step|first|second")


def both_layers(module: Any) -> list[torch.optim.Optimizer]:
    return [standing(module.net.first), standing(module.net.second)]


@pytest.mark.parametrize("turns", ["together", "by turns"])
def test_two_optimizers_of_one_network(tmp_path: Path, turns: str) -> None:
    """By turns, the first optimizer's loss leaves gradients in the second's layer, which are thrown away."""
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> None:
        first, second = module.optimizers()
        if turns == "together":
            module.manual_backward(squared_error(module.net(batch["x"]), batch["y"]).mean())
            first.step()
            second.step()
            module.net.zero_grad()
            return
        for number, optimizer in enumerate((first, second)):
            module.net.zero_grad()
            module.manual_backward(three_losses(module, batch)[number].mean())
            optimizer.step()

    module = Training(net, step, both_layers, automatic=False)
    if turns == "together":
        assert_is_right(tmp_path, module, data, plain_losses(net, data))
        return
    path = fitted_or_refused(tmp_path, module, data, "backward|step|optimizer|first|second")
    if path is None:
        return
    fisher = load_fisher(path)
    for number, layer in enumerate(("first", "second")):
        wanted = mean_squares(
            net, losses_by(lambda module, batch, _, n=number: three_losses(module, batch)[n].sum(), net, data)
        )
        for name in (f"{layer}.weight", f"{layer}.bias"):
            torch.testing.assert_close(fisher.tensors()[name] / len(data), wanted[name], msg=f"{name} {fisher.count}")


class Adversarial(Training):
    """The target is the critic; the generator's turn goes through it."""

    def __init__(self, net: nn.Module, step: Any) -> None:
        super().__init__(net, step, lambda module: [standing(module.generator), standing(module.net)], automatic=False)
        self.generator = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)


def turn(module: Any, batch: Sample, optimizer: Any, *, of_generator: bool) -> None:
    """One backward pass and step of either."""
    made = module.generator(batch["x"])
    if of_generator:
        module.manual_backward(module.net(made).square().sum(1).mean())
    else:
        module.manual_backward(squared_error(module.net(batch["y"]), batch["z"]).mean())
    optimizer.step()


def by_hand(module: Any, batch: Sample, _: int) -> None:
    """The critic's weights are frozen by hand in the generator's turn."""
    generators, critics = module.optimizers()
    module.net.requires_grad_(False)
    turn(module, batch, generators, of_generator=True)
    generators.zero_grad()
    module.net.requires_grad_(True)
    turn(module, batch, critics, of_generator=False)
    critics.zero_grad()


def thrown_away(module: Any, batch: Sample, _: int) -> None:
    """Nothing is frozen; what the generator's turn leaves in the critic is cleared before the critic's own."""
    generators, critics = module.optimizers()
    turn(module, batch, generators, of_generator=True)
    generators.zero_grad()
    critics.zero_grad()
    turn(module, batch, critics, of_generator=False)


def critic_first(module: Any, batch: Sample, _: int) -> None:
    """The generator's turn comes last, and the next batch begins by clearing what it left."""
    generators, critics = module.optimizers()
    critics.zero_grad()
    turn(module, batch, critics, of_generator=False)
    generators.zero_grad()
    turn(module, batch, generators, of_generator=True)


def detached(module: Any, batch: Sample, _: int) -> None:
    """The generator's turn works on a copy of the critic's output that is cut off; the critic alone is trained."""
    _, critics = module.optimizers()
    critics.zero_grad()
    made = module.generator(batch["x"]).detach()
    module.net(made)  # looked at, and not used
    turn(module, batch, critics, of_generator=False)


@pytest.mark.parametrize("step", [by_hand, thrown_away, critic_first, detached])
def test_critic_is_counted_in_its_own_turn_alone(tmp_path: Path, step: Any) -> None:
    net, data = Net(), samples()
    losses: Losses = [
        lambda sample=sample: squared_error(net(sample["y"][None]), sample["z"][None])[0] for sample in data
    ]
    assert_right_or_refused(tmp_path, Adversarial(net, step), data, losses, "backward|step|first|second")


@pytest.mark.parametrize("raw", ["before", "after", "alone now and then"])
def test_backward_pass_of_ones_own_beside_that_of_lightning(tmp_path: Path, raw: str) -> None:
    net, data = Net(), samples(12)

    def step(module: Any, batch: Sample, number: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        losses = three_losses(module, batch)
        if raw == "before":
            losses[0].mean().backward(retain_graph=True)
            module.manual_backward(losses[1].mean())
        elif raw == "after":
            module.manual_backward(losses[0].mean(), retain_graph=True)
            losses[1].mean().backward()
        elif number == 1:
            (losses[0] + losses[1]).mean().backward()
        else:
            module.manual_backward((losses[0] + losses[1]).mean())
        optimizer.step()

    losses = losses_by(lambda module, batch, _: torch.stack(three_losses(module, batch)[:2]).sum(), net, data)
    module = Training(net, step, automatic=False)
    assert_right_or_refused(tmp_path, module, data, losses, "backward|first|second")


def test_backward_pass_that_is_thrown_away(tmp_path: Path) -> None:
    net, data = Net(), samples()

    def step(module: Any, batch: Sample, _: int) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(three_losses(module, batch)[2].mean())
        optimizer.zero_grad()
        module.manual_backward(three_losses(module, batch)[0].mean())
        optimizer.step()

    module = Training(net, step, automatic=False)
    assert_right_or_refused(tmp_path, module, data, plain_losses(net, data), "backward|step|first|second")


@pytest.mark.parametrize("every", [2, 3])
def test_accumulation_by_hand_over_batches(tmp_path: Path, every: int) -> None:
    """Each batch has samples of its own; 24 samples are 6 batches, so no batch is left over."""
    net, data = Net(), samples(24)

    def step(module: Any, batch: Sample, number: int) -> None:
        module.manual_backward(plain_step(module, batch, number))
        if (number + 1) % every == 0:
            module.optimizers().step()
            module.optimizers().zero_grad()

    module = Training(net, step, automatic=False)
    assert_is_right(tmp_path, module, data, plain_losses(net, data))


def test_batches_whose_step_is_skipped(tmp_path: Path) -> None:
    """A guard against outliers: every other batch's gradients are thrown away."""
    net, data = Net(), samples(16)

    def step(module: Any, batch: Sample, number: int) -> None:
        module.manual_backward(plain_step(module, batch, number))
        if number % 2 == 0:
            module.optimizers().step()
        module.optimizers().zero_grad()

    kept = [sample for number, sample in enumerate(data) if (number // BATCH) % 2 == 0]
    module = Training(net, step, automatic=False)
    assert_right_or_refused(tmp_path, module, data, plain_losses(net, kept), "backward|step|first|second")


def test_sharpness_aware_minimization(tmp_path: Path) -> None:
    """The first backward pass finds a direction; only the second, at the moved weights, makes the step."""
    net, data = Net(), samples()
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.05)

    def step(module: Any, batch: Sample, number: int) -> None:
        optimizer = module.optimizers()
        module.manual_backward(plain_step(module, batch, number))
        optimizer.zero_grad()
        before = [parameter.detach().clone() for parameter in module.net.parameters()]
        with torch.no_grad():
            for parameter in module.net.parameters():
                parameter.add_(0.05)
        module.manual_backward(plain_step(module, batch, number))
        with torch.no_grad():
            for parameter, old in zip(module.net.parameters(), before, strict=True):
                parameter.copy_(old)
        optimizer.step()
        optimizer.zero_grad()

    path = fitted_or_refused(
        tmp_path, Training(net, step, automatic=False), data, "backward|step|optimizer|first|second"
    )
    if path is None:
        return
    assert_right(path, moved, plain_losses(moved, data))
