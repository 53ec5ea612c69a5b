from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import diagonal_fisher, flat, natural_gradient, per_sample_gradients, quadratic, sums_of_squares
from torch import Tensor, nn
from toys import DIM, LATENT, TOKENS, tiny_unet

import lightning_unlearn.fisher.diagonal as diagonal
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import DiagonalFisher, Fisher, load_fisher
from lightning_unlearn.fisher.files import read_about
from lightning_unlearn.weights.capture import CapturedLayer, GradientCapture
from lightning_unlearn.weights.parameters import LayerSpec, layer_parameters, layer_specs, select_layers

LINEAR, CONV = LayerSpec("linear", (3, 2), True), LayerSpec("block.conv", (2, 3, 2, 1), False)


def captured(spec: LayerSpec, samples: int, positions: int, seed: int = 0) -> CapturedLayer:
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = spec.weight_shape[0], math.prod(spec.weight_shape[1:])
    a = torch.randn(samples, positions, inputs, generator=generator, dtype=torch.float64)
    return CapturedLayer(a, torch.randn(samples, positions, outputs, generator=generator, dtype=torch.float64))


def gradients_of(layers: Mapping[str, CapturedLayer]) -> dict[str, Tensor]:
    """Per-sample gradients ``(B, *parameter)`` from captured ones, by loops."""
    found = {}
    for name, layer in layers.items():
        spec = {"linear": LINEAR, "block.conv": CONV}[name]
        rows = []
        for a, g in zip(layer.inputs, layer.output_gradients, strict=True):
            rows.append(sum(torch.outer(g[t], a[t]) for t in range(len(a))))
        found[f"{name}.weight"] = torch.stack(rows).reshape(-1, *spec.weight_shape)  # type: ignore[arg-type]
        if spec.has_bias:
            found[f"{name}.bias"] = layer.output_gradients.sum(1)
    return found


def both(samples: int = 5, seed: int = 0) -> dict[str, CapturedLayer]:
    return {"linear": captured(LINEAR, samples, 1, seed), "block.conv": captured(CONV, samples, 4, seed + 1)}


def fisher_of(*batches: Mapping[str, CapturedLayer]) -> DiagonalFisher:
    fisher = DiagonalFisher({"linear": LINEAR, "block.conv": CONV})
    for batch in batches:
        fisher.update(batch)
    return fisher


def random_like(fisher: Fisher, *leading: int, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = fisher.parameter_shapes.items()
    return {name: torch.randn(*leading, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-9) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=0, msg=f"{name}: {found[name]} {tensor}")


# --- the mathematics


@given(
    samples=st.integers(1, 6),
    positions=st.integers(1, 4),
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 4),
    chunk=st.sampled_from([1, 20, 4 * 2**20]),
)
@settings(max_examples=30)
def test_sums_are_squared_sample_gradients_for_any_shape_and_chunk(
    samples: int, positions: int, outputs: int, inputs: int, chunk: int
) -> None:
    spec = LayerSpec("layer", (outputs, inputs), True)
    layer = captured(spec, samples, positions)
    fisher = DiagonalFisher({"layer": spec})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagonal, "CHUNK_NUMEL", chunk)
        fisher.update({"layer": layer})
    gradient = torch.einsum("bto,bti->boi", layer.output_gradients, layer.inputs)
    expected = {"layer.weight": gradient, "layer.bias": layer.output_gradients.sum(1)}
    assert_same(fisher.tensors(), sums_of_squares(expected))
    assert fisher.count == samples


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_fisher_natural_gradient_and_quadratic_form_of_a_unet_are_the_reference(prediction_type: Any) -> None:
    network = tiny_unet().double()
    layers = select_layers(network, [".*attn2.*", "conv_in", r".*downsamplers\.0\.conv", r".*time_emb_proj"])
    kinds = {(type(layer), layer.bias is not None, getattr(layer, "stride", None)) for layer in layers.values()}
    assert kinds == {
        (nn.Linear, False, None),
        (nn.Linear, True, None),
        (nn.Conv2d, True, (1, 1)),
        (nn.Conv2d, True, (2, 2)),
    }
    objective = DenoisingObjective({}, prediction_type, snr_gamma=5.0)
    # Two samples with three captions each, every caption with its own timestep and noise: six views.
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, *LATENT, generator=generator, dtype=torch.float64).repeat_interleave(3, 0)
    text = torch.randn(6, TOKENS, DIM, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, *LATENT, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([1, 100, 999, 400, 500, 600])

    def loss_of(rows: slice) -> Tensor:
        return objective(network, ViewBatch(latents[rows], {"text": text[rows]}), timesteps[rows], noise[rows]).sum()

    fisher = DiagonalFisher(layer_specs(layers))
    with GradientCapture(layers) as capture:
        for rows in (slice(0, 4), slice(4, 6)):
            loss_of(rows).backward()
            fisher.update(capture.take())
    gradients = per_sample_gradients(lambda row: loss_of(slice(row, row + 1)), layer_parameters(layers), 6)
    assert fisher.count == 6
    expected = diagonal_fisher(gradients)
    for name, total in fisher.tensors().items():
        torch.testing.assert_close(total / 6, expected[name], rtol=1e-6, atol=1e-12 * float(expected[name].max()))

    fisher.finalize(damping=0.1)
    query = {name: gradient[0] for name, gradient in gradients.items()}
    step = fisher.precondition(query)
    torch.testing.assert_close(
        flat({name: step[name] for name in query}), natural_gradient(query, expected, 0.1), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(fisher.quadratic(step), quadratic(step, expected, 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_precondition_solves_the_damped_system(damping: float) -> None:
    fisher = fisher_of(both())
    fisher.finalize(damping)
    gradient = random_like(fisher)
    expected = natural_gradient(gradient, diagonal_fisher(gradients_of(both())), damping)
    torch.testing.assert_close(flat(fisher.precondition(gradient)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_quadratic_is_the_dense_form(damping: float) -> None:
    fisher = fisher_of(both())
    fisher.finalize(damping)
    delta = random_like(fisher)
    expected = quadratic(delta, diagonal_fisher(gradients_of(both())), damping)
    torch.testing.assert_close(fisher.quadratic(delta), expected, rtol=1e-6, atol=0)


def test_leading_dimensions_are_so_many_separate_vectors() -> None:
    fisher = fisher_of(both())
    fisher.finalize(0.1)
    stacked = random_like(fisher, 2, 3)
    steps, forms = fisher.precondition(stacked), fisher.quadratic(stacked)
    assert forms.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = {name: tensor[i, j] for name, tensor in stacked.items()}
            assert_same({name: step[i, j] for name, step in steps.items()}, fisher.precondition(one))
            torch.testing.assert_close(forms[i, j], fisher.quadratic(one))


def test_some_of_the_parameters_alone_are_enough() -> None:
    fisher = fisher_of(both())
    fisher.finalize(0.1)
    every = random_like(fisher)
    bias = {"linear.bias": every["linear.bias"]}
    assert_same(fisher.precondition(bias), {"linear.bias": fisher.precondition(every)["linear.bias"]})
    rest = {name: tensor for name, tensor in every.items() if name not in bias}
    torch.testing.assert_close(fisher.quadratic(bias) + fisher.quadratic(rest), fisher.quadratic(every))


def test_preconditioning_turns_the_quadratic_form_into_the_inner_product() -> None:
    fisher = fisher_of(both())
    fisher.finalize(0.1)
    gradient = random_like(fisher)
    step = fisher.precondition(gradient)
    torch.testing.assert_close(fisher.quadratic(step), flat(gradient) @ flat(step))


def test_damping_is_a_share_of_the_layers_own_mean_over_weight_and_bias() -> None:
    fisher = DiagonalFisher({"a": LayerSpec("a", (1, 2), True), "b": LayerSpec("b", (1, 1), False)})
    sums = {"a.weight": torch.tensor([[2.0, 4.0]]), "a.bias": torch.tensor([6.0]), "b.weight": torch.tensor([[100.0]])}
    fisher.load_tensors(sums)
    fisher.count = 2  # means 1, 2, 3 in layer a (their mean is 2) and 50 in layer b
    fisher.finalize(damping=0.5)
    ones = {name: torch.ones_like(tensor) for name, tensor in sums.items()}
    found = {name: 1 / value for name, value in fisher.precondition(ones).items()}
    expected = {
        "a.weight": torch.tensor([[2.0, 3.0]]),
        "a.bias": torch.tensor([4.0]),
        "b.weight": torch.tensor([[75.0]]),
    }
    assert_same(found, expected, rtol=1e-6)


# --- where there is no Fisher


def test_layer_whose_fisher_is_all_zero_gets_a_delta_of_zero_and_a_warning_with_its_name() -> None:
    batch = both()
    fisher = fisher_of({"linear": batch["linear"]}, {"linear": batch["linear"]})
    with pytest.warns(UserWarning, match=r"layer block\.conv is all zero") as caught:
        fisher.finalize(0.1)
    assert len(caught) == 1
    step = fisher.precondition(random_like(fisher))
    assert not step["block.conv.weight"].any()
    assert step["linear.weight"].all()
    assert all(tensor.isfinite().all() for tensor in step.values())
    assert fisher.quadratic(step).isfinite()
    # A change of a weight that nothing holds in place is not "free": the form is infinite there, as 1/F = 0 says.
    assert fisher.quadratic({"block.conv.weight": torch.ones(CONV.weight_shape)}).isinf()


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_weights_that_never_received_a_gradient_give_no_nan(damping: float) -> None:
    dead = captured(LINEAR, 4, 2)
    dead.inputs[..., 0] = 0
    fisher = DiagonalFisher({"linear": LINEAR})
    fisher.update({"linear": dead})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layer as a whole is alive
        fisher.finalize(damping)
    gradient = random_like(fisher)
    gradient["linear.weight"][:, 0] = 0
    step = fisher.precondition(gradient)
    assert all(tensor.isfinite().all() for tensor in step.values())
    assert not step["linear.weight"][:, 0].any()
    assert step["linear.weight"][:, 1].all()
    assert fisher.quadratic(step).isfinite()
    # The same holds for a query that does reach the weight; without damping it stays where it is.
    gradient["linear.weight"][:, 0] = 1
    step = fisher.precondition(gradient)
    assert all(tensor.isfinite().all() for tensor in step.values())
    assert step["linear.weight"][:, 0].any() == (damping > 0)


def test_fisher_without_samples_or_with_wrong_damping_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no sample"):
        fisher_of().finalize(0.1)
    with pytest.raises(InputError, match=r"Damping.*-0\.1"):
        fisher_of(both()).finalize(-0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sum_that_is_not_finite_is_an_input_error_that_names_the_layer(value: float) -> None:
    fisher = fisher_of(both())
    fisher.tensors()["block.conv.weight"][0, 0, 0, 0] = value
    with pytest.raises(InputError, match=r"block\.conv is not finite"):
        fisher.finalize(0.1)


@pytest.mark.parametrize(
    "change",
    [
        lambda fisher: fisher.update(both(seed=9)),
        lambda fisher: fisher.merge(fisher_of(both(seed=9))),
        lambda fisher: fisher.load_state(fisher_of(both(seed=9)).state()),
        lambda fisher: fisher.to("cpu", torch.float32),
    ],
)
def test_using_it_before_finalizing_or_after_the_sums_changed_is_refused(change: Any) -> None:
    fisher = fisher_of(both())
    with pytest.raises(RuntimeError, match="finalize"):
        fisher.precondition(random_like(fisher))
    fisher.finalize(0.1)
    fisher.precondition(random_like(fisher))
    change(fisher)
    with pytest.raises(RuntimeError, match="finalize"):
        fisher.quadratic(random_like(fisher))


# --- sums


def test_merging_is_addition() -> None:
    parts = [both(samples, seed) for seed, samples in enumerate((1, 4, 2))]
    together = fisher_of(*parts)
    merged = fisher_of(parts[0])
    for part in parts[1:]:
        merged.merge(fisher_of(part))
    assert_same(merged.tensors(), together.tensors())
    assert merged.count == together.count == 7
    merged.finalize(0.1)
    together.finalize(0.1)
    assert_same(merged.precondition(random_like(merged)), together.precondition(random_like(merged)))


def test_merging_leaves_the_other_alone() -> None:
    one, other = fisher_of(both()), fisher_of(both(seed=7))
    before = {name: tensor.clone() for name, tensor in other.tensors().items()}
    one.merge(other)
    one.update(both(seed=8))
    assert_same(other.tensors(), before)
    assert other.count == 5


def test_merging_keeps_the_wider_precision() -> None:
    narrow, wide = fisher_of(), fisher_of(both())  # a Fisher without samples starts in float32
    narrow.merge(wide)
    assert_same(narrow.tensors(), wide.tensors())


def test_merging_a_fisher_of_other_layers_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"1 layers.*2"):
        fisher_of(both()).merge(DiagonalFisher({"linear": LINEAR}))


def test_sums_are_taken_in_the_gradients_own_precision() -> None:
    fisher = fisher_of(both())
    assert {tensor.dtype for tensor in fisher.tensors().values()} == {torch.float64}
    fisher.to("cpu", torch.float32)
    assert {tensor.dtype for tensor in fisher.tensors().values()} == {torch.float32}


def test_sums_in_float64_are_not_narrowed_by_float32_gradients() -> None:
    fisher = DiagonalFisher({"linear": LINEAR})
    fisher.to("cpu", torch.float64)
    wide = captured(LINEAR, 3, 2)
    fisher.update({"linear": CapturedLayer(wide.inputs.float(), wide.output_gradients.float())})
    assert fisher.tensors()["linear.weight"].dtype == torch.float64


# --- state and file


def test_state_loads_with_weights_only_and_goes_on(tmp_path: Path) -> None:
    fisher = fisher_of(both())
    torch.save(fisher.state(), tmp_path / "state.pt")
    fisher.update(both(seed=3))
    restored = DiagonalFisher(fisher.layers)
    restored.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert restored.count == 5
    restored.update(both(seed=3))
    assert_same(restored.tensors(), fisher.tensors())


def test_loading_a_state_does_not_tie_the_two_together() -> None:
    state = fisher_of(both()).state()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    restored = fisher_of()
    restored.load_state(state)
    restored.update(both(seed=3))
    assert_same(state["tensors"], before)


def test_state_is_a_copy() -> None:
    fisher = fisher_of(both())
    state = fisher.state()
    fisher.update(both(seed=3))
    assert state["count"] == 5
    assert_same(state["tensors"], fisher_of(both()).tensors())


def test_state_of_other_layers_is_an_input_error() -> None:
    with pytest.raises(InputError, match="other layers"):
        DiagonalFisher({"linear": LINEAR}).load_state(fisher_of(both()).state())


def test_file_brings_everything_back(tmp_path: Path) -> None:
    fisher = fisher_of(both())
    fisher.provenance = {"steps": [3, 9], "module": "some.Module", "nested": {"averaged": True, "none": None}}
    fisher.weights = random_like(fisher)
    path = tmp_path / "new folder" / "fisher.safetensors"
    fisher.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["fisher.safetensors"]  # nothing temporary stays
    for loaded in (load_fisher(path), DiagonalFisher.load(str(path))):
        assert isinstance(loaded, DiagonalFisher)
        assert_same(loaded.tensors(), fisher.tensors(), rtol=0)
        assert_same(loaded.weights, fisher.weights, rtol=0)
        assert (loaded.layers, loaded.count, loaded.provenance) == (fisher.layers, 5, fisher.provenance)
        assert list(loaded.layers) == list(fisher.layers)
    about = read_about(path)
    assert (about["kind"], about["count"], about["provenance"]) == ("diagonal", 5, fisher.provenance)


def other_tensors(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    tensors.pop("fisher/linear.bias")
    about = read_about(path) | {"format": 1}  # as older versions wrote it, without a digest
    safetensors.torch.save_file(tensors, path, {"lightning_unlearn": json.dumps(about)})


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def with_about(**changes: Any) -> Any:
    def write(path: Path) -> None:
        about = json.dumps(read_about(path) | changes)
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"lightning_unlearn": about})

    return write


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.unlink(), "no Fisher at .*fisher"),
        (lambda path: path.write_bytes(b""), "not a Fisher"),
        (lambda path: path.write_bytes(b"not safetensors at all"), "not a Fisher"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "not a Fisher"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "not a Fisher"),
        (lambda path: safetensors.torch.save_file({"a": torch.ones(1)}, path), "not a Fisher"),
        (lambda path: safetensors.torch.save_file({"a": torch.ones(1)}, path, {"format": "pt"}), "not a Fisher"),
        (with_about(format=99), "format 99"),
        (with_about(kind="ekfoc"), "kind 'ekfoc'.*diagonal"),
        (other_tensors, "other layers"),
        (with_about(format=1, layers=[LINEAR.to_json()]), "other layers"),
        (with_about(layers=[LINEAR.to_json()]), "was altered after it was written; make it again"),
        (with_about(count=6), "was altered"),
        (with_about(format=1, count=-6), "its header says no count"),
        (with_about(format=1, count=6.5), "its header says no count"),
        (with_about(provenance=None), "its header says no provenance"),
        (with_about(format=1, layers=[{"name": 3}, 4]), r"is damaged \(\w+.*make it again"),
        (with_about(copies=3), "is damaged"),
        (with_about(digest=None), "was altered"),
        (one_bit, "was altered"),
    ],
)
def test_file_that_is_not_such_a_fisher_is_an_input_error(tmp_path: Path, spoil: Any, says: str) -> None:
    path = tmp_path / "fisher.safetensors"
    fisher_of(both()).save(path)
    spoil(path)
    with pytest.raises(InputError, match=says):
        load_fisher(path)


def test_file_of_another_kind_is_an_input_error_that_names_both(tmp_path: Path) -> None:
    class OtherFisher(DiagonalFisher):
        kind = "other"

    fisher_of(both()).save(tmp_path / "fisher.safetensors")
    with pytest.raises(InputError, match="holds a diagonal Fisher, not a other one"):
        OtherFisher.load(tmp_path / "fisher.safetensors")
