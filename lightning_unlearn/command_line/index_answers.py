"""Answers of an index for queries as they come."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.gradients import query_gradients_of
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.index import Index, IndexAnswer
from lightning_unlearn.index.index_pass import OUTPUTS
from lightning_unlearn.index.record import differing, index_fingerprints
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection


class IndexAnswerer:
    """A loaded model and an index, which answers for queries without a pass over the data.

    Args:
        module: The model, its objective, the chosen weights and the views; where it is, queries are looked at.
        index: Of this very model.

    Raises:
        InputError: If the index is of another model, other weights, another objective or other views.
    """

    def __init__(self, module: UnlearningModule, index: Index) -> None:
        self.module = module
        self.index = index
        self.projection = Projection(layer_specs(module.layers), **index.record["projection"])
        left_out = index.record["fingerprints"].get("on_bad_sample", "")  # nothing that a query depends on
        others = differing(index.record, index_fingerprints(module, self.projection, left_out))
        if others:
            raise InputError(
                f"The index in {index.folder} was made with other {', '.join(others)} than this model's; make one with "
                "`lightning-unlearn index` and the same config, or use the config that it was made with."
            )

    def answer(self, queries: Sequence[Sample]) -> IndexAnswer:
        """Scores of all samples for some queries.

        Args:
            queries: At least one; whole pictures, without masks.

        Returns:
            The answer, a column a query.

        Raises:
            InputError: If there is no query, one has a mask, or lacks the flip that the views look at.
        """
        if not queries:
            raise InputError("An index answers for queries; name some as `queries`.")
        masked = [query.key for query in queries if query.mask is not None]
        if masked:
            raise InputError(
                f"An index looks at whole pictures, but the query {masked[0]!r} has a mask; leave the mask out, or "
                "attribute it without an index."
            )
        module = self.module
        subject = Subject(module.loss, module.layers, module.views, queries, list, projection=self.projection)
        return self.index.answer(query_gradients_of(subject, OUTPUTS))
