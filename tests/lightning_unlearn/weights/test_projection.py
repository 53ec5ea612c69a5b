"""Projected gradients are those of whole gradients, projected."""

from __future__ import annotations

import pytest
import torch
from toys import ToyDenoiser

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec, layer_specs, select_layers
from lightning_unlearn.weights.projection import Projection

SPEC = LayerSpec("layer", (6, 10), True)


def captured(seed: int = 0) -> CapturedLayer:
    generator = torch.Generator().manual_seed(seed)
    return CapturedLayer(
        torch.randn(3, 4, 10, generator=generator, dtype=torch.float64),
        torch.randn(3, 4, 6, generator=generator, dtype=torch.float64),
    )


def matrices(projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' matrices, as what is left of single entries shows them."""
    ones = CapturedLayer(torch.eye(10, dtype=torch.float64)[:, None], torch.zeros(10, 1, 6, dtype=torch.float64))
    ones.output_gradients[:, 0, 0] = 1
    outputs = CapturedLayer(torch.zeros(6, 1, 10, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[:, None])
    left = projection.of("layer", outputs)["layer.bias"].mT  # (k, o)
    products = projection.of("layer", ones)["layer.weight"].unflatten(1, (len(left), -1))  # P_o[:, 0] P_i[:, i]
    right = (products * left[:, 0][None, :, None]).sum(1) / left[:, 0].square().sum()
    return left, right.mT


def test_it_is_the_whole_gradient_between_two_matrices() -> None:
    layer, projection = captured(), Projection({"layer": SPEC}, 4)
    left, right = matrices(projection)
    found = projection.of("layer", layer)
    expected = left @ layer.weight_gradients() @ right.mT
    torch.testing.assert_close(found["layer.weight"], expected.flatten(1))
    torch.testing.assert_close(found["layer.bias"], layer.bias_gradients() @ left.mT)
    assert {name: values.shape[1] for name, values in found.items()} == projection.sizes
    # Orthogonal rows whose squared lengths keep a gradient's on average.
    torch.testing.assert_close(right @ right.mT, torch.eye(4, dtype=torch.float64) * 10 / 4)


def test_a_side_that_is_no_longer_than_wanted_stays_as_it_is() -> None:
    layer, projection = captured(), Projection({"layer": SPEC}, 10)
    found = projection.of("layer", layer)
    assert torch.equal(found["layer.weight"], layer.weight_gradients().flatten(1))
    assert torch.equal(found["layer.bias"], layer.bias_gradients())


def test_products_are_kept_on_average() -> None:
    one, other = captured(1), captured(2)
    true = (one.weight_gradients() * other.weight_gradients()).sum((1, 2))
    found = torch.stack(
        [
            (projection.of("layer", one)["layer.weight"] * projection.of("layer", other)["layer.weight"]).sum(1)
            for projection in (Projection({"layer": SPEC}, 3, seed) for seed in range(400))
        ]
    )
    assert ((found.mean(0) - true).abs() < 4 * found.std(0) / 400**0.5).all()
    assert (found.std(0) > 0).all()


def test_it_is_as_wide_as_the_numbers_let_it_be() -> None:
    specs = layer_specs(select_layers(ToyDenoiser(), "all"))
    widths = {side: Projection(specs, side).numbers for side in (1, 2, 3)}
    assert widths[1] == 2 * len(specs)
    assert Projection.within(specs, widths[2], 8).side == 2
    assert Projection.within(specs, widths[3] - 1, 8).side == 2
    assert Projection.within(specs, 10**6, 3).side == 3
    with pytest.raises(InputError, match="choose fewer layers, or more numbers"):
        Projection.within(specs, 2, 8)
