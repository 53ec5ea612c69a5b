"""The gradients of all training samples and of the queries: what most rival methods stand on.

Queries are looked at on views of the same definition as samples: with shared noise on the very same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.per_sample import Output, mean_gradients_of
from lightning_unlearn.baselines.sample_gradients import Gradients, join
from lightning_unlearn.data.batches import collate_samples, form_of
from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError

# Queries that are looked at together.
QUERIES_AT_ONCE = 32


def training_gradients(subject: Subject, output: Output, *, per_timestep: bool = False) -> Iterator[Gradients]:
    """Gradients of all training samples, a batch at a time; they are in memory together only if the subject keeps them.

    Args:
        subject: The model and its samples.
        output: Of which output function.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Yields:
        Batches, in the order of ``subject.batches()``.

    Raises:
        InputError: If there is no sample.
    """
    key = _training_key(output, per_timestep)
    if key in subject.cache:
        yield from subject.cache[key]
        return
    kept: list[Gradients] = []
    empty = True
    for batch in subject.batches():
        if not len(batch):
            continue
        empty = False
        found = batch_gradients(subject, batch, output, per_timestep=per_timestep)
        if subject.keep:
            kept.append(found)
        yield found
    if empty:
        raise InputError("There are no training samples; name shards that hold some.")
    if subject.keep:
        subject.cache[key] = kept


@contextmanager
def shared_gradients(subject: Subject, outputs: Sequence[Output]) -> Iterator[None]:
    """While it lasts, the gradients of all training samples by several output functions are there, from one pass.

    They are in memory together: ``N`` times the chosen weights in float32 for each output function. Afterwards they are
    forgotten, unless the subject keeps gradients.

    Args:
        subject: The model and its samples.
        outputs: Of which output functions.

    Raises:
        InputError: If there is no sample.
    """
    lacking = [output for output in outputs if _training_key(output) not in subject.cache]
    if lacking:
        parts: dict[Output, list[Gradients]] = {output: [] for output in lacking}
        for batch in subject.batches():
            if len(batch):
                for output, found in batch_gradients_of(subject, batch, lacking).items():
                    parts[output].append(found)
        for output, kept in parts.items():
            if not kept:
                raise InputError("There are no training samples; name shards that hold some.")
            subject.cache[_training_key(output)] = kept
    try:
        yield
    finally:
        if not subject.keep:
            for output in lacking:
                del subject.cache[_training_key(output)]


def _training_key(output: Output, per_timestep: bool = False) -> tuple[str, Output, bool]:
    return ("training", output, per_timestep)


def query_gradients(subject: Subject, output: Output, *, per_timestep: bool = False) -> Gradients:
    """Gradients of the queries, on views of the same definition as the samples'.

    Args:
        subject: The model and the queries.
        output: Of which output function.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Returns:
        Of all ``Q`` queries, in their order.

    Raises:
        InputError: If flips are scored and a query has none.
    """
    key = ("queries", output, per_timestep)
    if key not in subject.cache:
        found = query_gradients_of(subject, [output], per_timestep=per_timestep)
        subject.cache[key] = found[output]
    kept: Gradients = subject.cache[key]
    return kept


def query_gradients_of(
    subject: Subject, outputs: Sequence[Output], *, per_timestep: bool = False
) -> dict[Output, Gradients]:
    """Gradients of the queries by several output functions; see :func:`query_gradients`. They are not kept.

    Args:
        subject: The model and the queries.
        outputs: Of which output functions.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Returns:
        Output function to the gradients of all ``Q`` queries, in their order.

    Raises:
        InputError: If flips are scored and a query has none.
    """
    check_query_views(subject.queries, subject.views)
    forms: dict[str, list[int]] = {}
    for number, query in enumerate(subject.queries):
        forms.setdefault(form_of(query), []).append(number)
    parts = [
        numbers[start : start + QUERIES_AT_ONCE]
        for numbers in forms.values()
        for start in range(0, len(numbers), QUERIES_AT_ONCE)
    ]
    batches = [collate_samples("queries", [subject.queries[number] for number in part]) for part in parts]
    found = [batch_gradients_of(subject, batch, outputs, per_timestep=per_timestep) for batch in batches]
    came = [number for part in parts for number in part]
    order = [came.index(number) for number in range(len(came))]
    return {output: join([of_batch[output] for of_batch in found]).rows(order) for output in outputs}


def check_query_views(queries: Sequence[Sample], views: Views) -> None:
    """Refuse queries that lack some of the views, before samples are looked at.

    Args:
        queries: The queries.
        views: On which they will be looked at.

    Raises:
        InputError: If flips are scored and a query has none.
    """
    lacking = [query.key for query in queries if query.latent_flip is None]
    if views.flips and lacking:
        raise InputError(
            f"Flips are scored, but the query {lacking[0]!r} has no latent_flip.npy; prepare the queries with flips, "
            "or set flips to false."
        )


def batch_gradients(subject: Subject, batch: SampleBatch, output: Output, *, per_timestep: bool = False) -> Gradients:
    """Gradients of a batch of samples, averaged over the views that each of them has, captions by their shares.

    Args:
        subject: The model.
        batch: ``B`` samples.
        output: Of which output function.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Returns:
        Of these samples.
    """
    return batch_gradients_of(subject, batch, [output], per_timestep=per_timestep)[output]


def batch_gradients_of(
    subject: Subject, batch: SampleBatch, outputs: Sequence[Output], *, per_timestep: bool = False
) -> dict[Output, Gradients]:
    """Gradients of a batch by several output functions; see :func:`batch_gradients`.

    Args:
        subject: The model.
        batch: ``B`` samples.
        outputs: Of which output functions.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Returns:
        Output function to the gradients of these samples.
    """
    objective = subject.loss.objective
    views = subject.views.of(batch, objective.num_timesteps, objective.density())
    return mean_gradients_of(
        subject, batch.keys, views, outputs, per_timestep=per_timestep, shares=batch.caption_weights
    )
