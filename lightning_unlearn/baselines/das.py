"""The Diffusion Attribution Score: how far the prediction for a query would move without a sample."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.kernel import RidgeBaseline
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.errors import InputError


class DAS(RidgeBaseline):
    r"""Squared change of the network's prediction under a leave-one-out Newton step.

    .. math::
        τ(\hat z, z_i) = \left( \frac{φ(\hat z)^T A^{-1} φ(z_i)\; r_i}{1 - φ(z_i)^T A^{-1} φ(z_i)} \right)^2, \qquad
        A = Φ^T Φ + λ \bar d\, I, \quad φ(z) = ∇_θ\, \overline{ε_θ}(z_t, t)

    Lin et al. (ICLR 2025, arXiv 2410.18639), where :math:`r_i` is the residual of sample i. In place of a
    Jacobian of all entries of the prediction stands, as in the authors' code, the gradient of their mean, and
    :math:`r_i` is the root of the mean squared error; both are averaged over timesteps before the score is computed.

    Args:
        ridge: λ, as a share of the mean squared length of a training gradient.
        leverage: Whether the denominator is used, which is small where a sample makes much of its own prediction.
        squared: Whether the change is squared; otherwise it keeps its sign.
        projection: To how many random dimensions gradients are brought first; none by default, which is exact.
        seed: Of the projection.
    """

    name: ClassVar[str] = "das"
    output: ClassVar[Output] = "mean"

    def __init__(
        self,
        ridge: float = 0.1,
        leverage: bool = True,
        squared: bool = True,
        projection: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(ridge, projection, seed)
        self.leverage = leverage
        self.squared = squared

    def scores(self, subject: Subject) -> Tensor:
        """Changes of the prediction; see :meth:`Baseline.scores`.

        Args:
            subject: The model, its training samples and the queries.

        Returns:
            ``(N, Q)``.

        Raises:
            InputError: If losses are negative, so that there is no residual.
        """
        kernel = self.kernel(subject)
        if not kernel.errors.isfinite().all():
            raise InputError(
                "DAS takes the root of a sample's loss as its residual, but some losses are negative or NaN."
            )
        residuals = kernel.errors
        if self.leverage:
            residuals = residuals / (1 - kernel.leverages(self.ridge))
        changes = kernel.influences(self.ridge) * residuals[:, None]
        return changes.square() if self.squared else changes
