"""Do the scores find samples that are known to be the source of a query?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_recall

from lightning_unlearn.errors import InputError
from lightning_unlearn.metrics.inputs import same_shape, table


def exemplar_retrieval(scores: Tensor, relevant: Tensor, top_k: Sequence[int]) -> dict[str, Tensor]:
    """Recall among the highest scores, and average precision, of each query's known exemplars.

    As Wang et al. (ICCV 2023, arXiv 2306.09345) judge attribution by models tuned to exemplars. Among equal scores
    the exemplars count as found last: a method gets no credit for an order that it did not give.

    Args:
        scores: ``(N, Q)`` scores of all samples; high means influential.
        relevant: ``(N, Q)`` bool, which samples are exemplars of a query.
        top_k: How many of the highest scores to look among.

    Returns:
        ``(Q,)`` values in [0, 1] under ``recall@k`` for each ``k``, and under ``average_precision``.

    Raises:
        InputError: If the shapes don't fit, a score is not finite, a query has no exemplar, or a ``k`` is below 1.

    Example:
        >>> scores = torch.tensor([[0.9], [-0.2], [0.5]])
        >>> found = exemplar_retrieval(scores, torch.tensor([[True], [True], [False]]), top_k=[1])
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'recall@1': 0.5, 'average_precision': 0.833}
    """
    scores = table("scores", scores, "samples", "queries")
    same_shape("scores", scores, "exemplars", relevant)
    _check_top_k(top_k)
    if relevant.dtype != torch.bool or not relevant.any(0).all():
        raise InputError("The exemplars must be bools with at least one true for each query; leave out other queries.")
    queries = list(zip(_positions(scores, relevant).unbind(1), relevant.unbind(1), strict=True))
    found = {f"recall@{k}": torch.stack([retrieval_recall(*query, top_k=k) for query in queries]) for k in top_k}
    return {**found, "average_precision": torch.stack([retrieval_average_precision(*query) for query in queries])}


def _positions(scores: Tensor, relevant: Tensor) -> Tensor:
    """``(N, Q)`` places of the scores, from 1 for the lowest; among equal ones the exemplars are lowest."""
    # torchmetrics takes every exemplar whose score is not above 0 as not found, and leaves equal scores in any order.
    exemplars_first = (~relevant).to(torch.uint8).argsort(dim=0, stable=True)
    order = exemplars_first.gather(0, scores.gather(0, exemplars_first).argsort(dim=0, stable=True))
    places = torch.arange(1, len(scores) + 1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores, dtype=torch.float32).scatter_(0, order, places[:, None].expand_as(order))


def _check_top_k(top_k: Sequence[int]) -> None:
    if not top_k or min(top_k) < 1:
        raise InputError(f"Recall is asked for among the highest {list(top_k)} scores; give numbers from 1 on.")


class ExemplarRetrieval(Metric):
    """Mean over queries of :func:`exemplar_retrieval`.

    torchmetrics' ``RetrievalRecall`` and ``RetrievalMAP`` would gather the whole ``(N, Q)`` table on every process and
    mix up two processes' queries of the same number; here a query is reduced where it is, and sums are gathered.

    Args:
        top_k: How many of the highest scores to look among.

    Example:
        >>> metric = ExemplarRetrieval(top_k=[1])
        >>> metric.update(torch.tensor([[0.9], [0.5]]), torch.tensor([[True], [False]]))
        >>> metric.update(torch.tensor([[0.9], [0.5]]), torch.tensor([[False], [True]]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'recall@1': 0.5, 'mean_average_precision': 0.75}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    totals: Tensor
    count: Tensor

    def __init__(self, top_k: Sequence[int]) -> None:
        # With a cache, a process that has had no update since it last computed would not take part in the next sync.
        super().__init__(compute_with_cache=False)
        _check_top_k(top_k)
        self.top_k = list(dict.fromkeys(top_k))
        self.add_state("totals", torch.zeros(len(self.top_k) + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Add queries; each must be given once, on one process, with all samples.

        Args:
            scores: ``(N, q)`` scores of all samples.
            relevant: ``(N, q)`` bool.

        Raises:
            InputError: If the shapes don't fit, a score is not finite, or a query has no exemplar.
        """
        values = exemplar_retrieval(scores, relevant, self.top_k)
        self.totals += torch.stack([value.to(torch.float64).sum() for value in values.values()])
        self.count += scores.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Means over all queries.

        Returns:
            ``recall@k`` for each ``k``, and ``mean_average_precision``.

        Raises:
            InputError: If there is no query.
        """
        if self.count == 0:
            raise InputError("The retrieval has no query; update it before it is computed.")
        names = [*(f"recall@{k}" for k in self.top_k), "mean_average_precision"]
        return dict(zip(names, self.totals / self.count, strict=True))
