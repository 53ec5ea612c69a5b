"""How sure an answer is: whether methods that err differently agree, and whether more than the caption speaks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lightning_unlearn.data.conditions import MASK
from lightning_unlearn.data.samples import SampleBatch
from lightning_unlearn.diffusion.families import FAMILIES
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.metrics.ranks import rank_correlation

FIRST = 10
AGREE, CAPTION, PIXEL, UNSURE = "methods agree", "caption only", "pixels only", "not sure"
# What an answer is compared with that knows nothing of the model.
CAPTIONS, PIXELS = "captions", "pixels"
# By the benches (benchmarks/how_sure.py): queries below both of the first two have a lower linear datamodelling score.
# Either alone is not enough: where one image stands out the next nine are anyone's, and all of them agree on it.
LEAST_FIRST_TEN = 0.6
LEAST_CORRELATION = 0.8
MOST_CAPTION = 0.9
# Correlation with the similarity of captions or of pixels from which on an answer says no more than that.
MOST_ALIKE = 0.9
# Numbers about a picture itself, that some networks are given.
_OF_PICTURES = frozenset(name for family in FAMILIES for name in family.facts(1, 1, (1, 1), (0, 0)))


@dataclass(frozen=True)
class Agreement:
    """How sure the answer for one query is.

    Attributes:
        first_ten: Share of the first ten (the first quarter, where that is fewer: most of a few images are shared by
            chance) that two parts have in common, mean over pairs; a part without any difference has no first ones.
        rank_correlation: Of the parts' scores over all samples, mean over pairs. Low where most samples hardly matter,
            whose order is anyone's: it decides nothing.
        correlation: Pearson's of the same scores, mean over pairs: it looks at those that stand out.
        caption_share: Share of the scores' variance that lies between captions, less what chance makes; ``None`` where
            no two samples, or all of them, have the same caption.
        alike: Pearson's correlation of the scores with the similarity of ``captions`` and of ``pixels`` to the query's,
            where they can be compared.
        halves: Share of unlearning's first ten by one half of its draws of timestep and noise that are the first ten by
            the other; ``None`` where nothing is unlearned, or on one draw.
    """

    first_ten: float
    rank_correlation: float
    correlation: float
    caption_share: float | None
    alike: Mapping[str, float] = field(default_factory=dict)
    halves: float | None = None

    @property
    def words(self) -> str:
        """What the numbers say: ``methods agree``, ``caption only``, ``pixels only`` or ``not sure``."""
        if (self.caption_share or 0.0) > MOST_CAPTION or self.alike.get(CAPTIONS, 0.0) > MOST_ALIKE:
            return CAPTION
        if self.alike.get(PIXELS, 0.0) > MOST_ALIKE:
            return PIXEL
        agree = self.first_ten >= LEAST_FIRST_TEN or self.correlation >= LEAST_CORRELATION
        return AGREE if agree else UNSURE

    def record(self) -> dict[str, Any]:
        """The words and the numbers, as JSON.

        Returns:
            For ``run.json``.
        """
        numbers = {name: value for name, value in asdict(self).items() if value is not None and value != {}}
        return {"words": self.words, **numbers}


def agreements(
    parts: Mapping[str, Tensor],
    scores: Tensor,
    captions: Sequence[Hashable],
    similarities: Mapping[str, Tensor] | None = None,
    halves: Tensor | None = None,
) -> list[Agreement]:
    """How sure the answers for all queries are.

    Args:
        parts: Method to its scores ``(N, Q)``; at least two.
        scores: ``(N, Q)`` what they give together.
        captions: ``N`` captions, or whatever tells them apart.
        similarities: Of samples and queries, ``captions`` and ``pixels`` to ``(N, Q)``, of those that are known.
        halves: ``(2, N, Q)`` unlearning's scores by each half of its draws, if known.

    Returns:
        Of each query.

    Raises:
        InputError: If there are fewer than two parts.
    """
    if len(parts) < 2:
        raise InputError(f"Whether methods agree can't be said of {len(parts)} of them; ask two or more.")
    first = min(FIRST, -(-len(scores) // 4))
    standard = {name: standardised(values) for name, values in parts.items()}
    tops = {name: _first(values, first) for name, values in standard.items()}
    pairs = list(combinations(parts, 2))
    shared = torch.stack([(tops[one] & tops[other]).sum(0) / first for one, other in pairs]).mean(0)
    order = torch.stack([rank_correlation(parts[one].mT, parts[other].mT) for one, other in pairs]).mean(0)
    alike = torch.stack([(standard[one] * standard[other]).mean(0) for one, other in pairs]).mean(0)
    between = caption_shares(scores, captions)
    answer = standardised(scores)
    looks = {name: (answer * standardised(values)).mean(0) for name, values in (similarities or {}).items()}
    by_half = None if halves is None else (_first(halves[0], first) & _first(halves[1], first)).sum(0) / first
    return [
        Agreement(
            float(shared[query]),
            float(order[query]),
            float(alike[query]),
            None if between is None else float(between[query]),
            {name: float(values[query]) for name, values in looks.items()},
            None if by_half is None else float(by_half[query]),
        )
        for query in range(scores.shape[1])
    ]


def _first(standard: Tensor, first: int) -> Tensor:
    """``(N, Q)`` which of the samples are a query's first ones; none where all of its scores are equal."""
    found = torch.zeros(standard.shape, dtype=torch.bool).scatter_(0, standard.topk(first, 0).indices, True)
    return found & standard.any(0)


def caption_shares(scores: Tensor, captions: Sequence[Hashable]) -> Tensor | None:
    r"""The share of the scores' variance that lies between captions.

    .. math:: 1 - \frac{S_{within} / (N - G)}{S_{total} / (N - 1)}

    with ``G`` captions of ``N`` samples: 0 on average for scores that know nothing of captions (adjusted :math:`R^2`;
    Theil, 1961), and 1 if all samples of a caption have one score.

    Args:
        scores: ``(N, Q)``.
        captions: ``N`` captions, or whatever tells them apart.

    Returns:
        ``(Q,)`` float64, at least 0; ``None`` if there is one caption, or as many as samples.
    """
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    count, groups = len(scores), len(numbers)
    if groups in (1, count):
        return None
    of = torch.tensor([numbers[caption] for caption in captions])
    values = scores.double().cpu()
    sums = torch.zeros(groups, values.shape[1], dtype=torch.float64).index_add_(0, of, values)
    means = sums / torch.bincount(of, minlength=groups)[:, None]
    within = (values - means[of]).square().sum(0) / (count - groups)
    total = (values - values.mean(0)).square().sum(0) / (count - 1)
    return torch.where(total > 0, 1 - within / total, 0.0).clamp(min=0.0)


def caption_digests(batch: SampleBatch) -> list[str]:
    """What tells the first captions of a batch apart: all that the network is given of them, or of a class.

    Sizes are a picture's own, and how far text is padded is its batch's.

    Args:
        batch: ``B`` samples.

    Returns:
        ``B`` strings, alike where the captions are.
    """
    of_captions = {name: values[:, 0] for name, values in batch.conditions.items() if name not in _OF_PICTURES}
    digests = []
    for row in range(len(batch)):
        found = {}
        for name, values in of_captions.items():
            mask = of_captions.get(name if name.endswith(MASK) else name + MASK)
            found[name] = values[row] if mask is None else values[row][mask[row] > 0]
        digests.append(tensors_digest(found))
    return digests


def standardised(scores: Tensor) -> Tensor:
    """Scores in units of their scatter over the samples.

    Args:
        scores: ``(N, Q)``.

    Returns:
        ``(N, Q)`` float64 of mean 0 and mean square 1 a query; 0 where all scores of a query are equal.
    """
    # In units of the largest, so that no square is beyond float64.
    scores = scores.double() / scores.abs().amax(0).double().clamp(min=torch.finfo(torch.float64).tiny)
    away = scores - scores.mean(0)
    scatter = away.square().mean(0).sqrt()
    # What rounding leaves of equal numbers is no scatter.
    flat = scatter <= 8 * torch.finfo(torch.float64).eps
    return torch.where(flat, 0.0, away / torch.where(flat, 1.0, scatter))
