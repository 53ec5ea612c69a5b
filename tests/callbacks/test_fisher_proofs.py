"""What the accumulator must prove before it counts: each kind of training is counted right, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from reference import per_sample_gradients, sums_of_squares
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher, load_fisher
from lightning_unlearn.weights.capture import GradientCapture, Use
from lightning_unlearn.weights.growth import GradientGrowth

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

functional = nn.functional
Pair = dict[str, Tensor]
Step = Callable[[Any, Any], Any]
BATCH, WIDTH = 4, 5


def pairs(count: int = 8, *shape: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)  # noqa: E731
    return [{"x": draw(), "y": draw()} for _ in range(count)]


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH)).double()


def error(found: Tensor, wanted: Tensor) -> Tensor:
    """A sample's squared error ``(B,)``."""
    return (found - wanted).square().flatten(1).sum(1)


def plain(module: Any, batch: Pair) -> Tensor:
    return error(module.net(batch["x"]), batch["y"]).mean()


class Training(LightningModule):
    """Weights that stand still, so that a reference needs no history."""

    def __init__(self, net: nn.Module, step: Step = plain, manual: bool = False, parts: Any = None) -> None:
        super().__init__()
        self.net, self.step, self.parts = net, step, parts
        self.automatic_optimization = not manual

    def training_step(self, batch: Pair, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.parts or [self.net])]


def fit(folder: Path, module: LightningModule, data: Any, trainer: Any = None, **settings: Any) -> FisherAccumulator:
    ours = FisherAccumulator(**{"target": "net", "parameters": "all", "fisher": "diagonal", **settings})
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options: dict[str, Any] = {"max_epochs": 1, "enable_model_summary": False, **quiet, **(trainer or {})}
    callbacks = [ours, *options.pop("callbacks", [])]
    Trainer(accelerator="cpu", devices=1, default_root_dir=folder, callbacks=callbacks, **options).fit(
        module, DataLoader(data, batch_size=BATCH)
    )
    return ours


def assert_right(folder: Path, net: nn.Module, loss_of: Callable[[Pair], Tensor], data: list[Pair]) -> Fisher:
    """Mean squared gradients are those of one backward pass a sample in float64."""
    fisher = load_fisher(folder / "fisher.safetensors")

    def loss(row: int) -> Tensor:
        return loss_of({name: value[None] for name, value in data[row].items()}).sum()

    sums = sums_of_squares(per_sample_gradients(loss, dict(net.named_parameters()), len(data)))
    assert fisher.count == len(data)
    for name, found in fisher.tensors().items():
        torch.testing.assert_close(found.double(), sums[name], rtol=1e-9, atol=1e-12 * float(sums[name].max()))
    return fisher


def refused(folder: Path, module: LightningModule, data: Any, says: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=says) as caught:
        fit(folder, module, data, **settings)
    assert "\n" not in str(caught.value)
    assert not (folder / "fisher.safetensors").exists()


# --- a layer is what it seems


class Equalised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, 0.1 * self.weight, self.bias)


class Renamed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class Twice(nn.Module):
    """A weight that is used once more, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.into(x)) @ self.into.weight


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attend(x, x, x, need_weights=False)[0]
        return found


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.down = nn.Parameter(torch.randn(2, WIDTH))
        self.up = nn.Parameter(torch.randn(WIDTH, 2))
        self.weight.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


def replaced() -> nn.Module:
    net = network()
    before = net[0].forward
    net[0].forward = lambda x: 0.5 * before(x)
    return net


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    net[2].weight = net[0].weight
    return net


def penalised(module: Any, batch: Pair) -> Tensor:
    x = batch["x"].clone().requires_grad_(True)
    return error(torch.autograd.grad(module.net(x).sum(), x, create_graph=True)[0], batch["y"]).mean()


@pytest.mark.parametrize(
    ("net", "settings", "says"),
    [
        (lambda: nn.Sequential(Equalised(WIDTH, WIDTH)), {}, r"layer 0 .*norm .* grew by .*Equalised"),
        (replaced, {}, "layer 0 .*forward was replaced"),
        (Twice, {}, "layer into .*used elsewhere"),
        (tied, {"parameters": ["0"]}, "layer 0 .*tied"),
        (tied, {"parameters": [".*"]}, "Layers 0 and 2 share a weight"),
        (Attention, {}, r"attend\.out_proj .*never called"),
        (lambda: nn.Sequential(Adapted()), {}, r"Layer 0 is a Adapted .*\(down, up\)"),
        (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))), {}, "Layer 0|layer 0 .*weight_norm"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
            {},
            "layer 0 is computed from other parameters",
        ),
        (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)), {}, "BatchNorm1d 1 of 'net'"),
    ],
)
def test_layer_that_is_not_what_it_seems_is_refused(tmp_path: Path, net: Any, settings: Any, says: str) -> None:
    shape = (3,) if net is Attention else ()
    refused(tmp_path, Training(net().double()), pairs(8, *shape), says, **settings)


def test_double_backward_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, Training(network(), penalised), pairs(), r"layer \d .*double backward")


def test_layer_that_changes_in_the_middle_is_refused_then(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> Tensor:
        if module.global_step == 1:
            before = module.net[0].forward
            module.net[0].forward = lambda x: 0.5 * before(x)
        return plain(module, batch)

    refused(tmp_path, Training(network(), step), pairs(), "layer 0 .*replaced")


def test_subclass_whose_forward_is_the_layers_own_and_a_users_hook_are_right(tmp_path: Path) -> None:
    net = nn.Sequential(Renamed(WIDTH, 6), nn.Tanh(), nn.Linear(6, WIDTH)).double()
    net[0].register_forward_hook(lambda layer, given, found: 3 * found)
    fit(tmp_path, Training(net), pairs())
    assert_right(tmp_path, net, lambda sample: error(net(sample["x"]), sample["y"]), pairs())


def test_block_that_was_compiled_before_is_refused_or_right(tmp_path: Path) -> None:
    net = network()
    net[0].compile(backend="eager")
    net(torch.zeros(BATCH, WIDTH, dtype=torch.float64))
    refusal = ""
    try:
        fit(tmp_path, Training(net), pairs())
    except InputError as caught:
        refusal = str(caught)
    if refusal:
        assert "layer 0" in refusal
    else:
        assert_right(tmp_path, net, lambda sample: error(net(sample["x"]), sample["y"]), pairs())


# --- the check's tolerance is that of rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 30, 3000])
def test_rounding_passes_and_a_tenth_too_much_does_not(dtype: torch.dtype, rows: int) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        layer = nn.Linear(7, 9).to(dtype)
        growth, capture = GradientGrowth({"layer": layer}), GradientCapture({"layer": layer})
        growth.attach()
        capture.attach()
        layer(torch.randn(rows, 3, 7, dtype=dtype)).float().square().mean().mul(64).backward()
        uses, grown = capture.take_uses(), growth.take()
        ratios, names = growth.differences({"layer": growth.summed("layer", uses["layer"])}, grown)
        assert names == [("layer", "weight"), ("layer", "bias")]
        assert float(ratios.max()) < 1, (dtype, rows, ratios)
        (use,) = uses["layer"]
        more = {"layer": growth.summed("layer", [Use(0, 0, use.layer.scaled(1.1), dtype)])}
        assert float(growth.differences(more, grown)[0].min()) > 1, (dtype, rows)


# --- a row is a sample


def doubled(module: Any, batch: Pair) -> Tensor:
    given, empty = module.net(torch.cat([batch["x"], 0 * batch["x"]])).chunk(2)
    return error(empty + 3 * (given - empty), batch["y"]).mean()


def flattened(module: Any, batch: Pair) -> Tensor:
    found = module.net(batch["x"].flatten(0, 1)).unflatten(0, batch["x"].shape[:2])
    return error(found, batch["y"]).mean()


def two_calls(module: Any, batch: Pair) -> Tensor:
    return (error(module.net(batch["x"]), batch["y"]) * error(module.net(batch["y"]), batch["x"])).mean()


TOGETHER = lambda rows, samples: torch.arange(rows) // (rows // samples)  # noqa: E731


@pytest.mark.parametrize(
    ("step", "shape", "says", "rows"),
    [
        (doubled, (), "saw 8 rows for the 4 samples .*rows_per_sample", 2),
        (flattened, (3,), "saw 12 rows for the 4 samples .*rows_per_sample", TOGETHER),
        (two_calls, (), "called 2 times .*rows_per_sample=2", 2),
    ],
)
@pytest.mark.parametrize("count", [8, 7])
def test_rows_that_are_not_samples_are_refused_until_they_are_said(
    tmp_path: Path, step: Step, shape: tuple[int, ...], says: str, rows: Any, count: int
) -> None:
    data = pairs(count, *shape)
    refused(tmp_path, Training(network(), step), data, says)
    module = Training(network(), step)
    fit(tmp_path, module, data, rows_per_sample=rows)
    assert_right(tmp_path, module.net, lambda sample: step(module, sample), data)


def test_real_and_generated_rows_are_samples_of_their_own_where_that_is_said(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> Tensor:
        return functional.softplus(-module.net(batch["x"]).sum(1)).mean() + module.net(batch["y"]).sum(1).exp().mean()

    refused(tmp_path, Training(network(), step), pairs(), "real and generated")
    module = Training(network(), step)
    fit(tmp_path, module, pairs(), rows_per_sample=1)
    singles = [{"x": pair["x"], "real": torch.ones(())} for pair in pairs()]
    singles += [{"x": pair["y"], "real": torch.zeros(())} for pair in pairs()]
    assert_right(
        tmp_path,
        module.net,
        lambda one: (
            functional.softplus(-module.net(one["x"]).sum(1))
            if one["real"].any()
            else module.net(one["x"]).sum(1).exp()
        ),
        singles,
    )


def test_batch_in_parts_and_rows_of_a_layer_in_parts_are_right(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> Tensor:
        return error(torch.cat([module.net(part) for part in batch["x"].split([1, 3])]), batch["y"]).mean()

    module = Training(network(), step)
    fit(tmp_path, module, pairs())
    assert_right(tmp_path, module.net, lambda one: error(module.net(one["x"]), one["y"]), pairs())


def test_sequence_first_and_uncertain_batches_are_refused(tmp_path: Path) -> None:
    def first(module: Any, batch: Pair) -> Tensor:
        return error(module.net(batch["x"].transpose(0, 1)).transpose(0, 1), batch["y"]).mean()

    refused(tmp_path, Training(network(), first), pairs(8, 3), "saw 3 rows for the 4 samples .*another axis first")
    uncertain = [{**pair, "table": torch.zeros(2)} for pair in pairs()]

    def unstacked(module: Any, batch: Any) -> Tensor:
        batch["more"] = None
        return plain(module, batch)

    loader = DataLoader(
        uncertain,
        batch_size=BATCH,
        collate_fn=lambda many: {  # type: ignore[arg-type]
            "x": torch.stack([one["x"] for one in many]),
            "y": torch.stack([one["y"] for one in many]),
            "t": torch.zeros(9),
        },
    )
    with pytest.raises(InputError, match=r"not certain .*begin with 4 and 9"):
        fit_loader(tmp_path, Training(network(), unstacked), loader)


def fit_loader(folder: Path, module: LightningModule, loader: Any) -> None:
    ours = FisherAccumulator("net", "all", "diagonal")
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=[ours],
    ).fit(module, loader)


# --- which backward passes count


def test_passes_before_one_step_count_together_and_those_without_a_step_not(tmp_path: Path) -> None:
    generator = nn.Linear(WIDTH, WIDTH).double()

    def step(module: Any, batch: Pair) -> None:
        ours, other = module.optimizers()
        module.manual_backward(error(module.net(generator(batch["x"])), batch["y"]).mean())  # the generator's turn
        other.step()
        ours.zero_grad()
        module.manual_backward(plain(module, batch))
        module.manual_backward(module.net(batch["x"]).abs().sum(1).mean())
        ours.step()

    module = Training(network(), step, manual=True, parts=None)
    module.parts = [module.net, generator]
    fit(tmp_path, module, pairs())
    assert_right(
        tmp_path,
        module.net,
        lambda one: error(module.net(one["x"]), one["y"]) + module.net(one["x"]).abs().sum(1),
        pairs(),
    )


def test_weights_that_are_toggled_off_count_nothing(tmp_path: Path) -> None:
    generator = nn.Linear(WIDTH, WIDTH).double()

    def step(module: Any, batch: Pair) -> None:
        ours, other = module.optimizers()
        module.toggle_optimizer(other)
        module.manual_backward(error(module.net(generator(batch["x"])), batch["y"]).mean())
        other.step()
        module.untoggle_optimizer(other)
        module.toggle_optimizer(ours)
        module.manual_backward(plain(module, batch))
        ours.step()
        module.untoggle_optimizer(ours)
        module.zero_grad()

    module = Training(network(), step, manual=True)
    module.generator, module.parts = generator, [module.net, generator]
    fit(tmp_path, module, pairs())
    assert_right(tmp_path, module.net, lambda one: error(module.net(one["x"]), one["y"]), pairs())


def test_batches_that_one_step_takes_count_by_themselves_and_a_last_one_without_step_not(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> None:
        module.manual_backward(plain(module, batch))
        module.batches = getattr(module, "batches", 0) + 1
        if module.batches % 2 == 0:
            module.optimizers().step()
            module.optimizers().zero_grad()

    module = Training(network(), step, manual=True)
    fit(tmp_path, module, pairs(20))  # five batches
    assert_right(tmp_path, module.net, lambda one: error(module.net(one["x"]), one["y"]), pairs(20)[:16])


def test_backward_beside_manual_backward_is_refused(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> None:
        plain(module, batch).backward()
        module.manual_backward(0.1 * plain(module, batch))
        module.optimizers().step()
        module.optimizers().zero_grad()

    refused(tmp_path, Training(network(), step, manual=True), pairs(), r"loss\.backward\(\)")


def test_optimizers_that_take_turns_on_parts_of_the_layers_are_refused(tmp_path: Path) -> None:
    def step(module: Any, batch: Pair) -> None:
        for optimizer in module.optimizers():
            module.net.zero_grad()
            module.manual_backward(plain(module, batch))
            optimizer.step()

    module = Training(network(), step, manual=True)
    module.parts = [module.net[0], module.net[2]]
    refused(tmp_path, module, pairs(), "Several optimizers")


def test_lbfgs_is_refused(tmp_path: Path) -> None:
    class Repeating(Training):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.net.parameters())

    refused(tmp_path, Repeating(network()), pairs(), "LBFGS")


# --- scales


def test_factor_of_a_backward_of_ones_own_is_refused_until_it_is_said(tmp_path: Path) -> None:
    class Own(Training):
        def backward(self, loss: Tensor, *arguments: Any) -> None:
            (128 * loss).backward()

    refused(tmp_path, Own(network()), pairs(), r"multiplies the loss by 128.*loss_scale=128")
    module = Own(network())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, module, pairs(), loss_scale=128.0)
    assert not [warned for warned in said if "multiplies" in str(warned.message)]
    # With another it may be right, if the loss has a factor of its own, and is told once.
    with pytest.warns(UserWarning, match="multiplies the loss by 128 itself.*loss_scale=2") as told:
        fit(tmp_path, Own(network()), pairs(), path="other.safetensors", loss_scale=2.0)
    assert len([warned for warned in told if "multiplies" in str(warned.message)]) == 1
    assert_right(tmp_path, module.net, lambda one: error(module.net(one["x"]), one["y"]), pairs())


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_prior_preservation_is_right_by_the_documented_words(tmp_path: Path, weight: float) -> None:
    def step(module: Any, batch: Pair) -> Tensor:
        mine, prior = error(module.net(batch["x"]), batch["y"]).chunk(2)
        module.shares = torch.tensor([2.0, 2.0, 2.0 * weight, 2.0 * weight], dtype=torch.float64)
        return mine.mean() + weight * prior.mean()

    module = Training(network(), step)
    said: dict[str, Any] = {"loss_scale": 2.0} if weight == 1 else {"sample_weights": "shares"}
    fit(tmp_path, module, pairs(), **said)
    assert_right(tmp_path, module.net, lambda one: error(module.net(one["x"]), one["y"]), pairs())


# --- inputs


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:  # the reference's
            x = x + self.one(x)
            return x + self.two(torch.tanh(x))
        x = x.clone()
        x += self.one(x)
        x += self.two(torch.tanh(x))
        return x


def test_input_that_is_changed_in_place_under_autocast_is_the_one_that_was_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [{name: value.float() for name, value in pair.items()} for pair in pairs()]
    module = Training(InPlace())
    fit(tmp_path, module, data, trainer={"precision": "bf16-mixed"})
    fisher = load_fisher(tmp_path / "fisher.safetensors")
    exact = module.net.double()
    rows = pairs()
    sums = sums_of_squares(
        per_sample_gradients(
            lambda row: error(exact(rows[row]["x"][None]), rows[row]["y"][None]).sum(),
            dict(exact.named_parameters()),
            8,
        )
    )
    for name, found in fisher.tensors().items():
        # Each of the few products on the way is rounded to 2⁻⁹; what was changed is off by its whole size.
        assert float((found.double() - sums[name]).norm() / sums[name].norm()) < 12 * 2.0**-8, name


def test_inputs_are_kept_by_autograds_own_means_which_checkpointing_takes_over() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(3, WIDTH)
    packed: list[int] = []

    def pack(tensor: Tensor) -> str:
        packed.append(tensor.data_ptr())
        return "nothing is held"

    with GradientCapture({"layer": layer}) as capture:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda name: x):
            found = layer(x)
        assert packed.count(x.data_ptr()) == 2  # the layer's own, and ours
        found.square().sum().backward()
    assert torch.equal(capture.take()["layer"].inputs[:, 0], x)


# --- windows


def test_training_that_ends_before_the_eigenvalues_leaves_those_of_the_product(tmp_path: Path) -> None:
    class Stopping(Training):
        def training_step(self, batch: Pair, batch_idx: int) -> Any:
            self.log("constant", torch.ones(()), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    stop = EarlyStopping("constant", patience=1, check_on_train_epoch_end=True)
    module = Stopping(network())
    with pytest.warns(UserWarning, match="EarlyStopping may end training before"):
        fit(tmp_path, module, pairs(), trainer={"max_epochs": 50, "callbacks": [stop]}, fisher="ekfac")
    fisher = load_fisher(tmp_path / "fisher.safetensors")
    assert "K-FAC" in fisher.provenance["eigenvalues"]
    assert fisher.count == 16
    rows = pairs()
    gradients = per_sample_gradients(
        lambda row: error(module.net(rows[row]["x"][None]), rows[row]["y"][None]).sum(),
        dict(module.net.named_parameters()),
        8,
    )
    for layer in ("0", "2"):
        trace = sum(float(gradients[f"{layer}.{kind}"].square().sum()) for kind in ("weight", "bias")) / 8
        found = fisher.tensors()[f"eigenvalues/{layer}"].double() / fisher.count
        assert float(found.sum()) == pytest.approx(trace, rel=1e-9)
        assert int(torch.linalg.matrix_rank(found, rtol=1e-9)) == 1


def test_two_windows_of_one_network_go_together(tmp_path: Path) -> None:
    module = Training(network())
    later = FisherAccumulator("net", "all", "diagonal", path="later.safetensors", start_epoch=1)
    fit(tmp_path, module, pairs(), trainer={"max_epochs": 2, "callbacks": [later]})
    assert load_fisher(tmp_path / "fisher.safetensors").count == 16
    assert load_fisher(tmp_path / "later.safetensors").count == 8


def test_sums_of_a_fit_in_other_processes_are_where_the_message_says(tmp_path: Path) -> None:
    ours = FisherAccumulator("net", "all", "diagonal", path="mine.safetensors")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[ours],
    )
    trainer.fit(Training(network()), DataLoader(pairs(), batch_size=2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"mine\.safetensors"):
        ours.total()
    assert load_fisher(tmp_path / "mine.safetensors").count == 8
