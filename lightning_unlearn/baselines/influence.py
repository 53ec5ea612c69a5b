"""The influence function with a Fisher in the place of the Hessian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.baselines.gradients import query_gradients, training_gradients
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.weights.parameters import layer_parameters, layer_specs


class Influence(Baseline):
    r"""What unlearning gives for an infinitely small step, without evaluating a loss.

    .. math:: τ(\hat z, z) = ∇L(z, θ_0)^T F^{-1} ∇L(\hat z, θ_0)

    Wang et al. (arXiv 2406.09408, Eq. 16); Koh and Liang (arXiv 1703.04730, Eq. 2) with the Hessian. Gradients are
    means over a sample's or query's views. The Fisher, of whatever kind, is the subject's; it is left on the CPU and
    finalized with this damping.

    Args:
        damping: Share of each layer's mean Fisher that is added to it.

    Raises:
        InputError: If the damping is negative.
    """

    name: ClassVar[str] = "influence"
    output: ClassVar[Output] = "loss"
    needs_fisher = True
    needs_query_views: ClassVar[bool] = True

    def __init__(self, damping: float = 0.1) -> None:
        if not 0 <= damping < float("inf"):
            raise InputError(f"Damping must be finite and not negative, but is {damping}.")
        self.damping = damping

    def scores(self, subject: Subject) -> Tensor:
        """Products of gradients through the inverse Fisher; see :meth:`Baseline.scores`.

        Args:
            subject: The model, its training samples, the queries and the Fisher.

        Returns:
            ``(N, Q)``.
        """
        fisher = _fisher(subject)
        fisher.to("cpu").finalize(self.damping)
        queries = _precondition(fisher, subject, query_gradients(subject, self.output))
        return torch.cat([batch.products(queries) for batch in training_gradients(subject, self.output)])


def _fisher(subject: Subject) -> Fisher:
    if subject.fisher is None:
        raise InputError("The influence function needs a Fisher; make one with `lightning-unlearn fisher`.")
    for name, spec in layer_specs(subject.layers).items():
        if subject.fisher.layers.get(name) != spec:
            raise InputError(
                f"The Fisher is of another model or selection: it has no layer {name} of shape {spec.weight_shape}."
            )
    return subject.fisher


def _precondition(fisher: Fisher, subject: Subject, gradients: Gradients) -> Mapping[str, Tensor]:
    shapes = {name: parameter.shape for name, parameter in layer_parameters(subject.layers).items()}
    shaped = {name: rows.reshape(-1, *shapes[name]) for name, rows in gradients.parameters.items()}
    return {name: rows.flatten(1) for name, rows in fisher.precondition(shaped).items()}
