"""What every rival method is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.weights.deltas import NetworkLoss
from lightning_unlearn.weights.projection import Projection


@dataclass(frozen=True)
class Subject:
    """A trained model with its training samples and the queries that are attributed to them.

    Methods leave in it what others can use again: the queries' gradients, decomposed kernels and, if asked, the
    gradients of all samples. So score with one subject as long as model, samples, queries and views are the same, and
    make another (``dataclasses.replace`` does, with nothing in it) where one of them is not.

    Attributes:
        loss: The network, in eval mode, with its objective.
        layers: The chosen layers, by name (see :func:`~lightning_unlearn.weights.parameters.select_layers`).
        views: On which views samples are looked at.
        queries: ``Q`` queries.
        batches: A pass over all ``N`` training samples; the same order each time.
        fisher: Of the chosen layers, with its sums, for methods that need one.
        unlearned: ``(N, Q)`` by how much each sample's loss rose where a query was unlearned, for methods that ask
            unlearning, too.
        projection: Brings gradients to few numbers as they are taken; ``None`` for whole gradients.
        keep: Whether the gradients of all samples stay in memory (``N`` times the chosen weights, in float32), so that
            each kind of gradient is computed once for any number of methods and settings.
        cache: What was computed, by what it depends on.
    """

    loss: NetworkLoss
    layers: Mapping[str, nn.Module]
    views: Views
    queries: Sequence[Sample]
    batches: Callable[[], Iterable[SampleBatch]]
    fisher: Fisher | None = None
    keep: bool = False
    unlearned: Tensor | None = None
    projection: Projection | None = None
    cache: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


class Baseline(ABC):
    """A method of data attribution.

    Attributes:
        name: As it is called in configs and tables.
        needs_fisher: Whether scores depend on the subject's Fisher.
        needs_query_views: Whether queries are looked at on the views, flips among them, that samples are.
        rise: By how much the loss of each query is raised for the subject's ``unlearned``; ``None`` for a method that
            needs nothing unlearned.
        columns: Of the table, for a method that scores the model and needs no query; ``None`` for one a query.
    """

    name: ClassVar[str]
    needs_fisher: ClassVar[bool] = False
    needs_query_views: ClassVar[bool] = False
    columns: ClassVar[Sequence[str] | None] = None
    rise: float | None = None

    @abstractmethod
    def scores(self, subject: Subject) -> Tensor:
        """Score all training samples for all queries.

        Args:
            subject: The model, its training samples and the queries.

        Returns:
            ``(N, Q)`` float64 on the CPU, in the order of ``subject.batches()``; high means influential. ``Q`` is the
            number of ``columns`` where the method has its own.
        """

    def parts(self, subject: Subject) -> Mapping[str, Tensor]:
        """The scores of the methods that this one asks, so that a person sees who said what.

        Args:
            subject: The model, its training samples and the queries.

        Returns:
            Name to ``(N, Q)``; empty for a method that asks no other.
        """
        return {}

    def settings(self) -> dict[str, Any]:
        """What tells this method from another, as JSON; it enters the fingerprint of a run.

        Returns:
            Its name and arguments.
        """
        arguments = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"method": self.name, **arguments}
