"""An EKFAC Fisher of a training that ended before its eigenvalues were collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.ekfac import SIDES, EKFACFisher


def of_the_product(fisher: EKFACFisher) -> EKFACFisher:
    r"""The Fisher whose eigenvalues are those of the Kronecker product of the covariances, to the exact trace.

    With covariances :math:`A = \sum_s \sum_t a_t a_t^\top` and :math:`S = \sum_s \sum_t g_t g_t^\top`, K-FAC (Martens
    and Grosse, arXiv 1503.05671) takes inputs for independent of output gradients, and so :math:`F ∝ S ⊗ A`. By how
    much is uncertain where a sample has many positions (Eschenhagen et al., arXiv 2311.00636), so it is not assumed:
    the mean squared norm of samples' gradients, :math:`\mathrm{tr} F`, was summed beside the covariances, and

    .. math:: Λ = \frac{\mathrm{tr} F}{\mathrm{tr} S \, \mathrm{tr} A} \, λ_S λ_A^\top .

    So each layer's mean Fisher is right, and by it the damping and the layers' shares; what lies within a layer is
    K-FAC's approximation instead of what was measured.

    Args:
        fisher: In its first stage.

    Returns:
        A new one in its last stage, of as many samples.

    Raises:
        InputError: If it has eigenvalues already.
    """
    if fisher.stage != "covariances":
        raise InputError("This EKFAC Fisher collects eigenvalues already; finalize it.")
    bases = EKFACFisher(fisher.layers)
    bases.targets = fisher.targets
    covariances = {name: tensor.clone() for name, tensor in fisher.tensors().items()}
    bases.load_tensors(dict(covariances))
    bases.count = fisher.count
    bases.next_stage()
    tensors = dict(bases.tensors())
    for name in fisher.layers:
        spectra = []
        for side in SIDES:
            basis = tensors[f"bases/{name}/{side}"]
            spectra.append(((covariances[f"covariances/{name}/{side}"] @ basis) * basis).sum(0).clamp(min=0))
        product = torch.outer(spectra[1], spectra[0])  # (o, i)
        total = product.sum()
        trace = covariances[f"traces/{name}"]
        tensors[f"eigenvalues/{name}"] = product * (trace / total) if total > 0 else torch.zeros_like(product)
    bases.load_tensors(tensors)
    bases.count = fisher.count
    return bases


def eigenvalues_of(fisher: EKFACFisher) -> dict[str, Any]:
    """What of a Fisher of the product is not in its bases.

    Args:
        fisher: As :func:`of_the_product` gives it.

    Returns:
        Numbers, strings and tensors only, so that it loads with ``weights_only=True``.
    """
    tensors = {name: tensor.cpu() for name, tensor in fisher.tensors().items() if fisher.is_sum(name)}
    return {"count": fisher.count, "tensors": tensors}


def with_eigenvalues(bases: EKFACFisher, found: Mapping[str, Any]) -> EKFACFisher:
    """A Fisher of the product again, from its bases.

    Args:
        bases: In the last stage, with the same bases.
        found: As :func:`eigenvalues_of` gave it.

    Returns:
        A new one.
    """
    fisher = EKFACFisher(bases.layers)
    fisher.targets = bases.targets
    fisher.load_tensors({name: found["tensors"].get(name, tensor) for name, tensor in bases.tensors().items()})
    fisher.count = int(found["count"])
    return fisher
