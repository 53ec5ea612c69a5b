from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from processes import run_ranks
from reference import per_sample_gradients, sums_of_squares
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import DIM, LATENT, TOKENS, ToyDenoiser, ToyObjective, tiny_unet

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher, load_fisher
from lightning_unlearn.weights.parameters import layer_parameters, select_layers

Batch = dict[str, Tensor]

# Lightning's advice on this machine's loaders, loggers and step counts is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def accumulator_of(*names: Any, **settings: Any) -> FisherAccumulator:
    """An accumulator of the diagonal Fisher, by which what all kinds share is shown."""
    return FisherAccumulator(*names, **{"fisher": "diagonal", **settings})


def samples(count: int = 8, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(11)
    return [
        {
            "latents": torch.randn(LATENT, generator=generator, dtype=dtype),
            "text": torch.randn(TOKENS, DIM, generator=generator, dtype=dtype),
            "timestep": torch.randint(0, 10, (), generator=generator),
            "noise": torch.randn(LATENT, generator=generator, dtype=dtype),
            "weight": torch.tensor(float(number % 3), dtype=dtype),
        }
        for number in range(count)
    ]


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    return ToyObjective()(
        network, ViewBatch(batch["latents"], {"text": batch["text"]}), batch["timestep"], batch["noise"]
    )


class SomebodysModule(LightningModule):
    """A training that knows nothing of this package; it writes down its weights and samples, for the reference."""

    def __init__(self, learning_rate: float = 0.1, reduction: str = "mean", scale: float = 1.0) -> None:
        super().__init__()
        self.unet: nn.Module = ToyDenoiser().double()
        self.learning_rate = learning_rate
        self.reduction = reduction
        self.scale = scale
        self.seen: list[tuple[dict[str, Tensor], Batch]] = []

    def write_down(self, batch: Batch) -> None:
        weights = {name: tensor.detach().clone() for name, tensor in self.unet.state_dict().items()}
        self.seen.append((weights, {name: tensor.clone() for name, tensor in batch.items()}))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.write_down(batch)
        losses = loss_of(self.unet, batch)  # (B,)
        return self.scale * (losses.mean() if self.reduction == "mean" else losses.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def expected_sums(
    seen: list[tuple[dict[str, Tensor], Batch]], parameters: Any = "all"
) -> tuple[dict[str, Tensor], int]:
    """Sums of squared gradients, and the number of samples: a backward pass a sample, at the weights of its step."""
    sums: dict[str, Tensor] = {}
    count = 0
    for weights, batch in seen:
        network = ToyDenoiser().double()
        network.load_state_dict(weights)
        chosen = layer_parameters(select_layers(network, parameters))
        rows = len(batch["latents"])

        def loss(row: int, network: nn.Module = network, batch: Batch = batch) -> Tensor:
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in one.items()}
            return loss_of(network, wide)[0]

        for name, total in sums_of_squares(per_sample_gradients(loss, chosen, rows)).items():
            sums[name] = sums.get(name, 0) + total
        count += rows
    return sums, count


def assert_sums(fisher: Fisher, expected: Mapping[str, Tensor], count: int, rtol: float = 1e-6) -> None:
    assert fisher.count == count
    assert set(fisher.tensors()) == set(expected)
    for name, total in expected.items():
        found = fisher.tensors()[name].double()
        torch.testing.assert_close(
            found, total, rtol=rtol, atol=1e-3 * rtol * float(total.max()), msg=f"{name} {found} {total}"
        )


def trainer_for(tmp_path: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    one = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path}
    return Trainer(callbacks=list(callbacks), **{**one, **quiet, **settings})


def loader(data: list[Batch], batch_size: int = 3) -> DataLoader[Batch]:
    return DataLoader(data, batch_size=batch_size)  # type: ignore[arg-type]


def fit(
    tmp_path: Path,
    module: LightningModule,
    accumulator: FisherAccumulator | None = None,
    data: list[Batch] | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> Fisher:
    """Train, and read the file that the callback wrote."""
    accumulator = accumulator or accumulator_of(parameters="all")
    callbacks = settings.pop("callbacks", [])
    trainer = trainer_for(tmp_path, accumulator, *callbacks, **settings)
    trainer.fit(module, loader(samples() if data is None else data), ckpt_path=ckpt_path)
    return load_fisher(tmp_path / accumulator.path)


def hooks_of(module: nn.Module) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in module.modules()
    )


# --- nothing of the training changes


class Random(SomebodysModule):
    """Dropout, random noise and momentum: any stray draw or bit would show in the weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3)).to(
            dtype
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in self.unet.parameters():
                nn.init.normal_(parameter, std=0.3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.unet(batch["latents"] + torch.randn_like(batch["latents"])).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_weights_and_random_state_are_bit_for_bit_those_of_a_training_without_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    ends = []
    for callbacks in ([], [accumulator_of(parameters="all")]):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        module = Random(torch.float32)
        trainer = trainer_for(tmp_path, *callbacks, max_epochs=3, **settings)
        shuffled = DataLoader(samples(dtype=torch.float32), batch_size=3, shuffle=True)  # type: ignore[arg-type]
        trainer.fit(module, shuffled)
        states = (torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64)), random.getstate())
        ends.append((module.state_dict(), states, trainer.callback_metrics["loss"]))
    (weights, states, loss), (watched, watched_states, watched_loss) = ends
    assert all(torch.equal(watched[name], tensor) for name, tensor in weights.items())
    assert torch.equal(states[0], watched_states[0])
    assert torch.equal(states[1], watched_states[1])
    assert states[2] == watched_states[2]
    assert torch.equal(loss, watched_loss)
    assert (tmp_path / "fisher.safetensors").is_file()


# --- the sums are those of each sample's own loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_epochs": 2},
        {"accumulate_grad_batches": 2},  # 3 batches: the last accumulation of the epoch is of one batch
        {"accumulate_grad_batches": 5, "max_epochs": 2},  # never full
        {"gradient_clip_val": 1e-3},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
        {"precision": "64-true"},
        {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_model_summary": None},
    ],
    ids=str,
)
def test_mean_over_the_batch_accumulation_and_clipping_are_undone(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.get("barebones"):
        settings = {"barebones": True}
    module = SomebodysModule()
    accumulator = accumulator_of(parameters="all")
    if "barebones" in settings:
        trainer = Trainer(
            callbacks=[accumulator],
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=tmp_path,
            barebones=True,
        )
        trainer.fit(module, loader(samples()))
        fisher = load_fisher(tmp_path / "fisher.safetensors")
    else:
        fisher = fit(tmp_path, module, accumulator, **settings)
    sums, count = expected_sums(module.seen)
    assert count == 8 * settings.get("max_epochs", 1)
    assert_sums(fisher, sums, count)
    first, last = module.seen[0][0], module.seen[-1][0]
    moved = any(not torch.equal(first[name], last[name]) for name in first)
    assert moved or settings.get("accumulate_grad_batches") == 5  # the reference follows the weights


@pytest.mark.parametrize("scale", [1.0, 1e-3, -7.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_that_is_a_sum_or_scaled_is_undone(tmp_path: Path, reduction: Any, scale: float) -> None:
    module = SomebodysModule(1e-3, reduction, scale)
    fisher = fit(tmp_path, module, accumulator_of(parameters="all", reduction=reduction, loss_scale=scale))
    assert_sums(fisher, *expected_sums(module.seen))


class Weighted(SomebodysModule):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        kept = batch["weight"] != 0
        self.write_down({name: tensor[kept] for name, tensor in batch.items()})
        self.snr_weights = batch["weight"]
        return (loss_of(self.unet, batch) * self.snr_weights).mean()


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_sample_weights_are_undone_and_samples_of_weight_zero_left_out(tmp_path: Path, settings: Any) -> None:
    module = Weighted()
    fisher = fit(tmp_path, module, accumulator_of(parameters="all", sample_weights="snr_weights"), **settings)
    sums, count = expected_sums(module.seen)
    assert count == 5  # of 8 samples, 0, 3 and 6 weigh nothing
    assert_sums(fisher, sums, count)


def test_batches_are_chosen_by_step_epoch_and_every_n(tmp_path: Path) -> None:
    # 3 batches an epoch, one optimizer step each.
    for settings, taken in (
        ({"start_step": 4}, [4, 5, 6, 7, 8]),
        ({"start_epoch": 2}, [6, 7, 8]),
        ({"start_step": 7, "start_epoch": 1}, [7, 8]),
        ({"every_n_batches": 2}, [0, 2, 3, 5, 6, 8]),
        ({"every_n_batches": 2, "start_epoch": 1, "start_step": 4}, [5, 6, 8]),
    ):
        module = SomebodysModule()
        fisher = fit(tmp_path, module, accumulator_of(parameters="all", **settings), max_epochs=3)
        assert_sums(fisher, *expected_sums([module.seen[batch] for batch in taken]))
        assert fisher.provenance["steps"] == [taken[0], taken[-1]]


def test_another_rule_for_batches_is_one_method(tmp_path: Path) -> None:
    class Odd(FisherAccumulator):
        def should_capture(self, step: int, epoch: int, batch_idx: int) -> bool:
            return step % 2 == 1

    module = SomebodysModule()
    fisher = fit(tmp_path, module, Odd(parameters="all", fisher="diagonal"), max_epochs=2)
    assert_sums(fisher, *expected_sums(module.seen[1::2]))


def test_only_the_chosen_layers_are_collected(tmp_path: Path) -> None:
    module = SomebodysModule()
    fisher = fit(tmp_path, module, accumulator_of(parameters=["text", "conv_out"]))
    assert set(fisher.layers) == {"text", "conv_out"}
    assert_sums(fisher, *expected_sums(module.seen, ["text", "conv_out"]))


class InPrecision(SomebodysModule):
    def __init__(self, learning_rate: float = 0.0) -> None:
        super().__init__(learning_rate)
        self.unet = self.unet.float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.write_down(batch)
        return loss_of(self.unet, batch).mean()


def relative_error(fisher: Fisher, expected: Mapping[str, Tensor]) -> float:
    return max(float((fisher.tensors()[name] - total).norm() / total.norm()) for name, total in expected.items())


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-5), ("bf16-mixed", 0.03), ("bf16-true", 0.1)])
def test_lower_precision_is_summed_in_float32_and_close(tmp_path: Path, precision: str, bound: float) -> None:
    module = InPrecision()
    fisher = fit(tmp_path, module, data=samples(dtype=torch.float32), precision=precision)
    assert {tensor.dtype for tensor in fisher.tensors().values()} == {torch.float32}
    sums, count = expected_sums(module.seen)
    assert fisher.count == count
    assert relative_error(fisher, sums) < bound


# --- GradScaler


class ScalerWithoutAutocast(MixedPrecision):
    """Lightning's own use of a real GradScaler, in the network's own precision."""

    def autocast_context_manager(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


def scaler(scale: float = 2.0**10, **settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **settings)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}], ids=str)
def test_gradscaler_is_undone_also_when_its_scale_changes(tmp_path: Path, settings: dict[str, Any]) -> None:
    module = SomebodysModule()
    growing = scaler(growth_interval=1)  # doubles after every step
    plugin = ScalerWithoutAutocast("16-mixed", "cpu", growing)
    fisher = fit(tmp_path, module, max_epochs=2, plugins=plugin, **settings)
    assert growing.get_scale() > 2.0**10
    assert_sums(fisher, *expected_sums(module.seen))


def test_float16_with_a_gradscaler_is_close(tmp_path: Path) -> None:
    module = InPrecision()
    plugin = MixedPrecision("16-mixed", "cpu", scaler())
    fisher = fit(tmp_path, module, data=samples(dtype=torch.float32), plugins=plugin)
    sums, count = expected_sums(module.seen)
    assert fisher.count == count
    assert relative_error(fisher, sums) < 0.01


def test_batch_whose_gradient_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    data = samples()
    data[4]["noise"][0, 0, 0] = 1e308  # in the second batch; the gradient overflows only once it is scaled
    module = SomebodysModule()
    shrinking = scaler()
    fisher = fit(tmp_path, module, data=data, plugins=ScalerWithoutAutocast("16-mixed", "cpu", shrinking))
    assert shrinking.get_scale() == 2.0**9  # the GradScaler skipped that step, too
    assert_sums(fisher, *expected_sums([module.seen[0], module.seen[2]]))
    assert fisher.provenance["skipped_batches"] == 1


def test_input_that_is_not_finite_is_left_out_even_where_no_gradient_comes_back(tmp_path: Path) -> None:
    class Masked(SomebodysModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            out = self.unet.text(batch["text"] / (0.0 if batch_idx == 1 else 1.0))  # type: ignore[operator]
            return torch.where(out.isfinite(), out, 0.0).square().mean()

    fisher = fit(tmp_path, Masked(), accumulator_of(parameters=["text"]))
    assert fisher.provenance["skipped_batches"] == 1
    assert fisher.count == 5
    assert all(tensor.isfinite().all() for tensor in fisher.tensors().values())


# --- what is not training


class Validating(SomebodysModule):
    """Validation that uses the network with gradients, as guidance or sharpness measures do."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            loss_of(self.unet, batch).sum().backward()
        self.zero_grad()

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader(samples(4))


def test_sanity_checking_and_validation_in_between_are_not_counted(tmp_path: Path) -> None:
    module = Validating()
    fisher = fit(tmp_path, module, max_epochs=2, val_check_interval=1, num_sanity_val_steps=2, inference_mode=False)
    assert_sums(fisher, *expected_sums(module.seen))
    assert fisher.count == 16


def test_backward_passes_of_validation_by_hand_are_not_counted(tmp_path: Path) -> None:
    class ByHand(Validating):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()  # type: ignore[union-attr]
            self.zero_grad()

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            with torch.enable_grad():
                self.manual_backward(loss_of(self.unet, batch).mean())
            self.zero_grad()

    module = ByHand()
    fisher = fit(tmp_path, module, val_check_interval=1, num_sanity_val_steps=1, inference_mode=False)
    assert_sums(fisher, *expected_sums(module.seen))
    assert fisher.count == 8


def test_fast_dev_run_goes_through_and_leaves_an_earlier_file_alone(tmp_path: Path) -> None:
    earlier = tmp_path / "fisher.safetensors"
    earlier.write_bytes(b"of a long training")
    module, accumulator = Validating(), accumulator_of(parameters="all")
    trainer_for(tmp_path, accumulator, fast_dev_run=True, inference_mode=False).fit(module, loader(samples()))
    fisher = accumulator.total()
    assert_sums(fisher, *expected_sums(module.seen))
    assert fisher.count == 3
    assert earlier.read_bytes() == b"of a long training"


def test_other_callbacks_gradients_between_batches_are_not_counted(tmp_path: Path) -> None:
    class Probe(Callback):
        def probe(self, module: SomebodysModule) -> None:
            probed = [torch.stack([sample[name] for sample in samples(2)]) for name in ("latents", "timestep", "text")]
            torch.autograd.grad(module.unet(*probed).sum(), list(module.unet.parameters()))

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.probe(pl_module)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
            self.probe(pl_module)

    for callbacks in (lambda ours: [Probe(), ours], lambda ours: [ours, Probe()]):
        module = SomebodysModule()
        accumulator = accumulator_of(parameters="all")
        trainer_for(tmp_path, *callbacks(accumulator)).fit(module, loader(samples()))
        assert_sums(load_fisher(tmp_path / "fisher.safetensors"), *expected_sums(module.seen))


def test_gradients_that_the_training_step_takes_for_itself_are_not_counted(tmp_path: Path) -> None:
    class Adaptive(SomebodysModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.write_down(batch)
            losses = loss_of(self.unet, batch)
            norm = torch.autograd.grad(losses.sum(), list(self.unet.conv_out.parameters()), retain_graph=True)[0].norm()  # type: ignore[union-attr]
            return losses.mean() + 0 * norm.detach()

    module = Adaptive()
    assert_sums(fit(tmp_path, module), *expected_sums(module.seen))


def test_training_step_that_skips_its_batch_is_no_error(tmp_path: Path) -> None:
    class Skipping(SomebodysModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    module = Skipping()
    fisher = fit(tmp_path, module)
    assert_sums(fisher, *expected_sums(module.seen))
    assert fisher.count == 5


# --- networks and ways of training


class Reusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = nn.Linear(DIM, DIM)

    def forward(self, text: Tensor) -> Tensor:
        found: Tensor = self.again(torch.tanh(self.again(text))).mean(1)
        return found


def test_layer_used_twice_in_a_forward_pass_is_summed_before_squaring(tmp_path: Path) -> None:
    class Module(SomebodysModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = Reusing().double()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.write_down(batch)
            return self.unet(batch["text"]).square().sum(1).mean()

    module = Module()
    fisher = fit(tmp_path, module)
    sums: dict[str, Tensor] = {}
    for weights, batch in module.seen:
        network = Reusing().double()
        network.load_state_dict(weights)
        gradients = per_sample_gradients(
            lambda row, network=network, batch=batch: network(batch["text"][row : row + 1]).square().sum(),  # type: ignore[misc]
            dict(network.named_parameters()),
            len(batch["text"]),
        )
        for name, total in sums_of_squares(gradients).items():
            sums[name] = sums.get(name, 0) + total
    assert_sums(fisher, sums, 8)


class DiffusersModule(LightningModule):
    def __init__(self, checkpointing: str | None) -> None:
        super().__init__()
        self.unet = tiny_unet().double()
        self.objective = DenoisingObjective()
        if checkpointing is not None:
            from torch.utils.checkpoint import checkpoint

            reentrant = checkpointing == "reentrant"
            self.unet.enable_gradient_checkpointing(
                lambda function, *arguments, **keywords: checkpoint(
                    function, *arguments, use_reentrant=reentrant, **keywords
                )
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views = ViewBatch(batch["latents"], {"text": batch["text"]})
        return self.objective(self.unet.train(), views, batch["timestep"] * 100, batch["noise"]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_gradient_checkpointing_gives_the_same(tmp_path: Path) -> None:
    for parameters in ("text_kv", "all"):
        plain = fit(tmp_path, DiffusersModule(None), accumulator_of(parameters=parameters), samples(4))
        for way in ("reentrant", "not reentrant"):
            fisher = fit(tmp_path, DiffusersModule(way), accumulator_of(parameters=parameters), samples(4))
            assert_sums(fisher, plain.tensors(), 4)


def test_defaults_collect_all_layers_of_a_diffusers_unet(tmp_path: Path) -> None:
    module = DiffusersModule(None)
    fisher = fit(tmp_path, module, accumulator_of(), samples(4))
    assert set(fisher.layers) == set(select_layers(module.unet, "all"))
    assert fisher.provenance["objective"] == json.loads(json.dumps(module.objective.settings()))
    assert fisher.provenance["target"] == "unet"
    assert fisher.provenance["module"].endswith("DiffusersModule")
    assert fisher.provenance["averaged_weights_in_run"] is False
    # The weights beside the sums are those at the end of training.
    ends = layer_parameters(select_layers(module.unet, "all"))
    assert all(torch.equal(fisher.weights[name], parameter) for name, parameter in ends.items())


def test_by_default_what_is_trained_is_collected(tmp_path: Path) -> None:
    module = DiffusersModule(None)
    module.unet.requires_grad_(False)
    trained = select_layers(module.unet, "text_kv")
    for layer in trained.values():
        layer.requires_grad_(True)
    with pytest.warns(UserWarning, match=rf"of {len(trained)} layers alone, since this training leaves \d+ others"):
        fisher = fit(tmp_path, module, accumulator_of(), samples(4))
    assert set(fisher.layers) == set(trained)
    assert fisher.weights.keys() == layer_parameters(trained).keys()


class Adversarial(SomebodysModule):
    """Two networks with an optimizer each, optimized by hand in turns."""

    def __init__(self, by_batch: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(3 * 8 * 8, 1).double()
        self.by_batch = by_batch

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        denoise, judge = self.optimizers()  # type: ignore[misc]
        if not self.by_batch or batch_idx % 2 == 0:
            self.toggle_optimizer(judge)
            self.manual_backward(
                self.critic(self.unet(batch["latents"], batch["timestep"], batch["text"]).detach().flatten(1)).mean()
            )
            judge.step()
            judge.zero_grad()
            self.untoggle_optimizer(judge)
        if not self.by_batch or batch_idx % 2 == 1:
            self.toggle_optimizer(denoise)
            self.write_down(batch)
            self.manual_backward(loss_of(self.unet, batch).mean())
            self.clip_gradients(denoise, gradient_clip_val=1e-3)
            denoise.step()
            denoise.zero_grad()
            self.untoggle_optimizer(denoise)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.unet, self.critic)]


@pytest.mark.parametrize("by_batch", [False, True])
def test_manual_optimization_with_two_optimizers_counts_the_networks_own_passes(tmp_path: Path, by_batch: bool) -> None:
    module = Adversarial(by_batch)
    fisher = fit(tmp_path, module)
    assert_sums(fisher, *expected_sums(module.seen))
    assert fisher.count == (3 if by_batch else 8)


def test_two_accumulators_watch_two_networks(tmp_path: Path) -> None:
    class Two(SomebodysModule):
        def __init__(self) -> None:
            super().__init__()
            self.nested = nn.ModuleDict({"unet": ToyDenoiser(1).double()})

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            self.write_down(batch)
            return (loss_of(self.unet, batch) + loss_of(self.nested["unet"], batch)).mean()

    module = Two()
    other = accumulator_of("nested.unet", ["text"], path="folder/other.safetensors")
    fisher = fit(tmp_path, module, callbacks=[other])
    assert_sums(fisher, *expected_sums(module.seen))
    assert load_fisher(tmp_path / "folder" / "other.safetensors").count == 8
    assert set(load_fisher(tmp_path / "folder" / "other.safetensors").layers) == {"text"}


def test_averaged_weights_beside_the_training_are_noted_and_change_no_sum(tmp_path: Path) -> None:
    module = SomebodysModule()
    fisher = fit(tmp_path, module, callbacks=[EMAWeightAveraging(decay=0.5)], max_epochs=2)
    assert fisher.provenance["averaged_weights_in_run"] is True
    assert_sums(fisher, *expected_sums(module.seen))


def test_network_that_is_built_in_configure_model_or_is_the_module_itself_is_found(tmp_path: Path) -> None:
    class Late(SomebodysModule):
        def __init__(self) -> None:
            super().__init__()
            del self.unet

        def configure_model(self) -> None:
            self.unet = ToyDenoiser().double()

    module = Late()
    fisher = fit(tmp_path, module, accumulator_of(target="", parameters=[r"unet\..*"]))
    sums, count = expected_sums(module.seen)
    assert_sums(fisher, {f"unet.{name}": total for name, total in sums.items()}, count)


# --- hooks


def test_hooks_are_gone_after_training(tmp_path: Path) -> None:
    module = SomebodysModule()
    before = hooks_of(module)
    fit(tmp_path, module)
    assert hooks_of(module) == before


@pytest.mark.parametrize("where", ["training_step", "on_train_start", "on_train_epoch_end"])
def test_hooks_are_gone_after_an_exception(tmp_path: Path, where: str) -> None:
    class Failing(SomebodysModule):
        pass

    def fail(self: Any, *arguments: Any) -> None:
        during.append(hooks_of(self))
        raise RuntimeError("on purpose")

    during: list[int] = []
    setattr(Failing, where, fail)
    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, module)
    assert during[0] > 0
    assert hooks_of(module) == 0


def test_hooks_are_on_only_while_training(tmp_path: Path) -> None:
    class Asking(Validating):
        def on_validation_start(self) -> None:
            if self.trainer.sanity_checking:
                assert hooks_of(self) == 0

    fit(tmp_path, Asking(), num_sanity_val_steps=2, inference_mode=False)


# --- what a user gets wrong


def frozen() -> SomebodysModule:
    module = SomebodysModule()
    module.unet.text.requires_grad_(False)  # type: ignore[operator, union-attr]
    return module


class Raw(SomebodysModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        loss_of(self.unet, batch).mean().backward()


class Unused(SomebodysModule):
    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.other = ToyDenoiser().double()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = loss_of(self.other, batch).mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
        return loss


@pytest.mark.parametrize(
    ("module", "settings", "says"),
    [
        (SomebodysModule, {"target": "network"}, "SomebodysModule has no 'network'.*unet"),
        (SomebodysModule, {"target": "unet.nothing"}, "has no 'unet.nothing'"),
        (SomebodysModule, {"target": "learning_rate"}, "'learning_rate' of SomebodysModule is a float"),
        (SomebodysModule, {"parameters": "text_kv"}, "ToyDenoiser"),
        (SomebodysModule, {"parameters": ["nothing"]}, "nothing.*conv_in"),
        (frozen, {}, r"1 of the chosen layers are frozen \(e\.g\. text\)"),
        (Unused, {}, "No gradient reached any chosen layer of 'unet'"),
        (lambda: Unused(automatic=False), {}, "No gradient reached any chosen layer of 'unet'"),
        (Raw, {}, r"loss\.backward\(\).*self\.manual_backward\(loss\)"),
        (SomebodysModule, {"sample_weights": "no.weights"}, "SomebodysModule has no 'no.weights'"),
        (Weighted, {"sample_weights": "unet.text.bias"}, r"'unet.text.bias' has shape \(5,\).*3 samples"),
    ],
)
def test_what_cannot_be_collected_is_an_input_error_at_once(
    tmp_path: Path, module: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        fit(tmp_path, module(), accumulator_of(**{"parameters": "all", **settings}), max_epochs=2)
    assert not (tmp_path / "fisher.safetensors").exists()


def test_trainer_of_pytorch_lightning_is_an_input_error_that_names_the_import(tmp_path: Path) -> None:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet = ToyDenoiser().double()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return loss_of(self.unet, batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    accumulator: Any = accumulator_of(parameters="all")
    trainer = pytorch_lightning.Trainer(callbacks=[accumulator], accelerator="cpu", default_root_dir=tmp_path, **quiet)
    with pytest.raises(InputError, match=r"pytorch_lightning to lightning\.pytorch"):
        trainer.fit(Module(), loader(samples()))


@pytest.mark.parametrize(
    "settings", [{"every_n_batches": 0}, {"loss_scale": 0.0}, {"reduction": "none"}, {"fisher": "dense"}], ids=str
)
def test_argument_out_of_range_is_an_input_error(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="FisherAccumulator needs"):
        accumulator_of(**settings)


def test_two_accumulators_of_one_path_are_an_input_error(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, accumulator_of(parameters="all"), accumulator_of(parameters=["text"]))
    with pytest.raises(InputError, match=r"fisher\.safetensors"):
        trainer.fit(SomebodysModule(), loader(samples()))


def test_training_that_ends_before_the_start_warns_and_writes_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, accumulator_of(parameters="all", start_epoch=9))
    with pytest.warns(UserWarning, match="took no batch"):
        trainer.fit(SomebodysModule(), loader(samples()))
    assert not (tmp_path / "fisher.safetensors").exists()


def test_asking_for_the_sums_before_training_is_an_input_error() -> None:
    with pytest.raises(InputError, match="before training"):
        accumulator_of().total()


# --- checkpoints


def checkpoints(tmp_path: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="{step}", save_top_k=-1, **settings)


@pytest.mark.parametrize("save_in_checkpoint", [True, False])
@pytest.mark.parametrize("step", [3, 6])  # after the first epoch and after the second
def test_resumed_training_gives_the_sums_of_the_uninterrupted_one(
    tmp_path: Path, save_in_checkpoint: bool, step: int
) -> None:
    def accumulator() -> FisherAccumulator:
        return accumulator_of(parameters="all", save_in_checkpoint=save_in_checkpoint)

    whole = SomebodysModule()
    settings = {"max_epochs": 3, "enable_checkpointing": True, "accumulate_grad_batches": 1}
    uninterrupted = fit(tmp_path, whole, accumulator(), callbacks=[checkpoints(tmp_path)], **settings)
    assert_sums(uninterrupted, *expected_sums(whole.seen))
    checkpoint = tmp_path / "checkpoints" / f"step={step}.ckpt"
    (tmp_path / "fisher.safetensors").unlink()

    rest = SomebodysModule()
    resumed = fit(tmp_path, rest, accumulator(), ckpt_path=str(checkpoint), **settings)
    assert len(rest.seen) == 9 - step
    assert_sums(resumed, uninterrupted.tensors(), 24)
    assert resumed.provenance["steps"] == uninterrupted.provenance["steps"] == [0, 8]


@pytest.mark.parametrize("save_in_checkpoint", [True, False])
def test_training_resumed_twice_in_the_middle_of_epochs_counts_nothing_twice(
    tmp_path: Path, save_in_checkpoint: bool
) -> None:
    data = samples(3) * 4  # four equal batches an epoch: a resumed epoch starts its loader anew
    settings: dict[str, Any] = {"data": data, "max_epochs": 3, "enable_checkpointing": True}
    kind: dict[str, Any] = {"parameters": "all", "save_in_checkpoint": save_in_checkpoint}
    whole = fit(
        tmp_path,
        SomebodysModule(),
        accumulator_of(**kind),
        callbacks=[checkpoints(tmp_path, every_n_train_steps=1)],
        **settings,
    )
    first, second = (str(tmp_path / "checkpoints" / f"step={step}.ckpt") for step in (2, 7))
    Path(second).unlink()
    fit(
        tmp_path,
        SomebodysModule(),
        accumulator_of(**kind),
        ckpt_path=first,
        callbacks=[
            ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=7)
        ],
        **settings,
    )
    resumed = fit(tmp_path, SomebodysModule(), accumulator_of(**kind), ckpt_path=second, **settings)
    assert_sums(resumed, whole.tensors(), 36)


def test_checkpoint_loads_with_weights_only_and_holds_the_sums(tmp_path: Path) -> None:
    fisher = fit(tmp_path, SomebodysModule(), callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    (path,) = (tmp_path / "checkpoints").iterdir()
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("FisherAccumulator"))
    assert state["fisher"]["count"] == 8
    assert all(torch.equal(state["fisher"]["tensors"][name], total) for name, total in fisher.tensors().items())


def test_sums_beside_the_checkpoint_leave_it_small_and_are_a_fisher_themselves(tmp_path: Path) -> None:
    accumulator = accumulator_of(parameters="all", save_in_checkpoint=False)
    fisher = fit(tmp_path, SomebodysModule(), accumulator, callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    (path,) = (tmp_path / "checkpoints").iterdir()
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("FisherAccumulator"))
    assert "fisher" not in state
    assert_sums(load_fisher(state["file"]), fisher.tensors(), 8)
    assert Path(state["file"]).name == "fisher-step=3.safetensors"


@pytest.mark.parametrize("save_in_checkpoint", [True, False])
def test_checkpoint_saved_after_training_holds_the_same_sums(tmp_path: Path, save_in_checkpoint: bool) -> None:
    accumulator = accumulator_of(parameters="all", save_in_checkpoint=save_in_checkpoint)
    trainer = trainer_for(tmp_path, accumulator)
    trainer.fit(SomebodysModule(), loader(samples()))
    fisher = load_fisher(tmp_path / "fisher.safetensors")
    assert_sums(accumulator.total(), fisher.tensors(), 8)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = accumulator_of(parameters="all", save_in_checkpoint=save_in_checkpoint)
    state = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"][accumulator.state_key]
    resumed.load_state_dict(state)
    longer = fit(tmp_path, SomebodysModule(), resumed, ckpt_path=str(tmp_path / "after.ckpt"), max_epochs=2)
    assert longer.count == 16


def test_second_fit_goes_on_and_another_trainer_starts_anew(tmp_path: Path) -> None:
    accumulator = accumulator_of(parameters="all")
    module = SomebodysModule()
    trainer = trainer_for(tmp_path, accumulator)
    trainer.fit(module, loader(samples()))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(samples()))
    sums, count = expected_sums(module.seen)
    assert count == 16
    assert_sums(load_fisher(tmp_path / "fisher.safetensors"), sums, count)
    again = SomebodysModule()
    assert_sums(fit(tmp_path, again, accumulator), *expected_sums(again.seen))


# --- several processes


class OnRankZero(FisherAccumulator):
    """A rank that takes no batch must not stop the others' sums from being added."""

    def should_capture(self, step: int, epoch: int, batch_idx: int) -> bool:
        return os.environ["LOCAL_RANK"] == "0"


def run_rank(folder: Path) -> None:
    """What each of two processes does: a whole training, and one that is resumed from a checkpoint of it."""
    for name, ckpt_path in (("whole", None), ("resumed", str(folder / "checkpoints" / "step=2.ckpt"))):
        module = SomebodysModule()
        accumulators = [
            accumulator_of(parameters="all"),
            accumulator_of(parameters=["text"], path="text.safetensors", save_in_checkpoint=False),
            OnRankZero(parameters=["conv_in"], fisher="diagonal", path="zero.safetensors"),
        ]
        callbacks = [*accumulators, checkpoints(folder)] if ckpt_path is None else accumulators
        trainer = trainer_for(
            folder / name,
            *callbacks,
            devices=2,
            strategy="ddp",
            max_epochs=3,
            accumulate_grad_batches=2,
            enable_checkpointing=ckpt_path is None,
        )
        # 7 samples: Lightning's sampler gives either rank 4, in batches of 3 and 1.
        trainer.fit(module, loader(samples(7)), ckpt_path=ckpt_path)
        torch.save(module.seen, folder / name / f"seen-{trainer.global_rank}.pt")
        trainer.save_checkpoint(folder / name / "after.ckpt")
        if trainer.is_global_zero:  # after training one rank may ask alone
            assert accumulators[0].total().count == 24


def test_two_processes_give_the_sums_over_both_also_after_a_resume(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    seen = {
        (name, rank): torch.load(tmp_path / name / f"seen-{rank}.pt", weights_only=True)
        for name in ("whole", "resumed")
        for rank in (0, 1)
    }
    for file, parameters, ranks in (("fisher", "all", (0, 1)), ("text", ["text"], (0, 1)), ("zero", ["conv_in"], (0,))):
        sums, count = expected_sums([one for rank in ranks for one in seen["whole", rank]], parameters)
        assert count == 12 * len(ranks)
        for name in ("whole", "resumed"):
            assert_sums(load_fisher(tmp_path / name / f"{file}.safetensors"), sums, count)
    assert all(len(seen["resumed", rank]) == 2 for rank in (0, 1))  # one epoch of three

    # A checkpoint saved after training holds the sums over both, and one process goes on with them.
    alone = SomebodysModule()
    longer = fit(
        tmp_path / "alone", alone, data=samples(7), ckpt_path=str(tmp_path / "whole" / "after.ckpt"), max_epochs=4
    )
    sums, _ = expected_sums([*seen["whole", 0], *seen["whole", 1], *alone.seen])
    assert len(alone.seen) == 3
    assert_sums(longer, sums, 24 + 7)


def test_resuming_with_another_selection_of_layers_is_an_input_error(tmp_path: Path) -> None:
    fit(tmp_path, SomebodysModule(), callbacks=[checkpoints(tmp_path)], enable_checkpointing=True)
    (path,) = (tmp_path / "checkpoints").iterdir()

    class Larger(SomebodysModule):
        def __init__(self) -> None:
            super().__init__()
            self.unet.more = nn.Linear(2, 2).double()
            self.strict_loading = False

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([self.unet.conv_in.weight], lr=0.1)  # type: ignore[union-attr, list-item]

    state = torch.load(path, weights_only=True)
    state["optimizer_states"] = []
    torch.save(state, path)
    with pytest.raises(InputError, match="other layers"):
        fit(tmp_path, Larger(), ckpt_path=str(path), max_epochs=2)


def test_missing_file_of_the_sums_beside_the_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    kind: dict[str, Any] = {"parameters": "all", "save_in_checkpoint": False}
    fit(
        tmp_path,
        SomebodysModule(),
        accumulator_of(**kind),
        callbacks=[checkpoints(tmp_path)],
        enable_checkpointing=True,
    )
    (path,) = (tmp_path / "checkpoints").iterdir()
    (tmp_path / "fisher-step=3.safetensors").unlink()
    with pytest.raises(InputError, match="fisher-step=3"):
        fit(tmp_path, SomebodysModule(), accumulator_of(**kind), ckpt_path=str(path), max_epochs=2)


def test_checkpoint_written_because_of_an_exception_holds_the_sums_so_far(tmp_path: Path) -> None:
    class Failing(SomebodysModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    on_exception = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_on_exception=True, save_top_k=-1)
    module = Failing()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, module, callbacks=[on_exception], enable_checkpointing=True)
    (path,) = (tmp_path / "checkpoints").iterdir()
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = (state for key, state in states.items() if key.startswith("FisherAccumulator"))
    sums, count = expected_sums(module.seen)
    assert state["fisher"]["count"] == count == 6
    torch.testing.assert_close(state["fisher"]["tensors"], sums)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
