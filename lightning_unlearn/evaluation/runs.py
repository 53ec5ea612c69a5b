"""Which models are trained again: without which samples, and with which seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, seed_of


@dataclass(frozen=True)
class Run:
    """One training from scratch with the recipe of a study.

    Attributes:
        removed: Keys of the samples that are left out, sorted.
        seed: Of everything random in the training: first weights, the order of samples, timesteps, noise.
    """

    removed: tuple[str, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """What the run's file is called: the same set with the same seed is the same run, whoever asked for it."""
        return digest("run", self.seed, *self.removed)


def without(keys: Iterable[str], seed: int = 0) -> Run:
    """The run that leaves samples out.

    Args:
        keys: Their keys, in any order.
        seed: Of the training.

    Returns:
        The run.

    Example:
        >>> without(["b", "a"]) == without(["a", "b"])
        True
    """
    return Run(tuple(sorted(set(keys))), seed)


def subset_runs(keys: Sequence[str], models: int, share: float = 0.5, seed: int = 0, second: int = 0) -> list[Run]:
    """Models on random subsets, for the linear datamodelling score.

    Subset ``m`` is drawn from its own number, so that more models can be asked for later, and trained with seed
    ``m + 1``. Some are trained twice: how well two models of one subset agree bounds the score of any method.

    Args:
        keys: All samples.
        models: Number of subsets.
        share: Share of the samples that each keeps.
        seed: Of the subsets.
        second: How many of them, from the first, are trained once more, with seed ``1_000_001 + m``.

    Returns:
        ``models`` runs, then ``second`` more.

    Raises:
        InputError: If the share leaves no sample, or all, or ``second`` exceeds ``models``.
    """
    kept = round(len(keys) * share) if 0 < share < 1 else 0
    if not 0 < kept < len(keys):
        raise InputError(
            f"Subsets with a share of {share} of {len(keys)} samples can't be made; choose one that keeps some."
        )
    if not 0 <= second <= models:
        raise InputError(f"{second} of {models} subset models can't be trained twice; choose at most as many.")
    ordered = sorted(keys)
    sets = []
    for model in range(models):
        chosen = set(random.Random(seed_of("subset", seed, share, model)).sample(ordered, kept))
        sets.append([key for key in ordered if key not in chosen])
    firsts = [without(removed, model + 1) for model, removed in enumerate(sets)]
    return firsts + [without(removed, 1_000_001 + model) for model, removed in enumerate(sets[:second])]


def seed_runs(repeats: int) -> list[Run]:
    """Models on all samples that differ in their seeds only: the noise of training itself.

    Seed 0 is not among them: it is that of the removals, and often that of the model that made the queries, which knows
    its own pictures better than any other.

    Args:
        repeats: How many.

    Returns:
        ``repeats`` runs, with the seeds 1, 2, ….
    """
    return [Run((), seed) for seed in range(1, repeats + 1)]


def random_removal_runs(keys: Sequence[str], k: int, repeats: int, seed: int = 0) -> list[Run]:
    """Models without ``k`` random samples: what the removal of any samples does.

    Args:
        keys: All samples.
        k: How many are removed.
        repeats: How many models.
        seed: Of the sets.

    Returns:
        The runs, with training seed 0.
    """
    ordered = sorted(keys)
    return [
        without(random.Random(seed_of("random-removal", seed, k, turn)).sample(ordered, k)) for turn in range(repeats)
    ]


def leave_k_out_runs(ranked: Sequence[Sequence[str]], k: int) -> list[Run]:
    """Models without the ``k`` samples that a method named for each query.

    Args:
        ranked: For each query the samples' keys, most influential first.
        k: How many are removed.

    Returns:
        A run for each query, with training seed 0; two that name the same samples are the same run.

    Raises:
        InputError: If fewer than ``k`` are named.
    """
    if any(len(keys) < k for keys in ranked):
        raise InputError(f"Fewer than {k} samples are ranked; choose a smaller K.")
    return [without(keys[:k]) for keys in ranked]


def removal_size(k: float, samples: int) -> int:
    """How many samples a K stands for.

    Args:
        k: A number of samples, or below 1 a share of them.
        samples: How many there are.

    Returns:
        At least 1.

    Raises:
        InputError: If it is not between 0 and all samples.
    """
    size = max(1, round(k * samples)) if 0 < k < 1 else k
    if not 0 < size < samples or size != int(size):
        raise InputError(f"K = {k} of {samples} samples can't be removed; give a whole number, or a share below 1.")
    return int(size)
