"""Ridge regression on gradients: the kernel that TRAK and the methods after it share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.gradients import query_gradients, training_gradients
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.errors import InputError

Projector = Callable[[Gradients], Gradients]


@dataclass(frozen=True)
class RidgeKernel:
    r"""Training gradients :math:`Φ` ``(N, P)`` and query gradients :math:`\hat Φ` ``(Q, P)``, ready for any ridge.

    With :math:`A = Φ^T Φ + λ \bar d\, I`, where :math:`\bar d = \operatorname{tr}(ΦΦ^T)/N` is the mean squared length
    of a training gradient, so that the ridge λ has no unit:

    .. math::
        \text{influences} = Φ A^{-1} \hat Φ^T = (ΦΦ^T + λ \bar d\, I)^{-1} Φ \hat Φ^T, \qquad
        \text{leverages} = \operatorname{diag}(Φ A^{-1} Φ^T)

    The second form (the push-through identity) needs ``(N, N)`` products in place of a ``(P, P)`` matrix; the smaller
    of the two is decomposed, once, in float64.

    Attributes:
        left: ``(N, R)``.
        right: ``(R, Q)``.
        scale: ``(R,)``: with it the regression's hat matrix is ``left · diag(scale / damped eigenvalues) · leftᵀ``.
        eigenvalues: ``(R,)`` of the decomposed matrix.
        errors: ``(N,)`` mean root of each training sample's loss.
    """

    left: Tensor
    right: Tensor
    scale: Tensor
    eigenvalues: Tensor
    errors: Tensor

    @classmethod
    def decompose(cls, training: list[Gradients], queries: Gradients) -> RidgeKernel:
        """Decompose the smaller of Gram matrix and second moments.

        Args:
            training: Batches of ``N`` samples together.
            queries: ``Q`` queries.

        Returns:
            The kernel.

        Raises:
            InputError: If no gradient reaches the chosen layers.
        """
        errors = torch.cat([batch.errors for batch in training])
        size = sum(gradient.shape[1] for gradient in queries.parameters.values())
        if len(errors) <= size:
            values, left = torch.linalg.eigh(_gram(training))
            values = values.clamp(min=0)  # what is below is rounding
            cross = torch.cat([batch.products(queries.parameters) for batch in training])
            kernel = cls(left, left.mT @ cross, values, values, errors)
        else:
            features = torch.cat([batch.wide() for batch in training])
            values, basis = torch.linalg.eigh(features.mT @ features)
            left = features @ basis
            right = (queries.wide() @ basis).mT
            kernel = cls(left, right, torch.ones_like(values), values.clamp(min=0), errors)
        if not kernel.eigenvalues.sum() > 0:
            raise InputError("No gradient reaches the chosen layers for any training sample; choose other parameters.")
        return kernel

    def influences(self, ridge: float) -> Tensor:
        """The regression's weight of each sample for each query.

        Args:
            ridge: λ.

        Returns:
            ``(N, Q)``.
        """
        return self.left @ (self.right / self._damped(ridge)[:, None])

    def leverages(self, ridge: float) -> Tensor:
        """How much each sample has to say in its own prediction.

        Args:
            ridge: λ.

        Returns:
            ``(N,)`` in [0, 1).
        """
        return self.left.square() @ (self.scale / self._damped(ridge))

    def leave_one_out_error(self, ridge: float, targets: Tensor) -> float:
        r"""How far each sample's target is from what the regression on all others foretells of it.

        .. math:: \frac 1 N \sum_i \left( \frac{y_i - (H y)_i}{1 - H_{ii}} \right)^2

        in closed form (Allen, 1974: PRESS), with the hat matrix :math:`H = Φ A^{-1} Φ^T`: nothing is fitted again.

        Args:
            ridge: λ.
            targets: y, ``(N,)``; bring them to mean 0, as the regression has no constant.

        Returns:
            The mean squared error.
        """
        targets = targets.double()
        fitted = self.left @ (self.scale / self._damped(ridge) * (self.left.mT @ targets))
        return float(((targets - fitted) / (1 - self.leverages(ridge))).square().mean())

    def _damped(self, ridge: float) -> Tensor:
        return self.eigenvalues + ridge * self.eigenvalues.sum() / len(self.left)


class RidgeBaseline(Baseline):
    """A method that is ridge regression on the gradients of some output function.

    Args:
        ridge: λ, as a share of the mean squared length of a training gradient.
        projection: To how many random dimensions gradients are brought first, for many samples or weights; none by
            default, which is exact. Needs the package traker.
        seed: Of the projection.

    Raises:
        InputError: If a number is out of range.
    """

    output: ClassVar[Output] = "loss"
    needs_query_views: ClassVar[bool] = True

    def __init__(self, ridge: float = 0.1, projection: int | None = None, seed: int = 0) -> None:
        if not 0 < ridge < float("inf"):
            raise InputError(f"The ridge must be finite and above 0, but is {ridge}.")
        if projection is not None and projection < 1:
            raise InputError(f"A projection needs at least one dimension, but has {projection}.")
        self.ridge = ridge
        self.projection = projection
        self.seed = seed

    @property
    def query_kind(self) -> Hashable:
        """What :meth:`queries` depends on besides the subject and the output function."""
        return "views"

    def queries(self, subject: Subject) -> Gradients:
        """The gradients at the queries.

        Args:
            subject: The model and the queries.

        Returns:
            Of ``Q`` queries.
        """
        return query_gradients(subject, self.output)

    def kernel(self, subject: Subject) -> RidgeKernel:
        """The decomposed kernel; any ridge takes the same.

        Args:
            subject: The model, its samples and the queries.

        Returns:
            The kernel.
        """
        key = ("kernel", self.output, self.query_kind, self.projection, self.seed)
        if key not in subject.cache:
            queries = self.queries(subject)
            training: Iterable[Gradients] = training_gradients(subject, self.output)
            if self.projection is not None:
                project = projector(queries, self.projection, self.seed)
                queries, training = project(queries), map(project, training)
            subject.cache[key] = RidgeKernel.decompose(list(training), queries)
        kernel: RidgeKernel = subject.cache[key]
        return kernel


def projector(like: Gradients, dimensions: int, seed: int) -> Projector:
    """A random projection to fewer dimensions, traker's ``BasicProjector`` with Rademacher entries, on the CPU.

    Args:
        like: Gradients of the same parameters as those to be projected.
        dimensions: How many.
        seed: Of its entries.

    Returns:
        Makes gradients with the single parameter ``"projection"``.

    Raises:
        InputError: If traker is not installed.
    """
    try:
        from trak.projectors import BasicProjector, ProjectionType
    except ImportError as error:
        raise InputError(
            f"A projection needs the package traker ({error}); pip install 'lightning-unlearn[rivals]', or leave "
            "projection out."
        ) from None
    size = sum(gradient.shape[1] for gradient in like.parameters.values())
    basic = BasicProjector(
        grad_dim=size,
        proj_dim=dimensions,
        seed=seed,
        proj_type=ProjectionType.rademacher,
        device="cpu",
        dtype=next(iter(like.parameters.values())).dtype,
    )

    def project(gradients: Gradients) -> Gradients:
        joined = torch.cat([gradients.parameters[name] for name in like.parameters], 1)
        return Gradients({"projection": basic.project(joined, model_id=0)}, gradients.errors, gradients.losses)

    return project


def _gram(batches: list[Gradients]) -> Tensor:
    """All dot products ``(N, N)``, a pair of batches at a time."""
    count = sum(map(len, batches))
    lower = torch.zeros(count, count, dtype=torch.float64)
    start = 0
    for place, batch in enumerate(batches):
        row = torch.cat([batch.products(other.parameters) for other in batches[: place + 1]], 1)
        lower[start : start + len(batch), : row.shape[1]] = row
        start += len(batch)
    return lower.tril() + lower.tril(-1).mT
