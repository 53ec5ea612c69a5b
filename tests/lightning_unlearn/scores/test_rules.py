from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attribution import half_width, score, values_by_draw
from torch import Tensor

from lightning_unlearn.scores import rules
from lightning_unlearn.scores.rules import FLIPS, RULES, Flips, joined, reduce_losses


def losses(
    samples: int, queries: int, flips: int, captions: int, draws: int, seed: int = 0
) -> tuple[Tensor, Tensor, list[int]]:
    """Losses of samples with one to all captions; NaN where there is no such caption."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(samples, flips, captions, draws, generator=generator, dtype=torch.float64) + 0.1
    unlearned = torch.rand(queries, *base.shape, generator=generator, dtype=torch.float64) + 0.1
    counts = [1 + sample % captions for sample in range(samples)]
    for sample, count in enumerate(counts):
        base[sample, :, count:] = torch.nan
        unlearned[:, sample, :, count:] = torch.nan
    return base, unlearned, counts


@settings(max_examples=25)
@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    strata=st.integers(1, 5),
    noises=st.integers(1, 3),
    rule=st.sampled_from(sorted(RULES)),
    flips=st.sampled_from(FLIPS),
    seed=st.integers(0, 1000),
)
def test_scores_and_their_errors_are_those_of_plain_loops(
    sizes: tuple[int, int, int, int], strata: int, noises: int, rule: str, flips: Flips, seed: int
) -> None:
    base, unlearned, counts = losses(*sizes, strata * noises, seed=seed)
    found = reduce_losses(base, unlearned, rule, flips, noises, keep_deviations=True)
    assert found.scores.shape == sizes[:2]
    assert found.deviations is not None
    assert torch.equal(found.scores, rules.score(rule, base, unlearned, flips))
    for sample, count in enumerate(counts):
        assert float(found.base_losses[sample]) == pytest.approx(float(base[sample, :, :count].mean()), rel=1e-12)
        for query in range(sizes[1]):
            views = base[sample], unlearned[query, sample], count, rule
            assert float(found.scores[sample, query]) == pytest.approx(score(*views, flips), rel=1e-6, abs=1e-12)
            kept = torch.tensor(values_by_draw(*views))
            torch.testing.assert_close(found.deviations[sample, query], kept, rtol=1e-5, atol=1e-6)
            expected = half_width(*views, flips, noises)
            if expected is None:
                assert found.errors is None
            else:
                assert found.errors is not None
                assert float(found.errors[sample, query]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("rule", "value"), [("difference", lambda b, u: u - b), ("ratio", lambda b, u: (u - b) / (u + b))]
)
def test_scores_are_the_same_bits_as_the_mean_over_views_and_the_larger_flip(rule: str, value: object) -> None:
    base, unlearned, _ = losses(50, 3, 2, 3, 8)
    for kind in (torch.float64, torch.float32):
        before, after = base.to(kind), unlearned.to(kind)
        expected = value(before, after).nanmean((-2, -1)).amax(-1).mT  # type: ignore[operator]
        assert torch.equal(reduce_losses(before, after, rule).scores, expected)


def test_flips_are_taken_by_the_larger_or_by_the_mean() -> None:
    base = torch.ones(1, 2, 1, 2)
    unlearned = torch.tensor([[[[[1.5, 2.5]], [[1.0, 1.5]]]]])  # (Q, B, flips, captions, draws)
    for side in (unlearned, unlearned.flip(2)):
        assert rules.score("difference", base, side).tolist() == [[1.0]]
        assert rules.score("difference", base, side, "mean").tolist() == [[0.625]]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rise_scores_zero_and_a_higher_loss_scores_higher(rule: str) -> None:
    base, _, _ = losses(4, 1, 2, 3, 2)
    scores = [rules.score(rule, base, (factor * base)[None]) for factor in (0.5, 1.0, 1.1, 2.0)]
    assert (scores[0] < 0).all()
    assert (scores[1] == 0).all()
    assert (scores[2] > 0).all()
    assert (scores[3] > scores[2]).all()
    nothing = reduce_losses(base, base[None], rule, noises=2).errors
    assert nothing is not None
    assert (nothing == 0).all()


def test_ratio_does_not_depend_on_the_scale_of_a_loss_and_lies_within_one() -> None:
    base, unlearned, _ = losses(5, 2, 2, 3, 4)
    once, tenfold = (rules.score("ratio", c * base, c * unlearned) for c in (1.0, 10.0))
    torch.testing.assert_close(once, tenfold)
    assert (once.abs() < 1).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("flips", FLIPS)
def test_view_whose_loss_is_zero_before_and_after_has_not_risen_and_is_not_left_out(rule: str, flips: Flips) -> None:
    base, unlearned, counts = losses(6, 2, 2, 3, 4)
    # As the last timestep of a schedule that ends without signal, where min-SNR gives it no weight.
    base[..., -1] *= 0
    unlearned[..., -1] *= 0
    found = reduce_losses(base, unlearned, rule, flips, keep_deviations=True)
    for values in (found.scores, found.errors, found.deviations):
        assert values is not None
        assert values.isfinite().all()
    assert found.deviations is not None
    assert (found.deviations[..., -1] == 0).all()
    for sample, count in enumerate(counts):
        for query in range(2):
            values = RULES[rule](base[sample, :, :count, :3], unlearned[query, sample, :, :count, :3])
            sides = values.sum((-2, -1)) / (4 * count)
            expected = sides.max() if flips == "max" else sides.mean()
            assert float(found.scores[sample, query]) == pytest.approx(float(expected), rel=1e-12)


def test_absent_view_stays_absent_where_others_are_zero() -> None:
    base = torch.tensor([0.0, torch.nan, 0.0])
    found = RULES["ratio"](base, torch.tensor([[0.0, torch.nan, 2.0]]))
    assert found.isnan().tolist() == [[False, True, False]]
    assert found[0, [0, 2]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("flips", FLIPS)
def test_no_samples_give_no_scores_but_the_same_columns(rule: str, flips: Flips) -> None:
    empty = torch.zeros(0, 2, 0, 6), torch.zeros(2, 0, 2, 0, 6)
    found = reduce_losses(*empty, rule, flips, noises=2, keep_deviations=True)
    assert found.base_losses.shape == (0,)
    assert found.scores.shape == (0, 2)
    assert found.errors is not None
    assert found.errors.shape == (0, 2)
    assert found.deviations is not None
    assert found.deviations.shape == (0, 2, 2, 6)
    base, unlearned, _ = losses(3, 2, 2, 2, 6)
    some = reduce_losses(base, unlearned, rule, flips, noises=2, keep_deviations=True)
    whole = joined([some, found])
    assert torch.equal(whole.scores, some.scores)
    assert torch.equal(whole.errors, some.errors)  # type: ignore[arg-type]
    assert torch.equal(whole.deviations, some.deviations)  # type: ignore[arg-type]


def test_what_is_not_asked_for_is_not_kept() -> None:
    base, unlearned, _ = losses(3, 2, 1, 2, 4)
    found = reduce_losses(base, unlearned, "difference", noises=2)
    assert found.deviations is None
    assert joined([found, found]).deviations is None


def test_a_rule_of_ones_own_is_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "rose", lambda base, unlearned: (unlearned > base).to(base).where(~base.isnan(), base))
    base, unlearned, counts = losses(4, 2, 1, 3, 6)
    found = reduce_losses(base, unlearned, "rose", noises=2)
    for sample, count in enumerate(counts):
        rose = (unlearned[:, sample, 0, :count] > base[sample, 0, :count]).double().mean((1, 2))
        torch.testing.assert_close(found.scores[sample], rose)
    assert found.errors is not None
    assert (found.errors > 0).any()
