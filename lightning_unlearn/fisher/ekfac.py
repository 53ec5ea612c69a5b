"""The Fisher in Kronecker-factored eigenbases with corrected eigenvalues."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.base import Fisher
from lightning_unlearn.fisher.diagonal import sum_of_squares
from lightning_unlearn.fisher.kronecker import (
    eigenvectors,
    joined,
    matrix_shape,
    outer_products,
    parted,
    refuse_what_does_not_fit,
    squared_norm,
    with_ones,
)
from lightning_unlearn.fisher.sums import accumulate
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec

SIDES = ("inputs", "outputs")


class EKFACFisher(Fisher):
    r"""Kronecker-factored eigenbases in which the eigenvalues are the mean squared gradients themselves.

    A layer's weight and bias are one matrix ``(o, i + 1)``, the bias its last column. With inputs :math:`a_t` (a 1
    appended) and output gradients :math:`g_t` at the positions (tokens, patches) of a sample, and its gradient
    :math:`G_s = Σ_t g_t a_t^⊤`,

    .. math::
        F ≈ (U_S ⊗ U_A)\, \mathrm{diag}(Λ)\, (U_S ⊗ U_A)^⊤, \qquad
        Λ = \frac{1}{n} \sum_{s=1}^{n} \left(U_S^⊤ G_s U_A\right)^2

    where :math:`U_A` and :math:`U_S` are the eigenvectors of :math:`Σ_s Σ_t a_t a_t^⊤` and
    :math:`Σ_s Σ_t g_t g_t^⊤`: George et al. (arXiv 1806.03884, Section 3.1), used for attribution by Wang et al.
    (arXiv 2511.10721). Of all matrices that are diagonal in this basis it is the nearest to the Fisher in the Frobenius
    norm, for any orthogonal :math:`U`: so bases from earlier weights or samples make it no wrong estimate.

    It is collected in two stages, ``covariances`` and then ``eigenvalues``, with :meth:`next_stage` in between. Sums
    of the first add; those of the second within the same bases only.

    Args:
        layers: The layers it covers, by name.

    Raises:
        InputError: If the factors of a layer do not fit in ``FACTOR_BYTES``.

    Example:
        >>> spec = LayerSpec("layer", (1, 2), False)
        >>> fisher = EKFACFisher({"layer": spec})
        >>> layer = CapturedLayer(torch.tensor([[[1.0, 1.0]], [[3.0, 3.0]]]), torch.ones(2, 1, 1))
        >>> fisher.update({"layer": layer})
        >>> fisher.next_stage()
        >>> fisher.update({"layer": layer})
        >>> fisher.finalize(damping=0.0)
        >>> form = fisher.quadratic({"layer.weight": torch.tensor([[1.0, 1.0]])})
        >>> assert torch.isclose(form, torch.tensor(20.0))  # the mean of (1 + 1)² and (3 + 3)²
    """

    kind: ClassVar[str] = "ekfac"
    stages: ClassVar[tuple[str, ...]] = ("covariances", "eigenvalues")

    def __init__(self, layers: Mapping[str, LayerSpec]) -> None:
        super().__init__(layers)
        for spec in self.layers.values():
            refuse_what_does_not_fit(spec)
        self._tensors = {name: torch.zeros(shape) for name, shape in self._shapes("covariances").items()}
        self._eigenvalues: dict[str, Tensor] | None = None
        self._inverse: dict[str, Tensor] = {}

    @property
    def stage(self) -> str:
        """``covariances`` or ``eigenvalues``; the state's names say which."""
        return self.stages[not any(name.startswith("covariances/") for name in self._tensors)]

    def _shapes(self, stage: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the state's tensors in a stage, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in self.layers.items():
            outputs, inputs = matrix_shape(spec)
            square = "covariances" if stage == "covariances" else "bases"
            shapes |= {f"{square}/{name}/inputs": (inputs, inputs), f"{square}/{name}/outputs": (outputs, outputs)}
            further = {f"traces/{name}": ()} if stage == "covariances" else {f"eigenvalues/{name}": (outputs, inputs)}
            shapes |= further
        return shapes

    def tensors(self) -> dict[str, Tensor]:
        """Sums of outer products, or bases and sums of squares within them; see :meth:`Fisher.tensors`.

        Returns:
            ``covariances/{layer}/inputs`` and ``…/outputs``, and ``traces/{layer}``, the sums of samples' squared
            gradients; or ``bases/{layer}/inputs`` and ``…/outputs``, an eigenvector a column, and
            ``eigenvalues/{layer}`` ``(o, i + 1)``.
        """
        return self._tensors

    def is_sum(self, name: str) -> bool:
        """Bases don't add; see :meth:`Fisher.is_sum`.

        Args:
            name: Of a tensor of the state.

        Returns:
            Whether it is a sum.
        """
        return not name.startswith("bases/")

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state, whose names say the stage; see :meth:`Fisher.load_tensors`.

        Args:
            tensors: As :meth:`tensors` gives them.

        Raises:
            InputError: If names or shapes are those of neither stage of the layers.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for stage in self.stages:
            if shapes == (expected := self._shapes(stage)):
                self._tensors = {name: tensors[name] for name in expected}
                self._eigenvalues = None
                return
        raise InputError("These sums are of other layers than this Fisher's, or of no stage of an EKFAC Fisher.")

    def update(self, captured: Mapping[str, CapturedLayer]) -> None:
        """Add outer products, or squared gradients within the bases; see :meth:`Fisher.update`.

        Args:
            captured: Layer name to per-sample gradients.
        """
        self._eigenvalues = None
        self.count += max(len(layer) for layer in captured.values())
        stage = self.stage
        for name, layer in captured.items():
            inputs, gradients = with_ones(self.layers[name], layer.inputs), layer.output_gradients
            if stage == "covariances":
                # A sample without any gradient (one of weight 0) has no say in the inputs' basis either.
                inputs = inputs * gradients.any(2).any(1)[:, None, None]
                accumulate(self._tensors, f"covariances/{name}/inputs", outer_products(inputs))
                accumulate(self._tensors, f"covariances/{name}/outputs", outer_products(gradients))
                accumulate(self._tensors, f"traces/{name}", squared_norm(CapturedLayer(inputs, gradients)))
            else:
                bases = [self._tensors[f"bases/{name}/{side}"].to(gradients.device) for side in SIDES]
                wide = torch.promote_types(gradients.dtype, bases[0].dtype)
                turned = CapturedLayer(inputs.to(wide) @ bases[0].to(wide), gradients.to(wide) @ bases[1].to(wide))
                accumulate(self._tensors, f"eigenvalues/{name}", sum_of_squares(turned))

    def next_stage(self) -> None:
        """Take the covariances' eigenvectors, in float64 on the CPU, as bases, and start to sum eigenvalues.

        The covariances are gone then. Where a decomposition fails (or a covariance is not finite), that side of the
        layer keeps the basis of its weights, and a warning says so: the Fisher is still right, but coarser; with both
        sides it is the diagonal one.

        Raises:
            InputError: If eigenvalues are collected already.
        """
        if self.stage == "eigenvalues":
            raise InputError("This EKFAC Fisher collects eigenvalues already, which is the last stage; finalize it.")
        if self.count == 0:
            warnings.warn("The EKFAC Fisher has no covariance of any sample, so it will be the diagonal one.")
        tensors: dict[str, Tensor] = {}
        for name, spec in self.layers.items():
            for side in SIDES:
                covariance = self._tensors.pop(f"covariances/{name}/{side}")
                tensors[f"bases/{name}/{side}"] = eigenvectors(covariance, f"the {side} of layer {name}")
            tensors[f"eigenvalues/{name}"] = covariance.new_zeros(matrix_shape(spec))
        self.load_tensors(tensors)
        self.count = 0

    def finalize(self, damping: float = 0.001) -> None:
        """Take the mean and add the damping; see :meth:`Fisher.finalize`.

        Without damping, directions whose eigenvalue is zero but for rounding are left out of the inverse.

        Args:
            damping: Share of each layer's mean eigenvalue (that is the mean of its Fisher's diagonal, as the diagonal
                Fisher has it) that is added to its eigenvalues.

        Raises:
            InputError: If there are no eigenvalues yet, the damping is negative, or a sum is not finite.
        """
        if self.stage == "covariances":
            raise InputError(
                f"This EKFAC Fisher has covariances of {self.count} samples but no eigenvalues yet; collect them, too, "
                "in a second part of training or with `lightning-unlearn fisher --kind ekfac`."
            )
        if self.count == 0:
            raise InputError("The Fisher has seen no sample; let the accumulator run for at least one batch.")
        if not 0 <= damping < float("inf"):
            raise InputError(f"Damping must be finite and not negative, but is {damping}.")
        eigenvalues: dict[str, Tensor] = {}
        self._inverse = {}
        for name in self.layers:
            mean = self._tensors[f"eigenvalues/{name}"] / self.count
            layer_mean = float(mean.cpu().double().mean())
            if not layer_mean < float("inf"):
                raise InputError(f"The Fisher of layer {name} is not finite; make it again.")
            if layer_mean == 0:
                warnings.warn(
                    f"The Fisher of layer {name} is all zero: no gradient reached it, and it is not unlearned."
                )
                # Without a Fisher nothing holds a weight in place, so it must not move at all: 1/∞ = 0.
                eigenvalues[name] = torch.full_like(mean, float("inf"))
                self._inverse[name] = torch.zeros_like(mean)
                continue
            damped = mean + damping * layer_mean
            floor = 0.0 if damping > 0 else torch.finfo(mean.dtype).eps * float(mean.max())
            eigenvalues[name] = damped
            self._inverse[name] = torch.where(damped > floor, 1 / damped, 0.0)
        self._eigenvalues = eigenvalues

    def _finalized(self) -> dict[str, Tensor]:
        if self._eigenvalues is None:
            raise RuntimeError("finalize() comes before this.")
        return self._eigenvalues

    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""``U_S ((U_Sᵀ G U_A) / Λ) U_Aᵀ`` with damped Λ; see :meth:`Fisher.precondition`.

        Args:
            gradients: Parameter name to ``(*, *parameter)``; weight and bias of a layer together.

        Returns:
            The same shapes.
        """
        self._finalized()
        found: dict[str, Tensor] = {}
        for spec in self._layers_of(gradients):
            matrix = joined(spec, gradients)
            inputs, outputs = self._bases(spec, matrix)
            turned = (outputs.mT @ matrix @ inputs) * self._inverse[spec.name].to(matrix)
            found |= parted(spec, outputs @ turned @ inputs.mT)
        return {name: found[name] for name in gradients}

    def quadratic(self, delta: Mapping[str, Tensor]) -> Tensor:
        """``Σ Λ (U_Sᵀ δ U_A)²`` with damped Λ; see :meth:`Fisher.quadratic`.

        Args:
            delta: Parameter name to ``(*, *parameter)``; weight and bias of a layer together.

        Returns:
            ``(*,)``.
        """
        eigenvalues = self._finalized()
        terms = []
        for spec in self._layers_of(delta):
            matrix = joined(spec, delta)
            inputs, outputs = self._bases(spec, matrix)
            turned = outputs.mT @ matrix @ inputs
            # 0 · ∞ is 0 here, and so is its derivative.
            weights = eigenvalues[spec.name].to(matrix).where(turned != 0, 0.0)
            terms.append((turned.square() * weights).sum((-2, -1)))
        return torch.stack(terms).sum(0)

    def _layers_of(self, tensors: Mapping[str, Tensor]) -> list[LayerSpec]:
        """The layers that some parameters belong to."""
        found = []
        for spec in self.layers.values():
            given = [name in tensors for name in spec.parameter_shapes]
            if any(given) and not all(given):
                raise InputError(
                    f"An EKFAC Fisher takes weight and bias of layer {spec.name} as one matrix; give both of them."
                )
            if all(given):
                found.append(spec)
        return found

    def _bases(self, spec: LayerSpec, like: Tensor) -> tuple[Tensor, Tensor]:
        inputs, outputs = (self._tensors[f"bases/{spec.name}/{side}"].to(like) for side in SIDES)
        return inputs, outputs
