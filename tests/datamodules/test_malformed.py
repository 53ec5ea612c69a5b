from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from lightning_unlearn.datamodules import http_reply, remote, source

DRILL = runpy.run_path(str(Path(__file__).parents[1] / "drills" / "malformed_tars.py"))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    # The drill sets them for its whole process.
    for module, name in ((remote, "WAITS"), (remote, "PATIENCE"), (http_reply, "TIMEOUT"), (source, "LONGEST_UNSAID")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_malformed_shards_give_samples_or_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert DRILL["drill_shards"](34, 1, tmp_path) == []
    assert "a chain of headers: refused" in capsys.readouterr().out


def test_servers_that_go_wrong_give_samples_or_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every: Any = DRILL["manners"]
    monkeypatch.setitem(DRILL["drill_servers"].__globals__, "manners", lambda seed: every(seed)[::7])
    assert DRILL["drill_servers"](8, 1, tmp_path) == []
