from __future__ import annotations

import doctest
import importlib
import json
import math
import pkgutil
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import metric_runs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef
from torchmetrics.retrieval import RetrievalMAP, RetrievalRecall

from lightning_unlearn import metrics
from lightning_unlearn.errors import InputError
from lightning_unlearn.metrics import (
    CounterfactualChange,
    ExemplarRetrieval,
    LinearDatamodellingScore,
    average_ranks,
    bootstrap_interval,
    counterfactual_change,
    exemplar_retrieval,
    linear_datamodelling_comparison,
    linear_datamodelling_interval,
    linear_datamodelling_score,
    noise_ceiling,
    noise_ceiling_interval,
    normal_scores,
    paired_bootstrap,
    rank_correlation,
    subset_predictions,
    uncertainty,
)

# ---------------------------------------------------------------------------------- slow, obvious versions


def slow_ranks(values: Sequence[float]) -> list[float]:
    """Each value's mean place among all, if equal values stood in every order."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def slow_pearson(first: Sequence[float], second: Sequence[float]) -> float:
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return statistics.correlation(first, second)


def slow_score(scores: Tensor, kept: Tensor, outcomes: Tensor) -> list[float]:
    found = []
    for query in range(scores.shape[1]):
        foretold = [
            math.fsum(float(scores[sample, query]) for sample in range(len(scores)) if kept[model, sample])
            for model in range(len(kept))
        ]
        came = [-float(loss) for loss in outcomes[:, query]]
        found.append(slow_pearson(slow_ranks(foretold), slow_ranks(came)))
    return found


def slow_retrieval(scores: Sequence[float], relevant: Sequence[bool], top_k: int) -> tuple[float, float]:
    """Recall and average precision of one query; of equal scores the exemplars come last."""
    ordered = [hit for _, hit in sorted(zip(scores, relevant, strict=True), key=lambda pair: (-pair[0], pair[1]))]
    precisions = [sum(ordered[: place + 1]) / (place + 1) for place, hit in enumerate(ordered) if hit]
    return sum(ordered[:top_k]) / sum(ordered), sum(precisions) / len(precisions)


# ---------------------------------------------------------------------------------- ranks


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=45), st.randoms(use_true_random=False))
def test_rank_correlation_with_ties_is_that_of_plain_loops(first: list[int], shuffler: random.Random) -> None:
    second = [value + shuffler.choice([0, 0, 1, -2]) for value in first]
    assert average_ranks(torch.tensor(first)).tolist() == slow_ranks(first)
    found = float(rank_correlation(torch.tensor(first), torch.tensor(second)))
    assert found == pytest.approx(slow_pearson(slow_ranks(first), slow_ranks(second)), abs=1e-14)


def test_rank_correlation_of_forty_models_is_exact_and_agrees_with_torchmetrics_to_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 10, generator=generator, dtype=torch.float64)
    second = (first + torch.randn(40, 10, generator=generator)).round(decimals=1)
    assert (rank_correlation(first.mT, first.mT) == 1).all()
    assert (rank_correlation(first.mT, -first.exp().mT) == -1).all()
    found = rank_correlation(first.mT, second.mT)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, spearman_corrcoef(first, second), atol=1e-6, rtol=0, check_dtype=False)
    # Without ties: 1 - 6 Σd² / (M (M² - 1)).
    order = torch.randperm(40, generator=generator)
    distance = int((order - torch.arange(40)).square().sum())
    found = rank_correlation(order.double(), torch.arange(40.0))
    assert float(found) == pytest.approx(1 - 6 * distance / (40 * (40**2 - 1)), abs=1e-15)


def test_normal_scores_keep_the_order_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(101, 3, generator=generator)
    found = normal_scores(scores)
    assert torch.equal(found, normal_scores(scores.exp()))
    assert torch.equal(found.argsort(0), scores.argsort(0))
    normal = statistics.NormalDist()
    expected = torch.tensor([normal.inv_cdf(rank / 102) for rank in range(1, 102)], dtype=torch.float64)
    for query in range(3):
        torch.testing.assert_close(found[:, query].sort().values, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(normal_scores(-scores), -found)
    tied = normal_scores(torch.tensor([[5.0], [5.0], [1.0]]))
    assert tied[:, 0].tolist() == pytest.approx([normal.inv_cdf(2.5 / 4)] * 2 + [normal.inv_cdf(1 / 4)])


# ---------------------------------------------------------------------------------- linear datamodelling score


def trial(
    samples: int, models: int, queries: int, seed: int, noise: float = 3.0, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole-numbered scores, subsets, and losses that the scores partly explain."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-5, 6, (samples, queries), generator=generator).double()
    order = torch.rand(models, samples, generator=generator)
    kept = order.argsort(1).argsort(1) < samples // 2 if half else order < 0.5
    outcomes = -(kept.double() @ scores) + noise * torch.randn(models, queries, generator=generator)
    return scores, kept, outcomes.round()


sizes = st.tuples(st.integers(1, 12), st.integers(2, 12), st.integers(1, 4), st.integers(0, 10_000))


@settings(max_examples=60)
@given(sizes)
def test_score_is_that_of_plain_loops(size: tuple[int, int, int, int]) -> None:
    scores, kept, outcomes = trial(*size)
    found = linear_datamodelling_score(scores, kept, outcomes)
    assert found.tolist() == pytest.approx(slow_score(scores, kept, outcomes), abs=1e-13)


@settings(max_examples=40)
@given(sizes, st.integers(-4, 4), st.integers(1, 9), st.randoms(use_true_random=False))
def test_score_knows_order_only(
    size: tuple[int, int, int, int], constant: int, factor: int, shuffler: random.Random
) -> None:
    scores, kept, outcomes = trial(*size, half=True)
    expected = linear_datamodelling_score(scores, kept, outcomes)
    # Subsets of equal size: a constant for every sample is the same for every model.
    assert torch.equal(linear_datamodelling_score(factor * scores + constant, kept, outcomes), expected)
    assert torch.equal(linear_datamodelling_score(-scores, kept, outcomes), -expected)
    assert torch.equal(linear_datamodelling_score(scores, kept, outcomes.exp()), expected)
    models, queries = list(range(size[1])), list(range(size[2]))
    shuffler.shuffle(models)
    shuffler.shuffle(queries)
    shuffled = linear_datamodelling_score(scores[:, queries], kept[models], outcomes[models][:, queries])
    assert torch.equal(shuffled, expected[queries])


def test_sample_that_lowers_the_loss_should_score_high() -> None:
    kept = torch.tensor([[True, False], [False, True]])
    scores = torch.tensor([[1.0], [0.0]])
    assert linear_datamodelling_score(scores, kept, torch.tensor([[0.1], [0.9]])).item() == 1
    assert linear_datamodelling_score(scores, kept, torch.tensor([[0.9], [0.1]])).item() == -1


def test_constant_predictions_or_losses_score_zero() -> None:
    scores, kept, outcomes = trial(10, 8, 3, seed=1)
    assert linear_datamodelling_score(torch.zeros_like(scores), kept, outcomes).tolist() == [0, 0, 0]
    assert linear_datamodelling_score(scores, kept, torch.ones_like(outcomes)).tolist() == [0, 0, 0]


@settings(max_examples=60)
@given(
    st.integers(2, 300),
    st.integers(2, 12),
    st.floats(-1e6, 1e6).filter(bool) | st.sampled_from([0.1, 1e-40, -1e300, 5e-324]),
    st.integers(0, 1000),
)
def test_equal_sums_are_equal_to_the_last_bit_in_whatever_order_they_are_added(
    samples: int, models: int, constant: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(models, samples, generator=generator).argsort(1).argsort(1)
    kept, outcomes = order < samples // 2, torch.randn(models, 2, generator=generator)
    # Subsets of equal size: of constant scores there is nothing to rank, and of a score and its negative neither.
    scores = torch.full((samples, 2), constant, dtype=torch.float64)
    assert linear_datamodelling_score(scores, kept, outcomes).tolist() == [0, 0]
    signs = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    both, twice = torch.cat([signs, -signs]), torch.cat([kept, kept], 1)
    assert linear_datamodelling_score(both, twice, outcomes).tolist() == [0, 0]
    # A model's samples in another order, and in another place of the table.
    moved = torch.randperm(samples, generator=generator)
    single = torch.cat([subset_predictions(signs, kept[model : model + 1]) for model in range(models)])
    assert torch.equal(subset_predictions(signs[moved], kept[:, moved]), subset_predictions(signs, kept))
    assert torch.equal(single, subset_predictions(signs, kept))


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(2, 12), st.integers(0, 1000), st.sampled_from([1e-280, 1e-20, 1.0, 1e30]))
def test_sums_of_ordinary_scores_are_the_plain_sums(samples: int, models: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    kept = torch.rand(models, samples, generator=generator) < 0.5
    found, plain = subset_predictions(scores, kept), kept.double() @ scores
    sizes = scores.abs().sum(0)
    assert ((found - plain).abs() <= 1e-12 * sizes).all()
    far = (plain[:, None] - plain).abs() > 4e-12 * sizes  # the others are equal sets, or nearly so
    assert torch.equal((found[:, None] > found)[far], (plain[:, None] > plain)[far])


def test_metric_over_batches_is_the_function_and_forgets_when_reset() -> None:
    scores, kept, outcomes = trial(15, 9, 4, seed=2)
    predictions = subset_predictions(scores, kept)
    expected = linear_datamodelling_score(scores, kept, outcomes)
    mean, each = LinearDatamodellingScore(4), LinearDatamodellingScore(4, reduction="none")
    for metric in (mean, each):
        metric.update(predictions[:3], -outcomes[:3])
        metric.reset()
        for part in (slice(0, 1), slice(1, 2), slice(2, 9)):
            metric.update(predictions[part], outcomes[part])
    assert float(mean.compute()) == pytest.approx(float(expected.mean()), abs=1e-15)
    assert torch.equal(each.compute(), expected)
    batch = LinearDatamodellingScore(4)
    batch(predictions[:4], outcomes[:4])
    latest = batch(predictions[4:], outcomes[4:])
    assert float(latest) == pytest.approx(float(linear_datamodelling_score(scores, kept[4:], outcomes[4:]).mean()))
    assert float(batch.compute()) == pytest.approx(float(expected.mean()), abs=1e-15)


def test_losses_that_differ_beyond_float32_are_told_apart() -> None:
    metric = LinearDatamodellingScore(1)
    steps = 1e-12 * torch.arange(5, dtype=torch.float64)[:, None]
    metric.update(1 + steps, 1 - steps)
    assert float(metric.compute()) == 1


def test_noise_ceiling_is_the_score_that_the_truth_reaches() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(3000, 4, generator=generator)
    spread = torch.tensor([0.3, 1.0, 2.0, 3.0])
    first, second = (truth + spread * torch.randn(3000, 4, generator=generator) for _ in range(2))
    reached = rank_correlation(truth.mT, first.mT)
    for query in range(4):
        alone = noise_ceiling(first[:, query, None], second[:, query, None])
        torch.testing.assert_close(alone, reached[query], atol=0.05, rtol=0)
    # By theory the mean of 1 / (1 + σ²), for Pearson's; r itself would lie well below its root.
    theory = (1 / (1 + spread.square())).mean().sqrt().double()
    torch.testing.assert_close(noise_ceiling(first, second), theory, atol=0.03, rtol=0)
    pair = [slow_pearson(slow_ranks(first[:40, q].tolist()), slow_ranks(second[:40, q].tolist())) for q in range(4)]
    assert float(noise_ceiling(first[:40], second[:40])) == pytest.approx(math.sqrt(math.fsum(pair) / 4))
    assert noise_ceiling(first, -first).item() == 0


def test_noise_ceiling_of_few_subsets_is_not_drawn_down_by_single_queries_and_its_interval_covers_it() -> None:
    generator = torch.Generator().manual_seed(4)
    # Spearman's correlation of normal values whose Pearson's is 1/2.
    tries, subsets, queries, truth = 60, 10, 10, math.sqrt(6 / math.pi * math.asin(0.25))
    found, of_singles, covered = [], [], 0
    for _ in range(tries):
        share = torch.randn(subsets, queries, generator=generator)
        first, second = (share + torch.randn(subsets, queries, generator=generator) for _ in range(2))
        found.append(float(noise_ceiling(first, second)))
        of_singles += [float(noise_ceiling(first[:, q, None], second[:, q, None])) for q in range(queries)]
        low, high = noise_ceiling_interval(first, second, resamples=200)
        covered += low <= truth <= high
    assert statistics.mean(found) == pytest.approx(truth, abs=0.06)
    assert statistics.mean(of_singles) < truth - 0.06
    assert covered >= 0.88 * tries


# ---------------------------------------------------------------------------------- change and retrieval


@settings(max_examples=30)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 1000))
def test_change_and_its_standard_error_are_those_of_plain_loops(queries: int, references: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    without, others = torch.rand(queries, generator=generator), torch.rand(references, queries, generator=generator)
    expected = [float(without[q]) - statistics.mean(others[:, q].tolist()) for q in range(queries)]
    assert counterfactual_change(without, others).tolist() == pytest.approx(expected)
    metric = CounterfactualChange()
    for part in (slice(0, 1), slice(1, queries)):
        metric.update(without[part], others[:, part])
    found = metric.compute()
    assert float(found["mean"]) == pytest.approx(statistics.mean(expected), abs=1e-12)
    assert float(found["standard_error"]) == pytest.approx(statistics.stdev(expected) / math.sqrt(queries), rel=1e-9)


def test_standard_error_of_one_query_is_not_known() -> None:
    metric = CounterfactualChange()
    metric.update(torch.ones(1), torch.zeros(2, 1))
    assert math.isnan(metric.compute()["standard_error"])


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 40), st.integers(0, 10_000))
def test_retrieval_is_that_of_plain_loops_also_with_ties_and_negative_scores(
    samples: int, queries: int, top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-4, 3, (samples, queries), generator=generator).double()
    relevant = torch.rand(samples, queries, generator=generator) < 0.3
    relevant[torch.randint(samples, (queries,), generator=generator), torch.arange(queries)] = True
    found = exemplar_retrieval(scores, relevant, [top_k])
    expected = [slow_retrieval(scores[:, q].tolist(), relevant[:, q].tolist(), top_k) for q in range(queries)]
    assert found[f"recall@{top_k}"].tolist() == pytest.approx([recall for recall, _ in expected])
    assert found["average_precision"].tolist() == pytest.approx([precision for _, precision in expected])


def test_retrieval_over_batches_is_that_of_torchmetrics_for_distinct_positive_scores() -> None:
    generator = torch.Generator().manual_seed(7)
    scores = torch.rand(50, 6, generator=generator)
    relevant = torch.rand(50, 6, generator=generator) < 0.2
    indexes = torch.arange(6).expand(50, 6)
    metric = ExemplarRetrieval([1, 5, 10])
    for part in (slice(0, 1), slice(1, 6)):
        metric.update(scores[:, part], relevant[:, part])
    found = metric.compute()
    assert list(found) == ["recall@1", "recall@5", "recall@10", "mean_average_precision"]
    for k in (1, 5, 10):
        assert float(found[f"recall@{k}"]) == pytest.approx(float(RetrievalRecall(top_k=k)(scores, relevant, indexes)))
    expected = RetrievalMAP()(scores, relevant, indexes)
    assert float(found["mean_average_precision"]) == pytest.approx(float(expected))


def test_equal_scores_find_nothing() -> None:
    relevant = torch.tensor([[True, False]] * 3 + [[False, True]] * 3)
    found = exemplar_retrieval(torch.zeros(6, 2), relevant, [3])
    assert found["recall@3"].tolist() == [0, 0]


# ---------------------------------------------------------------------------------- uncertainty


def test_intervals_are_those_of_a_plain_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(11)
    values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    _, _, outcomes = trial(20, 12, 6, seed=11)
    predictions = -outcomes + 6 * torch.randn(12, 6, generator=generator)
    drawn = {what: uncertainty._draws(what, count, 50, 4) for what, count in [("repeats", 3), ("queries", 6)]}
    drawn["models"] = uncertainty._draws("models", 12, 50, 4)
    of_one, of_all, scores = [], [], []
    for number in range(50):
        queries = drawn["queries"][number].tolist()
        of_one.append(statistics.mean(float(values[0, query]) for query in queries))
        pairs = [(repeat, query) for repeat in drawn["repeats"][number].tolist() for query in queries]
        of_all.append(statistics.mean(float(values[pair]) for pair in pairs))
        models = drawn["models"][number]
        each = [
            slow_pearson(
                slow_ranks(predictions[models, query].tolist()), slow_ranks((-outcomes[models, query]).tolist())
            )
            for query in queries
        ]
        scores.append(statistics.mean(each))
    settings: dict[str, Any] = {"level": 0.8, "resamples": 50, "seed": 4}

    def interval(means: list[float]) -> Any:
        ends = torch.tensor([0.1, 0.9], dtype=torch.float64)
        return pytest.approx(tuple(torch.tensor(means, dtype=torch.float64).quantile(ends).tolist()))

    assert bootstrap_interval(values[0], **settings) == interval(of_one)
    assert bootstrap_interval(values, **settings) == interval(of_all)
    compared = paired_bootstrap(values, **settings)
    assert compared[:2] == interval(of_all)
    assert compared.share_above_zero == sum(mean > 0 for mean in of_all) / 50
    assert linear_datamodelling_interval(predictions, outcomes, **settings) == interval(scores)
    monkeypatch.setattr(uncertainty, "VALUES_AT_A_TIME", 7 * outcomes.numel())  # 50 resamples, 7 at a time
    assert linear_datamodelling_interval(predictions, outcomes, **settings) == interval(scores)


def test_an_interval_is_a_function_of_its_seed() -> None:
    values = torch.arange(12.0)
    torch.manual_seed(1)
    first = bootstrap_interval(values, seed=1)
    torch.manual_seed(2)
    assert bootstrap_interval(values, seed=1) == first
    assert bootstrap_interval(values, seed=2) != first


def test_two_methods_are_compared_on_the_same_draws() -> None:
    _, _, outcomes = trial(20, 30, 8, seed=12)
    better, worse = -outcomes, torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    same = linear_datamodelling_comparison(worse, worse, outcomes)
    assert same == (0, 0, 0)  # the draws cancel one by one
    found = linear_datamodelling_comparison(better, worse, outcomes)
    assert found.low > 0
    assert found.share_above_zero == 1
    back = linear_datamodelling_comparison(worse, better, outcomes)
    assert (back.low, back.high, back.share_above_zero) == pytest.approx((-found.high, -found.low, 0))


def test_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(20)
    covered, halved = 0, 0
    for seed in range(400):
        values = 2 + torch.rand(30, generator=generator)
        low, high = bootstrap_interval(values, resamples=500, seed=seed)
        quarter = (high - low) / 4
        covered += low < 2.5 < high
        halved += low + quarter < 2.5 < high - quarter
    # 0.95 is asked for, about 0.93 is known of 30 values; the standard error of 400 trials is 0.012.
    assert 0.89 < covered / 400 < 0.97
    assert halved / 400 < 0.8


def test_repeats_that_move_all_queries_at_once_widen_the_interval() -> None:
    generator = torch.Generator().manual_seed(21)
    covered, queries_alone = 0, 0
    for seed in range(200):
        values = torch.randn(10, 1, generator=generator) + torch.randn(1, 10, generator=generator)
        low, high = bootstrap_interval(values, resamples=500, seed=seed)
        covered += low < 0 < high
        low, high = bootstrap_interval(values.mean(0), resamples=500, seed=seed)
        queries_alone += low < 0 < high
    assert 0.84 < covered / 200 < 0.98
    assert queries_alone / 200 < 0.84


def test_interval_of_the_score_covers_it_although_queries_share_their_models() -> None:
    generator = torch.Generator().manual_seed(22)
    # What moves the predictions and losses of all queries at once is the model: 0.8 of both variances.
    truth = 6 / math.pi * math.asin(0.5 / 2)  # Spearman's of two normals that are correlated by 0.5
    covered, queries_alone = 0, 0
    for seed in range(100):
        common = torch.randn(2, 40, 1, generator=generator) * 0.8**0.5
        first, second = common + torch.randn(2, 40, 10, generator=generator) * 0.2**0.5
        outcomes = -(0.5 * first + 0.75**0.5 * second)
        low, high = linear_datamodelling_interval(first, outcomes, resamples=200, seed=seed)
        covered += low < truth < high
        low, high = bootstrap_interval(rank_correlation(first.mT, -outcomes.mT), resamples=200, seed=seed)
        queries_alone += low < truth < high
    assert covered >= 87
    assert queries_alone < 70


# ---------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two real processes computed."""
    out = tmp_path_factory.mktemp("processes")
    run_ranks(metric_runs.__file__, out)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("shares", metric_runs.SHARES)
def test_two_processes_with_uneven_shares_give_what_one_gives(two_processes: list[dict[str, Any]], shares: str) -> None:
    expected = metric_runs.measure(slice(0, metric_runs.MODELS))
    assert len(set(expected["linear datamodelling score"])) > 1
    for found in two_processes:
        assert found[shares]["linear datamodelling score"] == expected["linear datamodelling score"]
        assert found[shares]["change"] == pytest.approx(expected["change"], rel=1e-12)
        assert found[shares]["retrieval"] == pytest.approx(expected["retrieval"], rel=1e-12)


# ---------------------------------------------------------------------------------- bad input

TABLE = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
KEPT = torch.tensor([[True, False, True, False], [False, True, True, False]])
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "scores without queries": (lambda: normal_scores(TABLE[0]), r"scores have the shape \(3,\)"),
    "no samples": (lambda: normal_scores(TABLE[:0]), r"scores have the shape \(0, 3\)"),
    "a NaN": (lambda: linear_datamodelling_score(TABLE / 0 * 0, KEPT, TABLE[:2]), "scores hold a NaN"),
    "kept by number": (lambda: subset_predictions(TABLE, KEPT.long()), r"kept samples are torch.int64"),
    "other samples": (lambda: subset_predictions(TABLE[:3], KEPT), "each of the 3 samples"),
    "other models": (lambda: linear_datamodelling_score(TABLE, KEPT, TABLE), r"predictions have the shape \(2, 3\)"),
    "one model": (lambda: linear_datamodelling_score(TABLE, KEPT[:1], TABLE[:1]), "has 1 of them"),
    "other trainings": (lambda: noise_ceiling(TABLE, TABLE[:2]), r"the second \(2, 3\)"),
    "other queries": (lambda: LinearDatamodellingScore(2).update(TABLE, TABLE), "for 3 queries; give all 2"),
    "no models yet": (lambda: LinearDatamodellingScore(2).compute(), "has 0 of them"),
    "unknown reduction": (lambda: LinearDatamodellingScore(2, "sum"), "'sum' is not known"),  # type: ignore[arg-type]
    "other references": (lambda: counterfactual_change(TABLE[:, 0], TABLE), "of 4 queries without"),
    "no changes yet": (lambda: CounterfactualChange().compute(), "has no query"),
    "other exemplars": (lambda: exemplar_retrieval(TABLE, KEPT, [1]), r"exemplars \(2, 4\)"),
    "no exemplar": (lambda: exemplar_retrieval(TABLE, TABLE > 2, [1]), "at least one true"),
    "exemplars by number": (lambda: exemplar_retrieval(TABLE, torch.ones_like(TABLE), [1]), "must be bools"),
    "no place": (lambda: ExemplarRetrieval([0]), r"highest \[0\] scores"),
    "no retrieval yet": (lambda: ExemplarRetrieval([1]).compute(), "has no query"),
    "no values": (lambda: bootstrap_interval(torch.zeros(0)), "values have the shape"),
    "no level": (lambda: bootstrap_interval(TABLE, level=95), "between 0 and 1, not 95"),
    "no resamples": (lambda: paired_bootstrap(TABLE, resamples=0), "0 resamples"),
    "predictions of others": (lambda: linear_datamodelling_interval(TABLE, TABLE[:2]), "give both for the same"),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [info.name for info in pkgutil.iter_modules(metrics.__path__)])
def test_what_the_documentation_shows_is_so(name: str) -> None:
    module = importlib.import_module(f"lightning_unlearn.metrics.{name}")
    assert doctest.testmod(module).failed == 0


def test_comparison_with_a_multiple_counts_the_second_score_so_many_times() -> None:
    generator = torch.Generator().manual_seed(5)
    outcomes = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    same = -outcomes  # foretells every order rightly: a score of 1 in each resample but for ties
    once = linear_datamodelling_comparison(same, same, outcomes, times=1.0)
    half_as_much = linear_datamodelling_comparison(same, same, outcomes, times=0.5)
    assert once == (0.0, 0.0, 0.0)
    assert half_as_much == pytest.approx((0.5, 0.5, 1.0))
