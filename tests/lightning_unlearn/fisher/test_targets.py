"""The Fisher with targets drawn from the model, against the dense Gauss-Newton matrix in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from command_toys import SAMPLES, run, toy_config, toy_folder, write_config
from lightning.pytorch import Trainer
from reference import gauss_newton, joined, min_snr_weight, per_sample_gradients, sum_of, sums_of_squares
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, tiny_unet, toy_fields, toy_shards

from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.samples import ViewBatch, decode_sample
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective, check_drawn, drawn_error
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, generator_for, tensors_digest
from lightning_unlearn.fisher import DiagonalFisher, EKFACFisher, Fisher, load_fisher
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.capture import GradientCapture
from lightning_unlearn.weights.parameters import LayerSpec, layer_parameters, layer_specs, select_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|returned `None`|eval mode|LeafSpec).*")

SHAPE = (2, 3, 2)
ELEMENTS = 12
TIMESTEPS = (3, 300, 900)
QUIET = ("--trainer.enable_progress_bar", "false")


class UNet2DConditionModel(nn.Module):
    """As small as one that is called like it can be: text into a Linear, then a Conv2d, linear or not."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.text = nn.Linear(2, SHAPE[0])
            self.conv = nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)
        self.linear = linear
        self.double()

    def forward(
        self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, *, return_dict: bool
    ) -> tuple[Tensor]:
        assert not return_dict
        added = self.text(encoder_hidden_states).mean(1)[:, :, None, None]
        if self.linear:  # in its weights
            return (self.conv(noisy) + added,)
        return (torch.tanh(self.conv(noisy + torch.tanh(added))),)


def views(mask: str) -> tuple[ViewBatch, Tensor, Tensor]:
    """Three views in float64, without a mask, with one of zeros and ones, or with shares."""
    generator = torch.Generator().manual_seed(6)
    latents, noise = torch.randn(2, 3, *SHAPE, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    shares = torch.rand(3, *SHAPE[1:], generator=generator, dtype=torch.float64)
    masks = {"none": None, "region": (shares > 0.5).double(), "shares": shares}
    return ViewBatch(latents, {"text": text}, masks[mask]), torch.tensor(TIMESTEPS), noise


def basis_of(row: int, mask: str) -> tuple[ViewBatch, Tensor, Tensor, Tensor]:
    """One view as often as its prediction has elements, each time with another basis vector for a normal draw.

    What is drawn enters linearly, so that the sum of gg' over a basis is its mean over normal draws, exactly.
    """
    batch, timesteps, noise = views(mask)
    rows = [row] * ELEMENTS
    repeated = ViewBatch(
        batch.latents[rows], {"text": batch.text[rows]}, None if batch.mask is None else batch.mask[rows]
    )
    return repeated, timesteps[rows], noise[rows], torch.eye(ELEMENTS, dtype=torch.float64).reshape(-1, *SHAPE)


def gradients_over_basis(objective: Objective, network: nn.Module, row: int, mask: str) -> Tensor:
    """``(elements, parameters)``."""
    batch, timesteps, noise, basis = basis_of(row, mask)

    def drawn(one: int) -> Tensor:
        part = slice(one, one + 1)
        alone = ViewBatch(
            batch.latents[part], {"text": batch.text[part]}, None if batch.mask is None else batch.mask[part]
        )
        return objective.drawn(network, alone, timesteps[part], noise[part], basis[part]).sum()

    found = per_sample_gradients(drawn, dict(network.named_parameters()), ELEMENTS)
    return torch.cat([gradient.flatten(1) for gradient in found.values()], 1)


def exact(objective: DenoisingObjective, network: nn.Module, row: int, mask: str) -> Tensor:
    """The dense Gauss-Newton matrix of a view's loss, from the formulas."""
    batch, timesteps, noise = views(mask)
    alpha_bar = float(objective.scheduler.alphas_cumprod.double()[timesteps[row]])
    noisy = alpha_bar**0.5 * batch.latents[row] + (1 - alpha_bar) ** 0.5 * noise[row]

    def predict(parameters: Mapping[str, Tensor]) -> Tensor:
        call = (noisy[None], timesteps[row : row + 1], batch.text[row : row + 1])
        prediction: Tensor = torch.func.functional_call(network, dict(parameters), call, {"return_dict": False})[0]
        return prediction

    shares = torch.ones(SHAPE, dtype=torch.float64) if batch.mask is None else batch.mask[row].expand(SHAPE)
    gamma = objective.snr_gamma
    weight = 1.0 if gamma is None else min_snr_weight(alpha_bar, gamma, objective.prediction_type)
    return gauss_newton(predict, {name: p.detach() for name, p in network.named_parameters()}, shares, weight)


def close(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    # The schedule is in float32.
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-7 * float(expected.abs().max()))


# --- the objective


@pytest.mark.parametrize("mask", ["none", "region", "shares"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_drawn_targets_give_the_gauss_newton_matrix(prediction_type: Any, snr_gamma: float | None, mask: str) -> None:
    objective, network = DenoisingObjective({}, prediction_type, snr_gamma), UNet2DConditionModel(linear=False)
    for row in range(len(TIMESTEPS)):
        gradients = gradients_over_basis(objective, network, row, mask)
        close(sum_of([torch.outer(g, g) for g in gradients]), exact(objective, network, row, mask))


@pytest.mark.parametrize("mask", ["none", "shares"])
@pytest.mark.parametrize(("prediction_type", "snr_gamma"), [("epsilon", None), ("epsilon", 5.0), ("sample", 5.0)])
def test_of_a_linear_network_it_is_the_hessian_of_the_loss(prediction_type: Any, snr_gamma: Any, mask: str) -> None:
    # No formula but the objective's own: drawn() belongs to this loss, its weights and its mask.
    objective, network = DenoisingObjective({}, prediction_type, snr_gamma), UNet2DConditionModel(linear=True)
    batch, timesteps, noise = views(mask)
    weights = dict(network.named_parameters())
    for row in range(len(TIMESTEPS)):
        loss = objective(network, batch, timesteps, noise)[row]
        first = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        entries = torch.cat([gradient.flatten() for gradient in first])
        second = [torch.autograd.grad(entry, list(weights.values()), retain_graph=True) for entry in entries]
        hessian = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in second])
        gradients = gradients_over_basis(objective, network, row, mask)
        close(gradients.T @ gradients, hessian)


def test_drawn_target_is_that_of_the_loss_at_it() -> None:
    # y = f - sqrt(D / 2 w) n, written into the loss of the formula, has the very gradient.
    objective, network = DenoisingObjective({}, "sample", 5.0), UNet2DConditionModel(linear=False)
    batch, timesteps, noise = views("none")
    normal = torch.randn(noise.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    noisy = objective.scheduler.add_noise(batch.latents, noise, timesteps)
    (prediction,) = network(noisy, timesteps, batch.text, return_dict=False)
    for row in range(len(TIMESTEPS)):
        alpha_bar = float(objective.scheduler.alphas_cumprod.double()[timesteps[row]])
        weight = min_snr_weight(alpha_bar, 5.0, "sample")
        target = prediction[row].detach() - (ELEMENTS / 2 / weight) ** 0.5 * normal[row]
        loss = weight * (prediction[row] - target).square().mean()
        drawn = objective.drawn(network, batch, timesteps, noise, normal)[row]
        for ours, theirs in zip(
            torch.autograd.grad(drawn, list(network.parameters())),
            torch.autograd.grad(loss, list(network.parameters()), retain_graph=True),
            strict=True,
        ):
            close(ours, theirs)


def test_both_kinds_of_fisher_collect_it() -> None:
    objective, network = DenoisingObjective({}, "v_prediction", 5.0), UNet2DConditionModel(linear=False)
    layers = select_layers(network, ["text", "conv"])
    diagonal, ekfac = DiagonalFisher(layer_specs(layers)), EKFACFisher(layer_specs(layers))
    diagonal.to("cpu", torch.float64)
    ekfac.to("cpu", torch.float64)
    for fisher in (diagonal, ekfac, ekfac):
        if ekfac.count:
            ekfac.next_stage()
        for row in range(len(TIMESTEPS)):
            batch, timesteps, noise, basis = basis_of(row, "none")
            with GradientCapture(layers) as capture:
                objective.drawn(network, batch, timesteps, noise, basis).sum().backward()
                fisher.update(capture.take())
    matrix = sum_of([exact(objective, network, row, "none") for row in range(len(TIMESTEPS))])
    entries = split(network, torch.arange(len(matrix)))
    for name, total in diagonal.tensors().items():
        close(total, split(network, matrix.diagonal())[name])
    for name in layers:
        places = joined(entries[f"{name}.weight"], entries[f"{name}.bias"])
        state = ekfac.tensors()
        basis = torch.kron(state[f"bases/{name}/outputs"], state[f"bases/{name}/inputs"])
        turned = basis.T @ matrix[places][:, places] @ basis
        close(state[f"eigenvalues/{name}"].flatten(), turned.diagonal(), 1e-5)


def split(network: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """A vector over all parameters as a tensor for each."""
    weights = dict(network.named_parameters())
    parts = vector.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


class OwnLoss(DenoisingObjective):
    """Another loss, whose drawn targets are not those that it inherits."""

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        return super().__call__(network, batch, timesteps, noise).exp()


class OwnBoth(OwnLoss):
    """One that says how."""

    def drawn(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
        return super().drawn(network, batch, timesteps, noise, normal)


class Named(DenoisingObjective):
    """The same loss under another name."""


def test_objective_that_does_not_say_how_targets_are_drawn_is_refused() -> None:
    batch, timesteps, noise = views("none")
    for objective in (ToyObjective(), OwnLoss({})):
        with pytest.raises(InputError, match=rf"^{type(objective).__name__} does not say .* method `drawn` .*\.$"):
            check_drawn(objective)
    with pytest.raises(InputError, match="ToyObjective does not say how targets are drawn"):
        ToyObjective().drawn(ToyDenoiser(), batch, timesteps, noise, noise)
    for objective in (DenoisingObjective({}), Named({}), OwnBoth({})):
        check_drawn(objective)


# --- the pass


class DrawnObjective(ToyObjective):
    """Keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[ViewBatch, Tensor, Tensor, Tensor | None]] = []

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        self.calls.append((batch, timesteps, noise, None))
        return super().__call__(network, batch, timesteps, noise)

    def drawn(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor, normal: Tensor) -> Tensor:
        self.calls.append((batch, timesteps, noise, normal))
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        return drawn_error(prediction, normal, None)


def passes(
    folder: Path, targets: Any, batch_size: int, seed: int = 0, epochs: int = 2
) -> tuple[Fisher, DrawnObjective]:
    """Passes over twelve samples, and what their objective saw."""
    shards = folder / "shards"
    if not shards.is_dir():
        toy_shards(shards)
    objective = DrawnObjective()
    frozen = FisherPass(ToyDenoiser(), objective, ["text", "conv_.*"], seed, targets)
    path = str(folder / "fisher.safetensors")
    accumulator = FisherAccumulator("network", ["text", "conv_.*"], fisher="diagonal", path=path)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[accumulator], max_epochs=epochs, **off)  # type: ignore[arg-type]
    trainer.fit(frozen, TrainingDataModule(str(shards), batch_size))
    assert accumulator.total().targets == targets
    return load_fisher(folder / "fisher.safetensors"), objective


def normals(objective: DrawnObjective) -> dict[tuple[int, str], Tensor]:
    """What each pass drew for each sample, which is known by its latent."""
    keys = {sample_latent(number).numpy().tobytes(): f"sample-{number:05d}" for number in range(12)}
    found: dict[tuple[int, str], Tensor] = {}
    rows = 0
    for batch, _, _, normal in objective.calls:
        assert normal is not None
        for latent, row in zip(batch.latents, normal, strict=True):
            found[rows // 12, keys[latent.numpy().tobytes()]] = row
            rows += 1
    assert len(found) == rows == 24
    return found


def sample_latent(number: int) -> Tensor:
    return decode_sample(toy_fields(number)).latent


def test_pass_with_drawn_targets_is_the_reference_and_the_draws_are_keyed(tmp_path: Path) -> None:
    fisher, objective = passes(tmp_path, "model", 4)
    assert (fisher.targets, fisher.count) == ("model", 24)
    seen, calls = normals(objective), list(objective.calls)
    for (epoch, key), normal in seen.items():
        expected = torch.randn(LATENT, generator=generator_for("fisher-targets", 0, epoch, key))
        assert torch.equal(normal, expected)
    # Per-sample gradients of what the objective was called with, in float64.
    network = ToyDenoiser().double()
    rows = [
        (ViewBatch(b.latents[n : n + 1].double(), {"text": b.text[n : n + 1].double()}), *(t[n : n + 1] for t in rest))
        for b, *rest in calls
        for n in range(4)
    ]

    def drawn(number: int) -> Tensor:
        batch, timesteps, noise, normal = rows[number]
        return objective.drawn(network, batch, timesteps, noise.double(), normal.double()).sum()

    gradients = per_sample_gradients(drawn, layer_parameters(select_layers(network, ["text", "conv_.*"])), 24)
    for name, total in sums_of_squares(gradients).items():
        torch.testing.assert_close(fisher.tensors()[name].double(), total, rtol=1e-4, atol=1e-6 * float(total.max()))

    # The same for other batches, another for another seed and in another pass; timesteps and noise are those of data.
    other = normals(passes(tmp_path, "model", 6)[1])
    assert all(torch.equal(other[place], normal) for place, normal in seen.items())
    reseeded = normals(passes(tmp_path, "model", 4, seed=1)[1])
    assert not any(torch.equal(reseeded[place], normal) for place, normal in seen.items())
    assert len({normal.numpy().tobytes() for normal in seen.values()}) == 24
    plain = passes(tmp_path, "data", 4)[1]
    for (_, timesteps, noise, _), (_, their_timesteps, their_noise, drawn_too) in zip(calls, plain.calls, strict=True):
        assert drawn_too is None
        assert torch.equal(timesteps, their_timesteps)
        assert torch.equal(noise, their_noise)


def test_pass_that_can_not_draw_is_refused_before_it_starts() -> None:
    with pytest.raises(InputError, match="ToyObjective does not say"):
        FisherPass(ToyDenoiser(), ToyObjective(), ["text"], targets="model")
    with pytest.raises(InputError, match="one of data, model, not 'labels'"):
        FisherPass(ToyDenoiser(), ToyObjective(), ["text"], targets="labels")  # type: ignore[arg-type]
    FisherPass(ToyDenoiser(), ToyObjective(), ["text"])


# --- record, merge and fingerprint


def small(kind: type[Fisher], targets: Any) -> Fisher:
    fisher = kind({"layer": LayerSpec("layer", (1, 2), False)})
    fisher.targets = targets
    return fisher


@pytest.mark.parametrize("kind", [DiagonalFisher, EKFACFisher])
def test_file_state_and_sums_keep_their_targets_and_do_not_mix(kind: type[Fisher], tmp_path: Path) -> None:
    drawn, plain = small(kind, "model"), small(kind, "data")
    drawn.save(tmp_path / "drawn.safetensors")
    plain.save(tmp_path / "plain.safetensors")
    assert read_about(tmp_path / "drawn.safetensors")["targets"] == "model"
    assert read_about(tmp_path / "plain.safetensors")["targets"] == "data"
    drawn, plain = load_fisher(tmp_path / "drawn.safetensors"), load_fisher(tmp_path / "plain.safetensors")
    assert (drawn.targets, plain.targets) == ("model", "data")
    assert drawn.empty().targets == "model"
    for one, other in ((drawn, plain), (plain, drawn)):
        with pytest.raises(InputError, match=rf"targets of the {other.targets} can't be added .* the {one.targets}: "):
            one.merge(other)
        with pytest.raises(InputError, match=rf"Fisher with the targets of the {other.targets}, not of the "):
            one.load_state(other.state())
    drawn.merge(small(kind, "model"))
    drawn.load_state(drawn.state())
    # A checkpoint from before there was a choice.
    old = {name: value for name, value in plain.state().items() if name != "targets"}
    plain.load_state(old)
    with pytest.raises(InputError, match="targets of the data"):
        drawn.load_state(old)


def test_older_files_are_of_the_data_and_keep_their_fingerprint(tmp_path: Path) -> None:
    source = toy_folder() / "fisher.safetensors"
    with safetensors.safe_open(source, "pt") as file:
        about = json.loads(file.metadata()["lightning_unlearn"])
    assert about.pop("targets") == "data"
    about["format"] = 1
    tensors = safetensors.torch.load_file(source)
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", {"lightning_unlearn": json.dumps(about)})
    about["targets"] = "model"
    safetensors.torch.save_file(tensors, tmp_path / "drawn.safetensors", {"lightning_unlearn": json.dumps(about)})

    def fingerprint(path: Path) -> str:
        weights = str(toy_folder() / "network.pt")
        return UnlearningModule(tiny_unet(), DenoisingObjective(), str(path), weights=weights).fisher_fingerprint()

    old = load_fisher(tmp_path / "old.safetensors")
    assert old.targets == "data"
    assert load_fisher(tmp_path / "drawn.safetensors").targets == "model"
    # The very fingerprint that earlier versions gave.
    before = digest(old.kind, old.count, tensors_digest(old.tensors()))
    assert fingerprint(tmp_path / "old.safetensors") == fingerprint(source) == before
    assert fingerprint(tmp_path / "drawn.safetensors") != before


# --- the command


def test_command_takes_the_fisher_of_drawn_targets_in_both_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, path = write_config(tmp_path / "toy.yaml"), tmp_path / "ekfac.safetensors"
    options = ("--config", config, "--targets", "model", *QUIET)
    run("fisher", *options, "--kind", "ekfac", "--passes", "2", "--output", path)
    assert "Taking the Fisher with targets drawn from the model in 2 passes" in capsys.readouterr().out
    fisher = load_fisher(path)
    assert (fisher.kind, fisher.stage, fisher.count, fisher.targets) == ("ekfac", "eigenvalues", SAMPLES, "model")

    content = toy_config()
    content["model"]["init_args"]["objective"] = {"class_path": "toys.ToyObjective"}
    theirs = write_config(tmp_path / "theirs.yaml", content)
    assert main(["fisher", "--config", theirs, "--targets", "model", *QUIET]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "ToyObjective does not say how targets are drawn from the model" in said[-1]
    assert not (tmp_path / "fisher.safetensors").exists()
