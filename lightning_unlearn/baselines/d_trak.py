"""D-TRAK: TRAK with another output function than the one the model was trained with."""

from __future__ import annotations

from typing import ClassVar

from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.trak import TRAK


class DTRAK(TRAK):
    r"""TRAK on gradients of the squared size of the prediction.

    .. math::
        τ(\hat z, z_i) = φ(\hat z)^T (Φ^T Φ + λ \bar d\, I)^{-1} φ(z_i), \qquad
        φ(z) = ∇_θ\, E_{t,ε} ‖ε_θ(z_t, t)‖_2^2

    Zheng et al. (arXiv 2311.00500, their "square" output function, with :math:`∂L/∂f` left out). The mean over
    the prediction's entries stands for the squared norm: a common factor changes no score. What the network predicts
    is taken as it is, also where that is a velocity or an image.

    Args:
        ridge: λ, as a share of the mean squared length of a training gradient.
        projection: To how many random dimensions gradients are brought first; none by default, which is exact.
        seed: Of the projection.
    """

    name: ClassVar[str] = "d_trak"
    output: ClassVar[Output] = "square"
