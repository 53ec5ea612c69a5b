"""Fits of anybody's small training with a FisherAccumulator, held against one backward pass a sample in float64."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher, load_fisher

WIDTH, HIDDEN, BATCH = 5, 6, 4
Sample = dict[str, Tensor]
Losses = Sequence[Callable[[], Tensor]]


class Net(nn.Module):
    """Two Linear layers; both work on the last axis, so they take samples or rows of any shape."""

    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first if first is not None else nn.Linear(WIDTH, HIDDEN)
        self.second = second if second is not None else nn.Linear(HIDDEN, WIDTH)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


class Training(LightningModule):
    """A training whose step is a function; its weights do not move, so that one reference holds for all of it."""

    def __init__(
        self,
        net: nn.Module,
        step: Callable[[Any, Any, int], Any] | None = None,
        optimizers: Callable[[Any], Any] | None = None,
        *,
        automatic: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.step = step if step is not None else plain_step
        self.optimizers_of = optimizers
        self.automatic_optimization = automatic

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        if self.optimizers_of is not None:
            return self.optimizers_of(self)
        return standing(self.net)


def standing(*modules: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that moves nothing."""
    return torch.optim.SGD([p for module in modules for p in module.parameters() if p.requires_grad], lr=0.0)


def plain_step(module: Any, batch: Any, _: int) -> Tensor:
    """The batch's mean of each sample's squared error."""
    return squared_error(module.net(batch["x"]), batch["y"]).mean()


def squared_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each sample: ``(B,)``."""
    return (found - wanted).square().flatten(1).sum(1)


def samples(count: int = 8, shape: tuple[int, ...] = (WIDTH,), dtype: torch.dtype = torch.float64) -> list[Sample]:
    """Random samples, a function of their number."""
    generator = torch.Generator().manual_seed(3)
    return [
        {name: torch.randn(shape, generator=generator, dtype=dtype) for name in ("x", "y", "z")} for _ in range(count)
    ]


def plain_losses(net: nn.Module, data: Sequence[Sample]) -> Losses:
    """Each sample's squared error, by itself in a batch of one."""
    return [lambda sample=sample: squared_error(net(sample["x"][None]), sample["y"][None])[0] for sample in data]


def mean_squares(net: nn.Module, losses: Losses) -> dict[str, Tensor]:
    """Mean squared gradient of every weight that is trained, one backward pass a sample."""
    parameters = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    means = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    for loss in losses:
        found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                means[name] += gradient.detach().double().square() / len(losses)
    return means


def fitted(
    folder: Path,
    module: LightningModule,
    data: Any,
    trainer: dict[str, Any],
    settings: dict[str, Any],
    resume: Path | None = None,
) -> Path:
    """Fit with an accumulator, and give the path of its file."""
    loader = DataLoader(data, batch_size=BATCH) if isinstance(data, list) else data
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    ours = FisherAccumulator(**{"target": "net", "parameters": "all", "fisher": "diagonal", **settings})
    both = {**quiet, **trainer}
    Trainer(**{**both, "callbacks": [*both.get("callbacks", []), ours]}).fit(module, loader, ckpt_path=resume)
    return folder / "fisher.safetensors"


def assert_right(
    path: Path, net: nn.Module, losses: Losses, leaving: str = r"(?!)", rtol: float = 1e-8, *, totals: bool = False
) -> None:
    """The file has the mean squared gradient of every trained weight but those that ``leaving`` matches."""
    assert path.exists(), "the training ended, and there is neither a Fisher nor a refusal"
    fisher = load_fisher(path)
    wanted = mean_squares(net, losses)
    assert fisher.count == len(losses), f"{fisher.count} samples counted, not {len(losses)}"
    found = {name: tensor.double() / fisher.count for name, tensor in fisher.tensors().items()}
    missing = {name for name, mean in wanted.items() if mean.any()} - set(found)
    assert not {name for name in missing if not re.search(leaving, name)}, f"no Fisher of {missing}"
    # Where a sample's terms cancel, what is left is rounding: some 1e-16 of a gradient, squared.
    rounding = 1e-28 * max(float(mean.max()) for mean in wanted.values())
    for name, mean in found.items():
        assert name in wanted, f"a Fisher of {name}, which is not trained"
        here, there = (mean.sum(), wanted[name].sum()) if totals else (mean, wanted[name])
        atol = rtol * float(there.max()) + rounding
        torch.testing.assert_close(here, there, rtol=rtol, atol=atol, msg=f"{name} {here} {there}")


def assert_right_or_refused(
    folder: Path,
    module: Any,
    data: Any,
    losses: Losses,
    named: str,
    *,
    trainer: dict[str, Any] | None = None,
    leaving: str = r"(?!)",
    rtol: float = 1e-8,
    totals: bool = False,
    **settings: Any,
) -> None:
    """Either the right number, or one sentence that has ``named`` (a pattern) in it and no file."""
    path = fitted_or_refused(folder, module, data, named, trainer=trainer, **settings)
    if path is not None:
        assert_right(path, module.net, losses, leaving, rtol, totals=totals)


def fitted_or_refused(
    folder: Path, module: Any, data: Any, named: str, *, trainer: dict[str, Any] | None = None, **settings: Any
) -> Path | None:
    """The path of the file; none where one sentence has ``named`` (a pattern) in it, and then there is no file."""
    said: InputError | None = None
    path: Path | None = None
    try:
        path = fitted(folder, module, data, trainer or {}, settings)
    except InputError as error:
        said = error
    if said is not None:
        assert re.search(named, str(said)), f"the refusal does not name {named}: {said}"
        assert not (folder / "fisher.safetensors").exists(), "refused, and yet there is a file"
    return path


def assert_is_right(
    folder: Path,
    module: Any,
    data: Any,
    losses: Losses,
    *,
    trainer: dict[str, Any] | None = None,
    leaving: str = r"(?!)",
    rtol: float = 1e-8,
    totals: bool = False,
    **settings: Any,
) -> None:
    """The right number; a set-up that must not be refused."""
    path = fitted(folder, module, data, trainer or {}, settings)
    assert_right(path, module.net, losses, leaving, rtol, totals=totals)


def sample_matrices(net: nn.Module, losses: Losses, layer: str) -> Tensor:
    """Each sample's gradient of a layer's weight, its bias the last column: ``(N, o, i + 1)``."""
    chosen: Any = net.get_submodule(layer)
    rows = []
    for loss in losses:
        weight, bias = torch.autograd.grad(loss(), [chosen.weight, chosen.bias])
        rows.append(torch.cat([weight.detach().reshape(len(weight), -1), bias.detach()[:, None]], 1).double())
    return torch.stack(rows)


def covariances(net: nn.Module, losses: Losses, layer: str) -> tuple[Tensor, Tensor]:
    """``Σ a aᵀ`` of a layer's inputs, a 1 appended, and ``Σ g gᵀ`` of the gradients at its output, one row a sample."""
    uses: list[tuple[Tensor, Tensor]] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, given, out: uses.append((given[0], out)))
    inputs: Tensor = torch.zeros(())
    outputs: Tensor = torch.zeros(())
    for loss in losses:
        uses.clear()
        value = loss()
        ((a, out),) = uses
        gradient = torch.autograd.grad(value, out)[0].flatten().double()
        a = torch.cat([a.detach().flatten().double(), torch.ones(1, dtype=torch.float64)])
        inputs, outputs = inputs + torch.outer(a, a), outputs + torch.outer(gradient, gradient)
    handle.remove()
    return inputs, outputs


def is_product(fisher: Fisher, net: nn.Module, losses: Losses, layers: Sequence[str]) -> bool:
    """Whether eigenvalues are those of the Kronecker product of the two covariances, with the layer's own exact trace.

    K-FAC's product assumes that inputs and output gradients are independent; by one factor a layer its trace is that of
    the mean squared gradients.
    """
    squares = mean_squares(net, losses)
    for layer in layers:
        sides = []
        for side, covariance in zip(("inputs", "outputs"), covariances(net, losses, layer), strict=True):
            basis = fisher.tensors()[f"bases/{layer}/{side}"].double()
            sides.append((basis.mT @ covariance @ basis).diag() / len(losses))
        found = fisher.tensors()[f"eigenvalues/{layer}"].double() / fisher.count
        wanted = torch.outer(sides[1], sides[0])
        trace = sum(float(squares[name].sum()) for name in (f"{layer}.weight", f"{layer}.bias") if name in squares)
        wanted = wanted * (trace / float(wanted.sum()))
        if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-7 * float(wanted.max())):
            return False
    return True


def assert_windows(path: Path, net: nn.Module, seen: Losses, layers: Sequence[str], at_least: int) -> None:
    """A file of either kind that is right: of an EKFAC one both windows, which are the first samples and the others."""
    assert path.exists(), "a whole training, and there is no Fisher"
    fisher = load_fisher(path)
    if fisher.kind == "diagonal":
        assert fisher.count >= at_least
        found = {name: tensor.double() / fisher.count for name, tensor in fisher.tensors().items()}
        wanted = [mean_squares(net, part) for part in (seen[: fisher.count], seen[-fisher.count :])]
        assert any(all(torch.allclose(found[name], want[name], rtol=1e-7) for name in found) for want in wanted), (
            "the diagonal is of no such samples"
        )
        return
    assert fisher.kind == "ekfac", f"a kind that this test does not know: {fisher.kind}"
    if "k-fac" in json.dumps(fisher.provenance).lower():  # no eigenvalue was summed, and the file says so
        assert fisher.count >= at_least
        assert any(is_product(fisher, net, part, layers) for part in (seen[: fisher.count], seen[-fisher.count :]))
        return
    assert at_least <= fisher.count < len(seen), f"eigenvalues of {fisher.count} of {len(seen)} samples"
    assert_eigenvalues(fisher, net, seen[len(seen) - fisher.count :], layers)
    for layer in layers:
        for side, covariance in zip(
            ("inputs", "outputs"), covariances(net, seen[: len(seen) - fisher.count], layer), strict=True
        ):
            basis = fisher.tensors()[f"bases/{layer}/{side}"].double()
            turned = basis.mT @ covariance @ basis
            torch.testing.assert_close(
                turned, torch.diag(turned.diag()), rtol=0, atol=1e-7 * float(turned.abs().max()), msg=f"{layer} {side}"
            )


def assert_eigenvalues(fisher: Fisher, net: nn.Module, losses: Losses, layers: Sequence[str]) -> None:
    """``Λ = (1/n) Σ_s (U_Sᵀ g_s U_A)²`` in the file's own bases, which are orthonormal."""
    assert fisher.count == len(losses), f"{fisher.count} samples counted, not {len(losses)}"
    tensors = {name: tensor.double() for name, tensor in fisher.tensors().items()}
    for layer in layers:
        inputs, outputs = tensors[f"bases/{layer}/inputs"], tensors[f"bases/{layer}/outputs"]
        for basis in (inputs, outputs):
            torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis), dtype=torch.float64))
        wanted = (outputs.mT @ sample_matrices(net, losses, layer) @ inputs).square().mean(0)
        found = tensors[f"eigenvalues/{layer}"] / fisher.count
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7 * float(wanted.max()))
