"""The diagonal of the Fisher."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.base import Fisher
from lightning_unlearn.fisher.sums import accumulate
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec

# Per-sample gradients are formed for as many samples at a time as fit in this many numbers (16 MiB in float32).
CHUNK_NUMEL = 4 * 2**20


class DiagonalFisher(Fisher):
    r"""Mean squared per-sample gradient of every weight, as in elastic weight consolidation.

    .. math:: F_{jj} = \frac{1}{n} \sum_{s=1}^{n} \left(\partial L_s / \partial θ_j\right)^2

    Kirkpatrick et al. (arXiv 1612.00796); for attribution Wang et al. (arXiv 2406.09408, Eqs. 4 and 5). Theirs has no
    damping and divides by zero at weights that never received a gradient; here a share of the layer's mean is added.

    Args:
        layers: The layers it covers, by name.

    Example:
        >>> spec = LayerSpec("layer", (1, 2), False)
        >>> fisher = DiagonalFisher({"layer": spec})
        >>> a, g = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]]), torch.ones(2, 1, 1)
        >>> fisher.update({"layer": CapturedLayer(a, g)})
        >>> fisher.finalize(damping=0.0)
        >>> fisher.precondition({"layer.weight": torch.tensor([[10.0, 0.0]])})["layer.weight"]
        tensor([[2., 0.]])
    """

    kind: ClassVar[str] = "diagonal"

    def __init__(self, layers: Mapping[str, LayerSpec]) -> None:
        super().__init__(layers)
        self.sums: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in self.parameter_shapes.items()}
        self._damped: dict[str, Tensor] | None = None

    def update(self, captured: Mapping[str, CapturedLayer]) -> None:
        """Add squared per-sample gradients; see :meth:`Fisher.update`.

        Args:
            captured: Layer name to per-sample gradients.
        """
        self._damped = None
        self.count += max(len(layer) for layer in captured.values())
        for name, layer in captured.items():
            spec = self.layers[name]
            accumulate(self.sums, f"{name}.weight", sum_of_squares(layer).reshape(spec.weight_shape))
            if spec.has_bias:
                accumulate(self.sums, f"{name}.bias", layer.bias_gradients().square().sum(0))

    def tensors(self) -> dict[str, Tensor]:
        """The sums of squares; see :meth:`Fisher.tensors`.

        Returns:
            Parameter name to tensor of its shape.
        """
        return self.sums

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the sums; see :meth:`Fisher.load_tensors`.

        Args:
            tensors: Parameter name to tensor.

        Raises:
            InputError: If names or shapes are not those of the layers.
        """
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != self.parameter_shapes:
            raise InputError("These sums are of other layers than this Fisher's.")
        self.sums = {name: tensors[name] for name in self.sums}
        self._damped = None

    def finalize(self, damping: float = 0.001) -> None:
        """Take the mean and add the damping; see :meth:`Fisher.finalize`.

        Args:
            damping: Share of each layer's mean (over weight and bias) that is added to its diagonal.

        Raises:
            InputError: If no sample was seen, the damping is negative, or a sum is not finite.
        """
        if self.count == 0:
            raise InputError("The Fisher has seen no sample; let the accumulator run for at least one batch.")
        if not 0 <= damping < float("inf"):
            raise InputError(f"Damping must be finite and not negative, but is {damping}.")
        self._damped = {}
        for spec in self.layers.values():
            means = {name: self.sums[name] / self.count for name in spec.parameter_shapes}
            numel = sum(mean.numel() for mean in means.values())
            layer_mean = sum(float(mean.cpu().double().sum()) for mean in means.values()) / numel
            if not layer_mean < float("inf"):
                raise InputError(f"The Fisher of layer {spec.name} is not finite; make it again.")
            if layer_mean == 0:
                warnings.warn(
                    f"The Fisher of layer {spec.name} is all zero: no gradient reached it, and it is not unlearned."
                )
            for name, mean in means.items():
                damped = mean + damping * layer_mean
                # Without a Fisher nothing holds a weight in place, so it must not move at all: 1/∞ = 0.
                self._damped[name] = damped.masked_fill(damped == 0, float("inf"))

    def _finalized(self) -> dict[str, Tensor]:
        if self._damped is None:
            raise RuntimeError("finalize() comes before this.")
        return self._damped

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Divide by the damped diagonal; see :meth:`Fisher.precondition`.

        Args:
            gradients: Parameter name to ``(*, *parameter)``.

        Returns:
            The same shapes.
        """
        damped = self._finalized()
        return {name: gradient / damped[name].to(gradient) for name, gradient in gradients.items()}

    def quadratic(self, delta: Mapping[str, Tensor]) -> Tensor:
        """``Σ_j (F_jj + damping) δ_j²``; see :meth:`Fisher.quadratic`.

        Args:
            delta: Parameter name to ``(*, *parameter)``.

        Returns:
            ``(*,)``.
        """
        damped = self._finalized()
        terms = []
        for name, change in delta.items():
            dimensions = tuple(range(change.ndim - damped[name].ndim, change.ndim))
            # 0 · ∞ is 0 here, and so is its derivative.
            weights = damped[name].to(change).where(change != 0, 0.0)
            terms.append((change.square() * weights).sum(dimensions))
        return torch.stack(terms).sum(0)


def sum_of_squares(layer: CapturedLayer) -> Tensor:
    """Squared gradients of a layer's weight, summed over samples: ``Σ_s (Σ_t g_t a_tᵀ)²``.

    Args:
        layer: Its captured gradients.

    Returns:
        ``(o, i)``.
    """
    if layer.inputs.shape[1] == 1:
        # One position: the square of an outer product is the outer product of squares.
        return layer.output_gradients[:, 0].square().mT @ layer.inputs[:, 0].square()
    numel = layer.inputs.shape[2] * layer.output_gradients.shape[2]
    step = max(1, CHUNK_NUMEL // numel)
    total: Tensor | None = None
    for start in range(0, len(layer), step):
        part = CapturedLayer(layer.inputs[start : start + step], layer.output_gradients[start : start + step])
        squares = part.weight_gradients().square_().sum(0)
        total = squares if total is None else total.add_(squares)
    assert total is not None
    return total
