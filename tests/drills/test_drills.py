"""A little of each drill; the whole ones are started by hand: ``python tests/drills/NAME.py``."""

from __future__ import annotations

from pathlib import Path

import altered_files
import full_disk
import kills
import pytest
import signals

# Lightning's advice on loaders is a matter of the commands' own tests.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_that_was_killed_leaves_whole_files_and_ends_with_the_same_numbers() -> None:
    report = kills.drill(3, seed=1, names=("attribute",))
    assert report.faults == []
    assert report.counts["results compared"] == 1


@pytest.mark.parametrize("name", ["attribute", "fisher", "prepare"])
def test_signals_end_a_command_soon_and_lose_nothing(name: str) -> None:
    report = signals.drill(2, seed=1, names=(name,))
    assert report.faults == []
    assert sum(report.counts.values()) == 2


def test_altered_files_of_each_kind_are_refused_or_read_as_they_were_written() -> None:
    report = altered_files.drill(12, seed=1)
    assert report.faults == []
    assert report.counts["refused"] > 6


def test_full_disks_are_one_sentence_and_a_restart_has_the_same_numbers() -> None:
    report = full_disk.drill(2, seed=1, names=("attribute",))
    assert report.faults == []
    assert report.counts["refused"] >= 1
