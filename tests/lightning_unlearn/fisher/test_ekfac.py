from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from command_toys import SAMPLES, run, write_config
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import run_ranks
from reference import (
    damped,
    dense_fisher,
    diagonal_fisher,
    ekfac_fisher,
    joined,
    kfac_fisher,
    kronecker_factors,
    per_sample_gradients,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_unlearn.fisher.kronecker as kronecker
from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import DiagonalFisher, EKFACFisher, Fisher, load_fisher
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.weights.capture import CapturedLayer, GradientCapture
from lightning_unlearn.weights.parameters import LayerSpec, layer_parameters, layer_specs, select_layers

# Lightning's advice on this machine's loaders, loggers and step counts is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")

LAYERS = ("conv", "tokens", "head")
Pictures = Tensor  # (B, 2, 5, 4)


class Network(nn.Module):
    """A strided Conv2d and a Linear over its positions, both with bias, and a Linear without, also over positions."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=1)
            self.tokens = nn.Linear(3, 4)
            self.head = nn.Linear(4, 2, bias=False)
            self.double()

    def forward(self, pictures: Pictures) -> Tensor:
        """Losses ``(B,)``."""
        hidden = torch.tanh(self.conv(pictures)).flatten(2).mT
        found: Tensor = self.head(torch.tanh(self.tokens(hidden)))
        return (found - pictures.flatten(1)[:, None, :2]).square().mean((1, 2))


def pictures(count: int = 8, seed: int = 0) -> Pictures:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(count, 2, 5, 4, generator=generator, dtype=torch.float64)


# --- from the network to both versions


def captured(network: Network, batch: Pictures) -> dict[str, CapturedLayer]:
    with GradientCapture(select_layers(network, "all")) as capture:
        network(batch).sum().backward()
    return capture.take()


def fisher_of(network: Network, covariances: list[Pictures], eigenvalues: list[Pictures] | None = None) -> EKFACFisher:
    fisher = EKFACFisher(layer_specs(select_layers(network, "all")))
    for batch in covariances:
        fisher.update(captured(network, batch))
    if eigenvalues is not None:
        fisher.next_stage()
        for batch in eigenvalues:
            fisher.update(captured(network, batch))
    return fisher


def sample_gradients(network: Network, batch: Pictures) -> dict[str, Tensor]:
    parameters = layer_parameters(select_layers(network, "all"))
    return per_sample_gradients(lambda row: network(batch[row : row + 1]).sum(), parameters, len(batch))


def layer_gradients(network: Network, name: str, batch: Pictures) -> Tensor:
    """``(n, numel)``: each sample's gradient of a layer, weight and bias joined."""
    return joined_rows(sample_gradients(network, batch), name)


def joined_rows(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    weights = gradients[f"{name}.weight"]
    biases = gradients.get(f"{name}.bias", [None] * len(weights))
    return torch.stack([joined(w, b) for w, b in zip(weights, biases, strict=True)])


def factors(network: Network, name: str, batch: Pictures) -> tuple[Tensor, Tensor, int]:
    layer = network.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, arguments, output: kept.extend([arguments[0], output]))
    loss = network(batch).sum()
    handle.remove()
    return kronecker_factors(layer, kept[0].detach(), torch.autograd.grad(loss, kept[1])[0])


def reference(network: Network, name: str, covariances: Pictures, eigenvalues: Pictures) -> Tensor:
    inputs, outputs, _ = factors(network, name, covariances)
    return ekfac_fisher(inputs, outputs, layer_gradients(network, name, eigenvalues))


def dense(fisher: Fisher, name: str) -> Tensor:
    """The matrix that a Fisher's file stands for."""
    tensors = fisher.tensors()
    basis = torch.kron(tensors[f"bases/{name}/outputs"], tensors[f"bases/{name}/inputs"])
    return basis @ torch.diag(tensors[f"eigenvalues/{name}"].flatten() / fisher.count) @ basis.T


def close(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= rtol * float(expected.norm()), f"{found}\n{expected}"


def random_like(fisher: Fisher, *leading: int, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = fisher.parameter_shapes.items()
    return {name: torch.randn(*leading, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes}


def of_layer(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {parameter: tensor for parameter, tensor in tensors.items() if parameter.startswith(f"{name}.")}


def vector(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return joined(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


# --- the mathematics


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("name", LAYERS)
def test_precondition_and_quadratic_are_the_dense_ones(name: str, damping: float) -> None:
    network, first, second = Network(), pictures(8), pictures(30, seed=1)
    # Bases and eigenvalues come from other samples, in batches of other sizes.
    fisher = fisher_of(network, [first[:3], first[3:]], [second[:1], second[1:]])
    assert fisher.count == 30
    matrix = reference(network, name, first, second)
    close(dense(fisher, name), matrix)
    fisher.finalize(damping)
    gradient = of_layer(random_like(fisher), name)
    expected = torch.linalg.solve(damped(matrix, damping), vector(gradient, name))
    step = fisher.precondition(gradient)
    assert {parameter: tensor.shape for parameter, tensor in step.items()} == {
        parameter: tensor.shape for parameter, tensor in gradient.items()
    }
    close(vector(step, name), expected)
    delta = vector(gradient, name)
    close(fisher.quadratic(gradient), delta @ damped(matrix, damping) @ delta)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_closer_to_the_exact_fisher_than_kfac_and_the_diagonal(seed: int) -> None:
    """On pictures whose pixels go together, as pictures' do, and more of them than a layer has weights.

    Against K-FAC it is a theorem. Against the diagonal it is not: on white noise every basis of the conv's inputs is as
    good as another, and of ten such networks one or two lose.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    coarse = torch.randn(200, 2, 2, 2, generator=generator, dtype=torch.float64)
    batch = nn.functional.interpolate(coarse, size=(5, 4), mode="bilinear") + 0.3 * pictures(200, seed)
    network = Network(seed)
    fisher = fisher_of(network, [batch], [batch])
    gradients = sample_gradients(network, batch)
    whole = {"ekfac": 0.0, "kfac": 0.0, "diagonal": 0.0}
    for name in LAYERS:
        exact = dense_fisher(joined_rows(gradients, name))
        inputs, outputs, positions = factors(network, name, batch)
        diagonal = diagonal_fisher(of_layer(gradients, name))
        approximations = {
            "ekfac": dense(fisher, name),
            "kfac": kfac_fisher(inputs, outputs, len(batch), positions),
            "diagonal": torch.diag(vector(diagonal, name)),
        }
        errors = {kind: float((matrix - exact).norm()) for kind, matrix in approximations.items()}
        assert errors["ekfac"] < min(errors["kfac"], errors["diagonal"]), (name, errors)
        whole = {kind: error + errors[kind] ** 2 for kind, error in whole.items()}
    # Of the whole network, too: the blocks between layers, which all three leave out, add the same to each.
    assert whole["ekfac"] < min(whole["kfac"], whole["diagonal"])


def test_damping_is_a_share_of_the_layers_mean_eigenvalue_which_is_that_of_its_diagonal() -> None:
    network, batch = Network(), pictures(20)
    fisher, diagonal = fisher_of(network, [batch], [batch]), DiagonalFisher(layer_specs(select_layers(network, "all")))
    diagonal.update(captured(network, batch))
    delta = of_layer(random_like(fisher), "conv")
    added = []
    for one in (fisher, diagonal):
        forms = []
        for damping in (0.0, 0.5):
            one.finalize(damping)
            forms.append(one.quadratic(delta))
        added.append(forms[1] - forms[0])
    mean = layer_gradients(network, "conv", batch).square().mean()
    close(added[0], 0.5 * mean * vector(delta, "conv").square().sum())
    close(added[0], added[1])


def test_leading_dimensions_are_so_many_separate_vectors_and_the_whole_is_the_layers_sum() -> None:
    fisher = fisher_of(Network(), [pictures()], [pictures()])
    fisher.finalize(0.1)
    stacked = random_like(fisher, 2, 3)
    steps, forms = fisher.precondition(stacked), fisher.quadratic(stacked)
    assert list(steps) == list(stacked)
    assert forms.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = {name: tensor[i, j] for name, tensor in stacked.items()}
            for name, step in fisher.precondition(one).items():
                close(steps[name][i, j], step, 1e-12)
            layers = [fisher.quadratic(of_layer(one, name)) for name in LAYERS]
            close(forms[i, j], torch.stack(layers).sum(), 1e-12)


def test_preconditioning_turns_the_quadratic_form_into_the_inner_product() -> None:
    fisher = fisher_of(Network(), [pictures()], [pictures(3)])
    for damping in (0.0, 0.1):  # three samples leave most directions without a Fisher
        fisher.finalize(damping)
        gradient = random_like(fisher)
        step = fisher.precondition(gradient)
        # Where directions are left out, the product is with the gradient in the others: F F⁻¹ g.
        again = fisher.precondition({name: tensor.clone() for name, tensor in step.items()})
        inner = sum(((gradient[name] * step[name]).sum() for name in step), torch.zeros(()))
        close(fisher.quadratic(step), inner, 1e-4 if damping == 0 else 1e-9)
        assert all(tensor.isfinite().all() for tensor in (*step.values(), *again.values()))


def test_without_damping_directions_that_no_input_has_are_left_out() -> None:
    # Three inputs that go together always, so that two directions have no Fisher, but for rounding.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 2, 1, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.3, -0.7])
    gradients = torch.randn(9, 2, 3, generator=generator, dtype=torch.float64)
    fisher = EKFACFisher({"layer": LayerSpec("layer", (3, 3), False)})
    fisher.update({"layer": CapturedLayer(inputs, gradients)})
    fisher.next_stage()
    fisher.update({"layer": CapturedLayer(inputs, gradients)})
    fisher.finalize(0.0)
    gradient = {"layer.weight": torch.randn(3, 3, generator=generator, dtype=torch.float64)}
    step = fisher.precondition(gradient)
    close(
        step["layer.weight"].flatten(), torch.linalg.pinv(dense(fisher, "layer")) @ gradient["layer.weight"].flatten()
    )
    close(0.3 * step["layer.weight"][:, 0], step["layer.weight"][:, 1])


def test_samples_of_weight_zero_have_no_say_in_the_bases() -> None:
    network, batch = Network(), pictures(4)
    layers = captured(network, torch.cat([batch, 100 * pictures(2, seed=3)]))
    weights = torch.tensor([1.0] * 4 + [0.0] * 2)
    fisher = fisher_of(network, [])
    fisher.update({name: layer.scaled(weights) for name, layer in layers.items()})
    expected = fisher_of(network, [batch])
    for name, total in fisher.tensors().items():
        close(total, expected.tensors()[name], 1e-12)


# --- where there is no Fisher, or no basis


def test_layer_whose_fisher_is_all_zero_gets_a_delta_of_zero_and_a_warning_with_its_name() -> None:
    network, fisher = Network(), fisher_of(Network(), [])
    for _ in range(2):
        fisher.update({name: layer for name, layer in captured(network, pictures()).items() if name != "tokens"})
        if fisher.stage == "covariances":
            fisher.next_stage()
    with pytest.warns(UserWarning, match=r"layer tokens is all zero") as caught:
        fisher.finalize(0.1)
    assert len(caught) == 1
    step = fisher.precondition(random_like(fisher))
    assert not step["tokens.weight"].any()
    assert not step["tokens.bias"].any()
    assert step["conv.weight"].all()
    assert fisher.quadratic(step).isfinite()
    # As the diagonal has it: what nothing holds in place is not free.
    assert fisher.quadratic(of_layer(random_like(fisher), "tokens")).isinf()


@pytest.mark.parametrize("failing", ["raises", "not finite"])
def test_decomposition_that_fails_is_reported_and_leaves_the_diagonal(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eigh(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    network, batch = Network(), pictures()
    fisher = fisher_of(network, [batch])
    if failing == "raises":
        monkeypatch.setattr(torch.linalg, "eigh", eigh)
    else:
        for tensor in fisher.tensors().values():
            tensor.view(-1)[0] = float("nan")
    with pytest.warns(UserWarning, match="No eigenvectors for the (inputs|outputs) of layer") as caught:
        fisher.next_stage()
    assert len(caught) == 2 * len(LAYERS)
    assert any("the outputs of layer conv" in str(warning.message) for warning in caught)
    fisher.update(captured(network, batch))
    diagonal = DiagonalFisher(fisher.layers)
    diagonal.update(captured(network, batch))
    for one in (fisher, diagonal):
        one.finalize(0.1)
    gradient = random_like(fisher)
    for name, step in diagonal.precondition(gradient).items():
        close(fisher.precondition(gradient)[name], step, 1e-12)


def test_eigenvectors_are_taken_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(matrix.dtype) or eigh(matrix))
    fisher = fisher_of(Network(), [pictures()])
    fisher.to("cpu", torch.float32)
    fisher.next_stage()
    assert seen == [torch.float64] * 2 * len(LAYERS)
    assert {tensor.dtype for tensor in fisher.tensors().values()} == {torch.float32}


def test_stage_without_samples_warns_or_is_an_input_error() -> None:
    fisher = fisher_of(Network(), [])
    with pytest.warns(UserWarning, match="no covariance of any sample"):
        fisher.next_stage()
    with pytest.raises(InputError, match="no sample"):
        fisher.finalize(0.1)


# --- stages and sums


def test_merging_within_each_stage_is_addition() -> None:
    network, first, second = Network(), pictures(9), pictures(7, seed=1)
    whole = fisher_of(network, [first], [second])
    merged = fisher_of(network, [first[:4]])
    merged.merge(fisher_of(network, [first[4:]]))
    assert merged.count == 9
    merged.next_stage()
    other = merged.empty()
    assert (other.count, other.stage) == (0, "eigenvalues")
    merged.update(captured(network, second[:2]))
    other.update(captured(network, second[2:]))
    before = {name: tensor.clone() for name, tensor in other.tensors().items()}
    merged.merge(other)
    assert merged.count == 7
    for name in LAYERS:
        close(dense(merged, name), dense(whole, name), 1e-12)
    merged.update(captured(network, second))
    assert all(torch.equal(other.tensors()[name], tensor) for name, tensor in before.items())


def test_merging_another_stage_or_within_other_bases_is_an_input_error() -> None:
    network = Network()
    covariances, eigenvalues = fisher_of(network, [pictures()]), fisher_of(network, [pictures()], [pictures()])
    with pytest.raises(InputError, match=r"collects eigenvalues can't be added to one that collects covariances"):
        covariances.merge(eigenvalues)
    before = {name: tensor.clone() for name, tensor in eigenvalues.tensors().items()}
    with pytest.raises(InputError, match=r"differ in bases/conv/inputs"):
        eigenvalues.merge(fisher_of(network, [pictures(seed=1)], [pictures()]))
    assert all(torch.equal(eigenvalues.tensors()[name], tensor) for name, tensor in before.items())
    with pytest.raises(InputError, match="diagonal Fisher"):
        eigenvalues.merge(DiagonalFisher(eigenvalues.layers))


def test_bases_keep_their_precision_when_sums_are_cast() -> None:
    fisher = fisher_of(Network(), [pictures()], [pictures()])
    bases = {name: tensor for name, tensor in fisher.tensors().items() if not fisher.is_sum(name)}
    fisher.to("cpu", torch.float32)
    assert all(torch.equal(fisher.tensors()[name], basis) for name, basis in bases.items())
    assert fisher.tensors()["eigenvalues/conv"].dtype == torch.float32


def test_what_is_asked_in_the_wrong_stage_is_an_input_error() -> None:
    fisher = fisher_of(Network(), [pictures()])
    with pytest.raises(InputError, match=r"covariances of 8 samples but no eigenvalues.*--kind ekfac"):
        fisher.finalize(0.1)
    fisher.next_stage()
    with pytest.raises(InputError, match="already, which is the last"):
        fisher.next_stage()
    with pytest.raises(InputError, match="no further stage"):
        DiagonalFisher(fisher.layers).next_stage()
    fisher.update(captured(Network(), pictures()))
    with pytest.raises(InputError, match=r"Damping.*-0\.1"):
        fisher.finalize(-0.1)
    with pytest.raises(RuntimeError, match="finalize"):
        fisher.precondition(random_like(fisher))
    fisher.finalize(0.1)
    with pytest.raises(InputError, match="weight and bias of layer conv as one matrix"):
        fisher.precondition({"conv.bias": torch.zeros(3)})
    fisher.tensors()["eigenvalues/tokens"][0, 0] = float("inf")
    with pytest.raises(InputError, match="tokens is not finite"):
        fisher.finalize(0.1)


@pytest.mark.parametrize("stage", ["covariances", "eigenvalues"])
def test_sums_that_changed_must_be_finalized_again(stage: str) -> None:
    fisher = fisher_of(Network(), [pictures()], [pictures()])
    fisher.finalize(0.1)
    other = fisher_of(Network(), [pictures()], None if stage == "covariances" else [pictures()])
    fisher.load_state(other.state())
    assert fisher.stage == stage
    with pytest.raises(RuntimeError, match="finalize"):
        fisher.quadratic(random_like(fisher))


def test_layer_whose_factors_do_not_fit_is_refused_with_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing of this size is made.
    spec = LayerSpec("up.conv", (1280, 2560, 3, 3), True)
    with pytest.raises(InputError, match=r"up\.conv are 23041 × 23041 and 1280 × 1280, 1\.98 GiB.*limit of 1\.00 GiB"):
        EKFACFisher({"up.conv": spec})
    small = LayerSpec("layer", (2, 3), True)
    monkeypatch.setattr(kronecker, "FACTOR_BYTES", 4 * (4**2 + 2**2))
    EKFACFisher({"layer": small})
    monkeypatch.setattr(kronecker, "FACTOR_BYTES", 4 * (4**2 + 2**2) - 1)
    with pytest.raises(InputError, match="4 × 4 and 2 × 2"):
        EKFACFisher({"layer": small})


# --- state and file


@pytest.mark.parametrize("stage", ["covariances", "eigenvalues"])
def test_file_and_state_bring_everything_back_and_go_on(stage: str, tmp_path: Path) -> None:
    network, batch = Network(), pictures()
    fisher = fisher_of(network, [batch], None if stage == "covariances" else [batch])
    fisher.provenance = {"steps": [3, 9]}
    fisher.weights = random_like(fisher)
    fisher.save(tmp_path / "fisher.safetensors")
    assert read_about(tmp_path / "fisher.safetensors")["stage"] == stage
    torch.save(fisher.state(), tmp_path / "state.pt")
    loaded, restored = load_fisher(tmp_path / "fisher.safetensors"), EKFACFisher(fisher.layers)
    restored.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (loaded.provenance, loaded.weights.keys()) == (fisher.provenance, fisher.weights.keys())
    fisher.update(captured(network, pictures(seed=2)))
    for one in (loaded, restored):
        assert isinstance(one, EKFACFisher)
        assert (one.stage, one.count, list(one.layers)) == (stage, 8, list(LAYERS))
        one.update(captured(network, pictures(seed=2)))
        assert one.count == fisher.count
        assert one.tensors().keys() == fisher.tensors().keys()
        assert all(torch.equal(one.tensors()[name], tensor) for name, tensor in fisher.tensors().items())


def test_state_is_a_copy() -> None:
    fisher = fisher_of(Network(), [pictures()], [pictures()])
    state = fisher.state()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    fisher.update(captured(Network(), pictures()))
    assert all(torch.equal(state["tensors"][name], tensor) for name, tensor in before.items())


def test_file_of_a_mixture_of_stages_or_other_layers_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher = fisher_of(Network(), [pictures()], [pictures()])
    fisher.save(path)
    with safetensors.safe_open(path, "pt") as file:
        about = {"lightning_unlearn": json.dumps(json.loads(file.metadata()["lightning_unlearn"]) | {"format": 1})}
    mixed = {f"fisher/{name}": tensor.contiguous() for name, tensor in fisher.tensors().items()}
    mixed["fisher/covariances/conv/inputs"] = mixed.pop("fisher/bases/conv/inputs")
    safetensors.torch.save_file(mixed, path, about)
    with pytest.raises(InputError, match=r"other layers.*no stage"):
        load_fisher(path)


# --- the accumulator


class Training(LightningModule):
    def __init__(self, learning_rate: float = 0.0, manual: bool = False) -> None:
        super().__init__()
        self.unet = Network()
        self.learning_rate = learning_rate
        self.automatic_optimization = not manual
        self.seen: list[Pictures] = []

    def training_step(self, batch: Pictures, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        loss = self.unet(batch).mean()
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for _ in range(3):  # as of several optimizers: the batches are what counts
                self.optimizers().step()  # type: ignore[union-attr]
            self.zero_grad()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.5)


def accumulator(**settings: Any) -> FisherAccumulator:
    return FisherAccumulator(**{"parameters": "all", "fisher": "ekfac", **settings})


def trainer_for(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    one = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), **{**quiet, **one, **settings})


def train(
    folder: Path,
    module: Training,
    watcher: FisherAccumulator | None = None,
    batch_size: int = 3,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> None:
    callbacks = [watcher or accumulator(), *settings.pop("callbacks", [])]
    trainer = trainer_for(folder, *callbacks, **{"max_epochs": 4, **settings})
    trainer.fit(module, DataLoader(pictures(8), batch_size=batch_size), ckpt_path=ckpt_path)  # type: ignore[arg-type]


def fit(folder: Path, *arguments: Any, **settings: Any) -> Fisher:
    """Train, and read the file that the callback wrote."""
    train(folder, *arguments, **settings)
    return load_fisher(folder / "fisher.safetensors")


def assert_same(found: Fisher, expected: Fisher) -> None:
    assert found.count == expected.count
    for name in LAYERS:
        close(dense(found, name), dense(expected, name))


@pytest.mark.parametrize(
    ("settings", "trainer", "covariances", "eigenvalues"),
    [  # 3 batches an epoch of 4 epochs: batches 0 to 11, by default one optimizer step each
        ({}, {}, range(6), range(6, 12)),
        ({"start_step": 4}, {}, range(4, 8), range(8, 12)),
        ({"start_epoch": 2}, {}, range(6, 9), range(9, 12)),
        ({}, {"max_steps": 5}, range(3), range(3, 5)),
        ({}, {"max_steps": 4, "max_epochs": -1}, range(2), range(2, 4)),
        ({}, {"accumulate_grad_batches": 3}, range(6), range(6, 12)),
        ({"eigenvalue_step": 2}, {}, range(2), range(2, 12)),
        ({"eigenvalue_epoch": 3}, {}, range(9), range(9, 12)),
        ({"eigenvalue_step": 4, "eigenvalue_epoch": 1}, {}, range(4), range(4, 12)),
        ({"every_n_batches": 2, "start_epoch": 1, "eigenvalue_epoch": 2}, {}, [3, 5], [6, 8, 9, 11]),
    ],
    ids=str,
)
def test_windows_are_set_or_half_of_the_steps(
    settings: dict[str, Any], trainer: dict[str, Any], covariances: Any, eigenvalues: Any, tmp_path: Path
) -> None:
    module = Training()
    fisher = fit(tmp_path, module, accumulator(**settings), **trainer)
    windows = [[module.seen[batch] for batch in window] for window in (covariances, eigenvalues)]
    assert_same(fisher, fisher_of(module.unet, *windows))
    step = eigenvalues[0] // trainer.get("accumulate_grad_batches", 1)
    assert fisher.provenance["eigenvalues_from_step"] == step
    assert fisher.weights.keys() == fisher.parameter_shapes.keys()


def test_half_way_is_counted_in_batches_with_manual_optimization(tmp_path: Path) -> None:
    module = Training(manual=True)
    assert_same(fit(tmp_path, module), fisher_of(module.unet, module.seen[:6], module.seen[6:]))


def test_training_is_bit_for_bit_the_one_without_it(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [accumulator()]):
        torch.manual_seed(5)
        module = Training(0.1)
        loader = DataLoader(pictures(8), batch_size=3, shuffle=True)  # type: ignore[arg-type]
        trainer_for(tmp_path, *callbacks, max_epochs=3).fit(module, loader)
        ends.append((module.state_dict(), torch.get_rng_state()))
    assert all(torch.equal(ends[1][0][name], tensor) for name, tensor in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("save_in_checkpoint", [True, False])
@pytest.mark.parametrize("step", [3, 6, 9])  # among the covariances, between the stages, among the eigenvalues
def test_training_resumed_in_any_stage_gives_the_same_file(tmp_path: Path, step: int, save_in_checkpoint: bool) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="{step}", save_top_k=-1)
    settings: dict[str, Any] = {"enable_checkpointing": True}
    whole = fit(
        tmp_path, Training(0.1), accumulator(save_in_checkpoint=save_in_checkpoint), callbacks=[saver], **settings
    )
    (tmp_path / "fisher.safetensors").unlink()
    module = Training(0.1)
    resumed = fit(
        tmp_path,
        module,
        accumulator(save_in_checkpoint=save_in_checkpoint),
        ckpt_path=tmp_path / "checkpoints" / f"step={step}.ckpt",
    )
    assert len(module.seen) == 12 - step
    assert_same(resumed, whole)
    assert resumed.count == 16
    assert resumed.provenance == whole.provenance
    assert resumed.provenance["eigenvalues_from_step"] == 6


def test_second_fit_goes_on_with_the_eigenvalues(tmp_path: Path) -> None:
    watcher, module = accumulator(), Training()
    trainer = trainer_for(tmp_path, watcher, max_epochs=2)
    for epochs in (2, 3):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(module, DataLoader(pictures(8), batch_size=3))  # type: ignore[arg-type]
    expected = fisher_of(module.unet, module.seen[:3], module.seen[3:])
    assert_same(load_fisher(tmp_path / "fisher.safetensors"), expected)
    assert_same(watcher.total(), expected)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(pictures(6))


def test_training_of_unknown_length_needs_the_window(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set eigenvalue_step or eigenvalue_epoch"):
        trainer_for(tmp_path, accumulator(), max_epochs=2).fit(Training(), DataLoader(Stream(), batch_size=3))
    module, watcher = Training(), accumulator(eigenvalue_epoch=1)
    trainer_for(tmp_path, watcher, max_epochs=2).fit(module, DataLoader(Stream(), batch_size=3))
    expected = fisher_of(module.unet, module.seen[:2], module.seen[2:])
    assert_same(load_fisher(tmp_path / "fisher.safetensors"), expected)


def test_training_that_ends_before_the_eigenvalues_warns_and_writes_those_of_the_product(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, accumulator(eigenvalue_step=99), max_epochs=1)
    with pytest.warns(UserWarning, match=r"covariances of 8 samples, but training ended before eigenvalues"):
        trainer.fit(Training(), DataLoader(pictures(8), batch_size=3))  # type: ignore[arg-type]
    fisher = load_fisher(tmp_path / "fisher.safetensors")
    assert (fisher.count, fisher.stage) == (8, "eigenvalues")
    assert "K-FAC" in fisher.provenance["eigenvalues"]


@pytest.mark.parametrize(
    "settings",
    [
        {"eigenvalue_step": 3, "fisher": "diagonal"},
        {"eigenvalue_epoch": 0},
        {"eigenvalue_step": 2, "start_step": 2},
        {"eigenvalue_epoch": 1, "start_epoch": 1},
    ],
    ids=str,
)
def test_window_that_can_not_be_is_an_input_error(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="eigenvalue_step"):
        accumulator(**settings)


# --- several processes


def run_rank(folder: Path) -> None:
    """What each of two processes does: a whole training, and two that are resumed from checkpoints of it."""
    for name, step in (("whole", None), ("early", 2), ("late", 6)):
        saver = ModelCheckpoint(dirpath=folder / "checkpoints", filename="{step}", save_top_k=-1)
        train(
            folder / name,
            Training(),
            batch_size=2,
            ckpt_path=None if step is None else folder / "checkpoints" / f"step={step}.ckpt",
            callbacks=[saver] if step is None else [],
            enable_checkpointing=step is None,
            devices=2,
            strategy="ddp",
        )


def test_two_processes_give_the_file_of_one_also_after_a_resume(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path)
    # Weights do not move and an epoch is two steps in either way, so one process sees the same samples in each stage.
    alone = fit(tmp_path / "alone", Training(), batch_size=4)
    for name in ("whole", "early", "late"):
        assert_same(load_fisher(tmp_path / name / "fisher.safetensors"), alone)


# --- the command


def test_command_splits_its_passes_and_its_file_unlearns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, path = write_config(tmp_path / "toy.yaml"), tmp_path / "ekfac.safetensors"
    quiet = ("--trainer.enable_progress_bar", "false")
    assert main(["fisher", "--config", config, "--kind", "ekfac", "--passes", "1", *quiet]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "--passes must be at least 2, one for covariances and one for eigenvalues, but is 1" in said[-1]
    run("fisher", "--config", config, "--kind", "ekfac", "--passes", "3", "--output", path, *quiet)
    assert "3 passes (1 for covariances, 2 for eigenvalues)" in capsys.readouterr().out
    fisher = load_fisher(path)
    assert isinstance(fisher, EKFACFisher)
    assert (fisher.stage, fisher.count) == ("eigenvalues", 2 * SAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher.finalize(0.1)
    output = tmp_path / "run"
    run("attribute", "--config", config, "--output", output, "--model.init_args.fisher", path, *quiet)
    assert len(read_scores(output).keys) == SAMPLES


def test_a_squared_norm_is_never_below_zero() -> None:
    """Two positions that cancel but for rounding, in a layer so wide that the gradient itself is not formed."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(1, 1, 64, generator=generator)
        gradients = torch.randn(1, 1, 64, generator=generator)
        layer = CapturedLayer(torch.cat([inputs, inputs], 1), torch.cat([gradients, -gradients * (1 + 1e-7)], 1))
        assert float(kronecker.squared_norm(layer)) >= 0


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))


def test_a_basis_that_layers_share_is_stored_once(tmp_path: Path) -> None:
    fisher = EKFACFisher({name: LayerSpec(name, (2, 3), has_bias=False) for name in ("k", "v")})
    inputs = torch.randn(4, 5, 3)
    for _ in range(2):
        both = {name: CapturedLayer(inputs, torch.randn(4, 5, 2)) for name in ("k", "v")}
        fisher.update(both)
        if fisher.stage == "covariances":
            fisher.save(tmp_path / "sums.safetensors")
            fisher.next_stage()
    fisher.save(tmp_path / "fisher.safetensors")
    names = safetensors.torch.load_file(tmp_path / "fisher.safetensors")
    assert "fisher/bases/k/inputs" in names
    assert "fisher/bases/v/inputs" not in names
    read = EKFACFisher.load(tmp_path / "fisher.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.tensors().items()} == {
        name: tensor.tolist() for name, tensor in fisher.tensors().items()
    }
    # What is read lies in memory of its own: sums are added to in place.
    sums = EKFACFisher.load(tmp_path / "sums.safetensors")
    before = sums.tensors()["covariances/v/inputs"].clone()
    sums.update(both)
    torch.testing.assert_close(sums.tensors()["covariances/v/inputs"], 2 * before)
