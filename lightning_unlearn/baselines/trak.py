"""TRAK with the diffusion loss as output function."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.kernel import RidgeBaseline
from lightning_unlearn.baselines.per_sample import Output


class TRAK(RidgeBaseline):
    r"""Attribution as if the trained model were linear in its gradients.

    .. math:: τ(\hat z, z_i) = φ(\hat z)^T (Φ^T Φ + λ \bar d\, I)^{-1} φ(z_i), \qquad φ(z) = ∇_θ L(z, θ_0)

    Park et al. (arXiv 2303.14186) for one model. As in Zheng et al. (arXiv 2311.00500) the output
    function is the diffusion loss, averaged over a sample's views, so that the paper's weights :math:`∂L/∂f` are 1, and
    the kernel has a ridge. Several models' scores are averaged outside.

    Args:
        ridge: λ, as a share of the mean squared length of a training gradient.
        projection: To how many random dimensions gradients are brought first; none by default, which is exact.
        seed: Of the projection.
    """

    name: ClassVar[str] = "trak"
    output: ClassVar[Output] = "loss"

    def scores(self, subject: Subject) -> Tensor:
        """Influences of the kernel; see :meth:`Baseline.scores`.

        Args:
            subject: The model, its training samples and the queries.

        Returns:
            ``(N, Q)``.
        """
        return self.kernel(subject).influences(self.ridge)
