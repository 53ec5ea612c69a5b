from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import per_sample_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import DIM, LATENT, TOKENS, ToyDenoiser, ToyObjective, tiny_unet

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.capture import CapturedLayer, GradientCapture
from lightning_unlearn.weights.parameters import layer_parameters, select_layers


def capture_gradients(layers: dict[str, nn.Module], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Per-sample gradients ``(B, *parameter)`` of a sum of losses, by the code under test."""
    with GradientCapture(layers) as capture:
        loss().backward()
    gradients = {}
    for name, captured in capture.take().items():
        layer = layers[name]
        assert isinstance(layer.weight, Tensor)
        gradients[f"{name}.weight"] = captured.weight_gradients().reshape(len(captured), *layer.weight.shape)
        if layer.bias is not None:
            gradients[f"{name}.bias"] = captured.bias_gradients()
    return gradients


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=1e-12 * float(gradient.abs().max()), msg=name)


def check_layer(layer: nn.Module, inputs: Tensor) -> None:
    layer = layer.double()
    readout = torch.randn(layer(inputs)[0].shape, dtype=torch.float64)

    def loss_of(rows: slice) -> Tensor:
        return (layer(inputs[rows]).tanh() * readout).square().sum()

    found = capture_gradients({"layer": layer}, lambda: loss_of(slice(None)))
    parameters = {f"layer.{name}": parameter for name, parameter in layer.named_parameters()}
    assert_same(found, per_sample_gradients(lambda row: loss_of(slice(row, row + 1)), parameters, len(inputs)))


@given(
    batch=st.integers(1, 3),
    positions=st.lists(st.integers(1, 3), max_size=2),
    features=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_linear_of_any_shape_gives_each_samples_gradient(
    batch: int, positions: list[int], features: tuple[int, int], bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    check_layer(nn.Linear(*features, bias=bias), torch.randn(batch, *positions, features[0], dtype=torch.float64))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=PAIR,
    stride=PAIR,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_convolution_of_any_stride_padding_and_dilation_gives_each_samples_gradient(
    batch: int, channels: tuple[int, int], bias: bool, seed: int, **geometry: tuple[int, int]
) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(*channels, geometry.pop("kernel"), bias=bias, **geometry)
    check_layer(layer, torch.randn(batch, channels[0], 6, 7, dtype=torch.float64))


def test_whole_network_gives_each_samples_gradient() -> None:
    network = ToyDenoiser().double()
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, *LATENT, generator=generator, dtype=torch.float64)
    batch = ViewBatch(latents, {"text": torch.randn(3, TOKENS, DIM, generator=generator, dtype=torch.float64)})
    timesteps = torch.tensor([0, 4, 9])

    def loss_of(rows: slice) -> Tensor:
        views = ViewBatch(batch.latents[rows], {"text": batch.text[rows]})
        return ToyObjective()(network, views, timesteps[rows], noise[rows]).sum()

    layers = select_layers(network, "all")
    expected = per_sample_gradients(lambda row: loss_of(slice(row, row + 1)), layer_parameters(layers), 3)
    assert_same(capture_gradients(layers, lambda: loss_of(slice(None))), expected)


def unet_losses(network: nn.Module, prediction_type: Any = "epsilon") -> Callable[[slice], Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, *LATENT, generator=generator, dtype=torch.float64)
    text = torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64)
    objective = DenoisingObjective({}, prediction_type)
    timesteps = torch.tensor([50, 700])

    def loss_of(rows: slice) -> Tensor:
        return objective(network, ViewBatch(latents[rows], {"text": text[rows]}), timesteps[rows], noise[rows]).sum()

    return loss_of


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_unet_gives_each_samples_gradient_of_all_its_layers(prediction_type: str) -> None:
    network = tiny_unet().double()
    loss_of = unet_losses(network, prediction_type)
    layers = select_layers(network, "all")
    expected = per_sample_gradients(lambda row: loss_of(slice(row, row + 1)), layer_parameters(layers), 2)
    assert_same(capture_gradients(layers, lambda: loss_of(slice(None))), expected, rtol=1e-6)


class Reusing(nn.Module):
    """One layer on the token stream, on a pooled vector, and on another layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(3, 3)
        self.once = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.again(tokens)) + self.once(tokens)
        return torch.tanh(self.again(hidden)).sum(1) * self.again(tokens.mean(1))


def test_uses_of_one_layer_are_summed_before_squaring() -> None:
    torch.manual_seed(0)
    network = Reusing().double()
    tokens = torch.randn(3, 2, 3, dtype=torch.float64)
    parameters = dict(network.named_parameters())
    layers = select_layers(network, "all")
    expected = per_sample_gradients(lambda row: network(tokens[row : row + 1]).square().sum(), parameters, 3)
    assert_same(capture_gradients(layers, lambda: network(tokens).square().sum()), expected)


class Checkpointed(nn.Module):
    """A block that gradient checkpointing may run again during backward."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.linear = nn.Linear(3, 3)
        self.use_reentrant = use_reentrant

    def block(self, image: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(image)).flatten(2).mT
        return torch.tanh(self.linear(torch.tanh(self.linear(hidden))))

    def forward(self, image: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.block(image)
        found: Tensor = checkpoint(self.block, image, use_reentrant=self.use_reentrant)
        return found


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same(use_reentrant: bool) -> None:
    image = torch.randn(3, 2, 5, 5, dtype=torch.float64, requires_grad=True)  # reentrant needs an input with gradient
    found = []
    for way in (None, use_reentrant):
        network = Checkpointed(way).double()
        layers = select_layers(network, "all")
        found.append(capture_gradients(layers, lambda network=network: network(image).square().sum()))  # type: ignore[misc]
    assert_same(found[1], found[0])


def test_diffusers_gradient_checkpointing_gives_the_same() -> None:
    found = []
    for checkpointing in (False, True):
        network = tiny_unet().double().train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        layers = select_layers(network, "attention")
        loss_of = unet_losses(network)
        found.append(capture_gradients(layers, lambda loss_of=loss_of: loss_of(slice(None))))  # type: ignore[misc]
    assert_same(found[1], found[0])


def test_activation_that_works_in_place_changes_nothing() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 2, 4, 4)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 1, 1))
    found = capture_gradients(select_layers(network, "all"), lambda: network(image).square().sum())
    network[1].inplace = False
    assert_same(found, capture_gradients(select_layers(network, "all"), lambda: network(image).square().sum()))


def test_nothing_of_the_computation_changes() -> None:
    gradients = []
    for watched in (False, True):
        network = tiny_unet()
        loss_of = unet_losses(network.double())
        capture = GradientCapture(select_layers(network, "all"))
        if watched:
            capture.attach()
        state = torch.get_rng_state()
        loss_of(slice(None)).backward()
        assert torch.equal(torch.get_rng_state(), state)
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name])


def test_passes_without_gradient_and_while_disabled_are_not_seen() -> None:
    layer = nn.Linear(2, 2)
    with GradientCapture({"layer": layer}) as capture:
        with torch.no_grad():
            layer(torch.ones(3, 2))
        with torch.inference_mode():
            layer(torch.ones(3, 2))
        capture.enabled = False
        layer(torch.ones(3, 2)).sum().backward()
        assert not capture.pending
        assert capture.take() == {}
        capture.enabled = True
        layer(torch.ones(4, 2)).sum().backward()
        assert len(capture.take()["layer"]) == 4


def test_layer_that_no_gradient_reaches_is_left_out() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    with GradientCapture({"used": used, "unused": unused}) as capture:
        unused(torch.ones(3, 2))
        used(torch.ones(3, 2)).sum().backward()
    assert list(capture.take()) == ["used"]


def test_taking_and_clearing_start_anew() -> None:
    layer = nn.Linear(2, 1)
    with GradientCapture({"layer": layer}) as capture:
        layer(torch.ones(3, 2)).sum().backward()
        assert capture.pending
        assert len(capture.take()["layer"]) == 3
        assert not capture.pending
        layer(torch.ones(3, 2)).sum().backward()
        capture.clear()
        layer(torch.ones(5, 2)).sum().backward()
        assert capture.take()["layer"].inputs.shape == (5, 1, 2)


def test_layer_called_by_keyword_is_seen() -> None:
    layer = nn.Linear(2, 1)
    with GradientCapture({"layer": layer}) as capture:
        layer(input=torch.ones(3, 2)).sum().backward()
    assert torch.equal(capture.take()["layer"].inputs, torch.ones(3, 1, 2))


def test_hooks_are_gone_afterwards_and_nothing_is_kept_alive() -> None:
    layer = nn.Linear(2, 1)
    inputs = torch.ones(3, 2)
    with GradientCapture({"layer": layer}) as capture:
        layer(inputs).sum().backward()
    assert not layer._forward_hooks
    capture.attach()
    layer(inputs).sum().backward()
    capture.detach()
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs
    kept = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_to_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 2).to(dtype)
    with GradientCapture({"layer": layer}) as capture:
        (layer(torch.full((3, 2), 3.0, dtype=dtype)).float() * 1e-4).sum().backward()
    captured = capture.take()["layer"]
    assert captured.inputs.dtype == captured.output_gradients.dtype == torch.float32
    # The square of 3e-4 is below what float16 can hold.
    torch.testing.assert_close(captured.weight_gradients().square(), torch.full((3, 2, 2), 9e-8), rtol=0.02, atol=0)


def test_autocast_gives_float32_gradients_close_to_exact_ones() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    inputs = torch.randn(3, 2, 4)
    exact = capture_gradients(select_layers(network, "all"), lambda: network(inputs).square().sum())

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(inputs).float().square().sum()

    for name, gradient in capture_gradients(select_layers(network, "all"), under_autocast).items():
        assert gradient.dtype == torch.float32
        assert float((gradient - exact[name]).norm() / exact[name].norm()) < 0.02, name


def test_scaling_is_a_factor_on_each_samples_gradient() -> None:
    captured = CapturedLayer(torch.randn(3, 2, 4), torch.randn(3, 2, 5))
    factors = torch.tensor([2.0, 0.0, -1.0])
    torch.testing.assert_close(
        captured.scaled(factors).weight_gradients(), captured.weight_gradients() * factors[:, None, None]
    )
    torch.testing.assert_close(captured.scaled(3.0).bias_gradients(), captured.bias_gradients() * 3)


def test_layers_with_different_numbers_of_rows_are_an_input_error_that_names_them() -> None:
    few, many = nn.Linear(2, 2), nn.Linear(2, 2)
    with GradientCapture({"few": few, "many": many}) as capture:
        (few(torch.ones(1, 2)) + many(torch.ones(3, 2))).sum().backward()
    with pytest.raises(InputError, match=r"few: 1, many: 3.*patterns"):
        capture.take()


def test_one_layer_with_different_numbers_of_rows_is_an_input_error_that_names_it() -> None:
    layer = nn.Linear(2, 2)
    with GradientCapture({"layer": layer}) as capture:
        (layer(torch.ones(1, 2)) + layer(torch.ones(3, 2))).sum().backward()
    with pytest.raises(InputError, match=r"Layer layer was used on different numbers of rows"):
        capture.take()
