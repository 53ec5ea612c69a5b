"""A study on disk: finished models' files, and whose study it is."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_toys import QUERIES, finish
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import FinishedRun, Outcome, Run, Study
from lightning_unlearn.evaluation.runs import seed_runs, without
from lightning_unlearn.evaluation.study import differences

SETTINGS: dict[str, Any] = {"recipe": {"lr": 0.1, "steps": (1, 2)}, "target": None}
RUN = without(["b", "a"], 4)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study", SETTINGS)


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_finished_model_is_read_as_it_was_written(study: Study) -> None:
    outcomes = {"q": Outcome(0.1234567, [0.1] * 10, 1e-9, -0.5, 1.0), "r é": Outcome(2.0, [3.0] * 10)}
    study.write(RUN, outcomes, 12.34, {"device": "cpu"})
    assert Study(study.folder, SETTINGS).read(RUN) == FinishedRun(RUN, outcomes, 12.3)
    content = json.loads(study.path(RUN).read_bytes())
    assert content["about"] == {"device": "cpu"}
    assert set(content["outcomes"]["r é"]) == {"loss", "parts"}
    assert [path.name for path in study.path(RUN).parent.iterdir()] == [f"{RUN.name}.json"]


def test_a_model_that_the_disk_has_no_room_for_is_not_finished(study: Study) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        message = refused(finish, study, RUN, [1.0, 2.0, 3.0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert list(study.path(RUN).parent.iterdir()) == []
    finish(study, RUN, [1.0, 2.0, 3.0])
    assert study.is_finished(RUN)


def test_what_a_killed_process_was_writing_is_no_finished_model(study: Study) -> None:
    finish(study, RUN, [1.0, 2.0, 3.0])
    whole = study.path(RUN).read_bytes()
    # As write_atomically leaves it between writing and renaming.
    study.path(RUN).rename(study.path(RUN).with_name(f".{RUN.name}.json.123.tmp"))
    assert not study.is_finished(RUN)
    assert study.missing([RUN]) == [RUN]
    assert study.typical_seconds() is None
    assert "not trained yet" in refused(study.read, RUN)
    finish(study, RUN, [1.0, 2.0, 3.0])
    assert study.path(RUN).read_bytes() == whole


def test_missing_are_those_not_finished_each_once_in_their_order(study: Study) -> None:
    runs = seed_runs(4)
    finish(study, runs[1], [1.0, 2.0, 3.0])
    assert study.missing([runs[3], runs[0], runs[1], runs[3], runs[2]]) == [runs[3], runs[0], runs[2]]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-20], lambda content: b"[]", lambda content: content.replace(b"loss", b"lost")]
)
def test_a_damaged_file_is_said_to_be_so(study: Study, damage: Any) -> None:
    finish(study, RUN, [1.0, 2.0, 3.0])
    study.path(RUN).write_bytes(damage(study.path(RUN).read_bytes()))
    assert re.match(f"{study.path(RUN)} (is damaged|was altered).*; remove it and run again", refused(study.read, RUN))


def test_a_file_under_another_models_name_is_refused(study: Study) -> None:
    finish(study, RUN, [1.0, 2.0, 3.0])
    study.path(RUN).rename(study.path(Run()))
    assert "of another model" in refused(study.read, Run())


def test_losses_are_a_table_with_gaps_where_nothing_was_measured(study: Study) -> None:
    first, second = seed_runs(2)
    finish(study, first, [1.0, 2.0, 3.0], ssim=[0.5, 0.25, 0.125])
    finish(study, second, [4.0, 5.0, 6.0])
    order = [QUERIES[2], QUERIES[0]]
    np.testing.assert_array_equal(study.losses([second, first], order), [[6.0, 4.0], [3.0, 1.0]])
    np.testing.assert_array_equal(study.losses([first, second], order, "ssim"), [[0.125, 0.5], [np.nan, np.nan]])
    assert study.losses([], order).shape == (0, 2)
    assert "lacks the query 'nobody'" in refused(study.losses, [first], ["nobody"])


def test_a_model_takes_what_the_median_took(study: Study) -> None:
    assert study.typical_seconds() is None
    for run, seconds in zip(seed_runs(3), (1.0, 2.0, 90.0), strict=True):
        study.write(run, {}, seconds, {})
    (study.folder / "models" / "damaged.json").write_text("{")
    assert study.typical_seconds() == 2.0


def test_a_study_without_a_model_is_whoevers_comes_and_no_other_study_writes_into_it(study: Study) -> None:
    settings = {"recipe": {"lr": 0.2, "steps": [1, 2]}, "target": "unet"}
    other = Study(study.folder, settings)
    (run,) = seed_runs(1)
    assert "was made with another recipe.lr, target" in refused(study.write, run, {}, 1.0, {})
    other.write(run, {}, 1.0, {})
    assert Study(study.folder, settings).is_finished(run)


def test_a_study_of_another_recipe_is_refused_and_left_alone(study: Study) -> None:
    study.write(*seed_runs(1), {}, 1.0, {})
    before = (study.folder / "study.json").read_bytes()
    message = refused(Study, study.folder, {"recipe": {"lr": 0.2, "steps": [1, 2]}, "target": "unet"})
    assert "was made with another recipe.lr, target; choose another folder" in message
    assert (study.folder / "study.json").read_bytes() == before
    many = {name: name for name in "abcd"}
    assert "another a, b, c and more;" in refused(Study, study.folder, {**SETTINGS, **many})


def test_the_same_recipe_may_come_in_another_order_or_leave_out_what_is_none(study: Study) -> None:
    assert Study(study.folder, {"recipe": {"steps": [1, 2], "lr": 0.1}}).folder == study.folder


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_folder_with_something_else_called_study_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    assert "is not the record of a study" in refused(Study, tmp_path, SETTINGS)
    assert (tmp_path / "study.json").read_text() == content


def test_a_study_where_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "choose another folder" in refused(Study, tmp_path / "file" / "study", SETTINGS)


leaves = st.none() | st.booleans() | st.integers() | st.text("ab", max_size=2) | st.lists(st.integers(), max_size=2)
trees = st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@given(st.dictionaries(st.sampled_from("abc"), trees, max_size=3), st.lists(st.sampled_from("abc"), min_size=1))
def test_differences_are_named_by_their_place(tree: dict[str, Any], place: list[str]) -> None:
    assert differences(tree, json.loads(json.dumps(tree))) == []
    changed = json.loads(json.dumps(tree))
    inner = changed
    for name in place[:-1]:
        if not isinstance(inner.get(name), dict):
            inner[name] = {}
        inner = inner[name]
    inner[place[-1]] = "changed"
    found = differences(tree, changed)
    # The place itself, or one above it where ours has no mapping.
    assert [name for name in found if ".".join(place).startswith(name)]
    assert sorted(found) == sorted(differences(changed, tree))
