"""The method where nobody names one: several asked together, or unlearning where they can't be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightning.pytorch import Trainer

from lightning_unlearn.baselines.base import Baseline
from lightning_unlearn.baselines.consensus import Consensus
from lightning_unlearn.baselines.sketch import kernel_bytes
from lightning_unlearn.command_line.command_parts import say
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.parameters import layer_parameters

# What the kernels of all samples may take by default, however much there is.
MOST_MEMORY = 2**34


def automatic_method(
    module: UnlearningModule,
    data: AttributionDataModule,
    trainer: Trainer,
    given: Sequence[str],
    by_index: bool = False,
) -> Baseline | None:
    """The method for a job, and a sentence where it is not the usual one.

    Args:
        module: Names the weights, the views and how is unlearned.
        data: Names the queries and the shards; they are looked at.
        trainer: Says how many processes there are, and in which precision they work.
        given: Options that a person gave and unlearning alone has.
        by_index: Whether an index keeps the gradients of all samples, so that no memory is needed for them.

    Returns:
        :class:`~lightning_unlearn.baselines.Consensus`; ``None`` for unlearning alone.
    """
    if data.query_patterns is None:
        return None  # which says that there is nothing to unlearn
    method = Consensus()
    why = _asked_for(module, data, trainer, given) or _in_the_way(method, module, data, by_index)
    if why:
        say(f"The images are scored by unlearning alone, without D-TRAK and DAS beside it, since {why}.")
        return None
    return method


def _asked_for(module: UnlearningModule, data: AttributionDataModule, trainer: Trainer, given: Sequence[str]) -> str:
    """What a person asked for that only unlearning can do."""
    if given:
        return f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for it"
    if module.strategy.settings() != Newton().settings():
        return "the model names a strategy"
    if data.targets_by is not None:
        return f"targets_by asks for sets of queries ({data.targets_by}), and the others know single pictures"
    if "adapter" in module.origin:
        # benchmarks/RESULTS.md, customised models: mAP 0.89 by unlearning, 0.31 by D-TRAK and 0.06 by DAS.
        return "of few pictures that a model was customised with it finds far more than they do"
    if data.keys is not None:
        return "keys asks for some images alone, and the others compare all of them"
    if trainer.world_size > 1:
        return f"the others work in one process, and the Trainer has {trainer.world_size}"
    if trainer.precision != "32-true":
        return f"the others work in precision 32-true, and the Trainer in {trainer.precision}"
    return ""


def _in_the_way(method: Baseline, module: UnlearningModule, data: AttributionDataModule, by_index: bool) -> str:
    """What of the queries and the samples stands in the way of the other methods."""
    data.setup("predict")
    masked = [query.key for query in data.queries if query.mask is not None]
    if masked:
        return f"the query {masked[0]!r} has a mask, and the others look at whole pictures"
    lacking = [query.key for query in data.queries if query.latent_flip is None]
    if module.views.flips and lacking:
        return f"the query {lacking[0]!r} has no latent_flip.npy, and the others look at its flip, too"
    if by_index:
        return ""
    counts = [shard.samples for shard in data.shards]
    if None in counts:
        say(
            f"How many images {counts.count(None)} of {len(counts)} shards hold is not known (no manifest says it), so "
            "that whether there is memory enough for all is judged by the others alone."
        )
    samples = sum(count for count in counts if count is not None)
    weights = sum(weight.numel() for weight in layer_parameters(module.layers).values())
    needed = kernel_bytes(samples, weights, method.gradient_kinds)
    there = min(MOST_MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > there:
        # Only here: it imports whatever encodes pictures.
        from lightning_unlearn.preparation.disk import in_words

        return f"what they keep of {samples:,} images takes {in_words(needed)} of memory, of {in_words(there)} here"
    return ""
