from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor
from toys import done_shards

from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import (
    FAILED,
    RUN_FILE,
    SCORES,
    read_deviations,
    read_run,
    read_scores,
    run_digest,
    shard_path,
    write_shard_scores,
)
from lightning_unlearn.scores.rules import Reduced
from lightning_unlearn.scores.run_record import write_run as record

FINGERPRINTS = {"weights": "abc", "views": "def"}


def write_run(folder: Path, shards: Mapping[str, Any], fingerprints: Mapping[str, str] = FINGERPRINTS) -> None:
    folder.mkdir(exist_ok=True)
    about = {shard: {"url": f"/data/{shard}.tar", "samples": None, "bytes": None} for shard in shards}
    (folder / RUN_FILE).write_text(json.dumps({"fingerprints": dict(fingerprints), "shards": about}))


def write(
    folder: Path,
    shard: str,
    keys: list[str],
    values: Any,
    queries: list[str] | None = None,
    errors: Any = None,
    deviations: Tensor | None = None,
) -> None:
    queries = queries or ["q1", "q 2/ü"]
    scores, halves = (
        None if numbers is None else torch.tensor(numbers, dtype=torch.float64).reshape(len(keys), len(queries))
        for numbers in (values, errors)
    )
    assert scores is not None
    reduced = Reduced(torch.full((len(keys),), 0.5), scores, halves, deviations)
    write_shard_scores(folder, shard, keys, reduced, queries, run_digest(FINGERPRINTS))


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


def test_table_with_errors_reads_them_back_and_one_without_has_none(run: Path) -> None:
    assert read_scores(run).errors is None
    with pytest.raises(InputError, match=r"no errors.*views.noises: 2"):
        read_scores(run).rank_ranges("q1")
    write(run, "one", ["d", "a"], [[0.3, 1.0], [0.3, -1.0]], errors=[[0.5, 0.1], [0.05, 0.1]])
    write(run, "two", ["b", "c"], [[0.9, 0.0], [-0.2, 0.5]], errors=[[0.2, 0.1], [0.1, 0.1]])
    table = read_scores(run)
    assert table.errors is not None
    assert table.errors.dtype == np.float32
    np.testing.assert_array_equal(table.errors, np.float32([[0.05, 0.1], [0.2, 0.1], [0.1, 0.1], [0.5, 0.1]]))
    # For q1: a in [0.25, 0.35], b in [0.7, 1.1], c in [-0.3, -0.1], d in [-0.2, 0.8].
    assert table.rank_ranges("q1").tolist() == [[1, 2], [0, 1], [2, 3], [0, 3]]
    # After a race that finished a and c alone, the best of them comes first.
    raced = replace(table, finished=np.array([True, False, True, False]), run={**table.run, "race": {"top": 1}})
    assert raced.rank_ranges("q1").tolist() == [[0, 0], [1, 2], [2, 3], [1, 3]]
    frame = pandas.read_parquet(run / SCORES)
    assert list(frame.columns)[3:] == ["score:q1", "score:q 2/ü", "error:q1", "error:q 2/ü"]


def test_deviations_are_read_back_in_the_order_of_the_table_and_only_when_asked_for(run: Path) -> None:
    with pytest.raises(InputError, match="keeps no deviations; score into another folder with keep_deviations"):
        read_deviations(run, "q1")
    queries = ["q.1", "q"]  # Parquet's own paths of nested columns have dots
    kept = torch.randn(4, 2, 2, 3, generator=torch.Generator().manual_seed(0))  # (B, Q, flips, draws)
    content = json.loads((run / RUN_FILE).read_text())
    content["shards"]["empty"] = content["shards"]["one"]
    (run / RUN_FILE).write_text(json.dumps({**content, "timesteps": [1, 2, 3]}))
    write(run, "one", ["d", "a"], [[0, 1], [2, 3]], queries, deviations=kept[[3, 0]])
    write(run, "two", ["b", "c"], [[0, 1], [2, 3]], queries, deviations=kept[1:3])
    write(run, "empty", [], [], queries, deviations=kept[:0])
    assert read_scores(run).keys == ["a", "b", "c", "d"]
    for number, query in enumerate(queries):
        np.testing.assert_array_equal(read_deviations(run, query), kept[:, number].numpy())
    assert set(pandas.read_parquet(run / SCORES)["deviations:q"].map(len)) == {6}
    with pytest.raises(InputError, match="no scores of 'q1'"):
        read_deviations(run, "q1")
    shard_path(run, "one").unlink()
    np.testing.assert_array_equal(read_deviations(run, "q", partial=True), kept[1:3, 1].numpy())


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


def test_parts_of_methods_asked_together_come_back_under_their_names(tmp_path: Path) -> None:
    folder, scores = tmp_path, torch.tensor([[0.3, 1.0], [0.2, -1.0]])
    fingerprints = {"weights": "w"}
    reduced = Reduced(torch.tensor([0.5, 0.6]), scores, parts={"das": 2 * scores, "d_trak": -scores})
    write_shard_scores(folder, "one", ["b", "a"], reduced, ["first", "sec:ond"], run_digest(fingerprints), "v")
    content = {"fingerprints": fingerprints, "shards": {"one": {"url": "one.tar", "version": "v"}}}
    record(folder, {**content, "parts": ["das", "d_trak"]})
    table = read_scores(folder)
    assert table.queries == ["first", "sec:ond"]
    np.testing.assert_array_equal(table.parts["das"], 2 * table.scores)
    np.testing.assert_array_equal(table.parts["d_trak"], -table.scores)
    record(folder, {**content, "parts": ["das", "trak"]})
    with pytest.raises(InputError, match="lack what 'trak' said"):
        read_scores(folder)
