from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_attribution import score
from torch import Tensor
from toys import done_shards

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores import (
    FAILED,
    RULES,
    RUN_FILE,
    SCORES,
    read_run,
    read_scores,
    reduce_losses,
    run_digest,
    shard_path,
    write_shard_scores,
)

FINGERPRINTS = {"weights": "abc", "views": "def"}


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


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    rule=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 1000),
)
def test_scores_are_those_of_plain_loops(sizes: tuple[int, int, int, int, int], rule: str, seed: int) -> None:
    base, unlearned, counts = losses(*sizes, seed=seed)
    mean_base, found = reduce_losses(base, unlearned, rule)
    assert found.shape == (sizes[0], sizes[1])
    for sample, count in enumerate(counts):
        assert float(mean_base[sample]) == pytest.approx(float(base[sample, :, :count].mean()), rel=1e-12)
        for query in range(sizes[1]):
            expected = score(base[sample], unlearned[query, sample], count, rule)
            assert float(found[sample, query]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_difference_takes_the_flip_that_rose_more() -> None:
    base = torch.ones(1, 2, 1, 2)
    unlearned = torch.tensor([[[[[1.5, 2.5]], [[1.0, 1.5]]]]])  # (Q, B, flips, captions, draws)
    assert reduce_losses(base, unlearned, "difference")[1].tolist() == [[1.0]]
    assert reduce_losses(base, unlearned.flip(2), "difference")[1].tolist() == [[1.0]]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rise_scores_zero_and_a_higher_loss_scores_higher(rule: str) -> None:
    base, _, _ = losses(4, 1, 2, 3, 2)
    scores = [reduce_losses(base, (factor * base)[None], rule)[1] for factor in (0.5, 1.0, 1.1, 2.0)]
    assert (scores[0] < 0).all()
    assert (scores[1] == 0).all()
    assert (scores[2] > 0).all()
    assert (scores[3] > scores[2]).all()


def test_ratio_does_not_depend_on_the_scale_of_a_loss_and_lies_within_one() -> None:
    base, unlearned, _ = losses(5, 2, 2, 3, 4)
    once, tenfold = (reduce_losses(c * base, c * unlearned, "ratio")[1] for c in (1.0, 10.0))
    torch.testing.assert_close(once, tenfold)
    assert (once.abs() < 1).all()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_samples_give_no_scores(rule: str) -> None:
    base, scores = reduce_losses(torch.zeros(0, 1, 0, 3), torch.zeros(2, 0, 1, 0, 3), rule)
    assert base.shape == (0,)
    assert scores.shape == (0, 2)


# ---------------------------------------------------------------------------------- the table


def write_run(folder: Path, shards: Mapping[str, Any], fingerprints: Mapping[str, str] = FINGERPRINTS) -> None:
    folder.mkdir(exist_ok=True)
    about = {shard: {"url": f"/data/{shard}.tar", "samples": None, "bytes": None} for shard in shards}
    (folder / RUN_FILE).write_text(json.dumps({"fingerprints": dict(fingerprints), "shards": about}))


def write(folder: Path, shard: str, keys: list[str], values: Any, queries: list[str] | None = None) -> None:
    queries = queries or ["q1", "q 2/ü"]
    scores = torch.tensor(values, dtype=torch.float64).reshape(len(keys), len(queries))
    write_shard_scores(folder, shard, keys, torch.full((len(keys),), 0.5), scores, queries, run_digest(FINGERPRINTS))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path, dict.fromkeys(("one", "two")))
    write(tmp_path, "one", ["d", "a"], [[0.3, 1.0], [0.3, -1.0]])
    write(tmp_path, "two", ["b", "c"], [[0.9, 0.0], [-0.2, 0.5]])
    return tmp_path


def test_table_reads_back_what_was_written_ordered_by_key(run: Path) -> None:
    table = read_scores(run)
    assert table.keys == ["a", "b", "c", "d"]
    assert table.shards == ["one", "two", "two", "one"]
    assert table.queries == ["q1", "q 2/ü"]
    assert table.scores.dtype == np.float32
    np.testing.assert_allclose(table.scores, np.float32([[0.3, -1], [0.9, 0], [-0.2, 0.5], [0.3, 1]]))
    np.testing.assert_allclose(table.base_losses, [0.5] * 4)


def test_top_and_rank_put_the_highest_first_and_ties_in_the_order_of_keys(run: Path) -> None:
    table = read_scores(run)
    assert [key for key, _ in table.top("q1", 9)] == ["b", "a", "d", "c"]
    assert table.top("q 2/ü", 1) == [("d", 1.0)]
    assert [table.rank("q1", key) for key in "badc"] == [0, 1, 1, 3]


def test_pandas_reads_the_folder_in_one_line_even_beside_an_unfinished_file(run: Path) -> None:
    (run / SCORES / ".one.parquet.123.tmp").write_bytes(b"half a file")
    frame = pandas.read_parquet(run / SCORES)
    assert sorted(frame["key"]) == ["a", "b", "c", "d"]
    assert list(frame.columns) == ["key", "shard", "base_loss", "score:q1", "score:q 2/ü"]
    assert done_shards(run) == {"one", "two"}
    assert len(read_scores(run).keys) == 4


def test_shard_without_samples_is_part_of_a_whole_table(run: Path) -> None:
    write_run(run, dict.fromkeys(("one", "two", "empty")))
    write(run, "empty", [], [])
    assert read_scores(run).keys == ["a", "b", "c", "d"]
    assert len(pandas.read_parquet(run / SCORES)) == 4


def test_incomplete_table_is_refused_with_the_missing_shard_unless_asked_for(run: Path) -> None:
    write_run(run, dict.fromkeys(("one", "two", "three", "four")))
    with pytest.raises(InputError, match=r"2 of 4 shards are not scored yet, e.g. /data/three.tar; run"):
        read_scores(run)
    assert len(read_scores(run, partial=True).keys) == 4


def test_incomplete_table_says_why_the_shard_that_it_names_failed(run: Path) -> None:
    write_run(run, dict.fromkeys(("one", "two", "three", "four")))
    (run / FAILED).mkdir()
    (run / FAILED / "four.json").write_text(json.dumps({"error": "it was cut off"}))
    (run / FAILED / "one.json").write_text(json.dumps({"error": "an old note"}))
    with pytest.raises(InputError, match=r"/data/four.tar \(it was cut off\)"):
        read_scores(run)


def test_key_in_two_shards_is_refused_with_both_names(run: Path) -> None:
    write(run, "two", ["b", "a"], [[0, 0], [0, 0]])
    with pytest.raises(InputError, match=r"'a' stands in (one and in two|two and in one)"):
        read_scores(run)


def test_scores_of_another_run_are_not_mixed_in(run: Path) -> None:
    write_run(run, dict.fromkeys(("one", "two")), {**FINGERPRINTS, "views": "other"})
    with pytest.raises(InputError, match=r"scores of one .* are of another run"):
        read_scores(run)


def test_folder_without_a_run_or_without_scores_is_refused(tmp_path: Path) -> None:
    assert read_run(tmp_path) is None
    with pytest.raises(InputError, match="There are no scores in"):
        read_scores(tmp_path)
    write_run(tmp_path, {"one": None})
    with pytest.raises(InputError, match=r"No shard in .* is scored yet"):
        read_scores(tmp_path, partial=True)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"fingerprints": '])
def test_run_file_that_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(InputError, match="is not the record of a run"):
        read_scores(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"no parquet at all" * 10])
def test_damaged_parquet_is_one_sentence_that_names_the_file(run: Path, damage: bytes) -> None:
    path = shard_path(run, "two")
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"two\.parquet can't be read"):
        read_scores(run)


def test_truncated_parquet_is_one_sentence_that_names_the_file(run: Path) -> None:
    path = shard_path(run, "two")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"two\.parquet can't be read"):
        read_scores(run)


def test_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / SCORES).write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"scores of shard one can't be written to .*one\.parquet"):
        write(tmp_path, "one", ["a"], [[0, 0]])
