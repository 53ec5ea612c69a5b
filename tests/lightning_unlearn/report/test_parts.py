"""What the report says where several methods were asked together."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_unlearn.report.report import write_report
from lightning_unlearn.report.words import named_methods, sureness
from lightning_unlearn.scores.table import ScoreTable


def test_words_of_how_sure_an_answer_is() -> None:
    assert sureness({}) == ""
    found = {"words": "not sure", "first_ten": 0.3, "rank_correlation": 0.1, "correlation": 0.2, "caption_share": 0.62}
    assert sureness(found).replace("\N{NO-BREAK SPACE}", " ") == (
        "Not sure: of their first ten the methods have 30.0 % in common, and their scores correlate by 0.20; 62.0 % of "
        "what tells images apart is their caption alone."
    )
    del found["caption_share"]
    assert sureness(found).endswith("correlate by 0.20.")
    found |= {"halves": 0.5, "alike": {"captions": 0.3, "pixels": 0.95}}
    said = sureness(found).replace("\N{NO-BREAK SPACE}", " ")
    assert "unlearning by one half of its views and by the other has 50.0 % of them in common" in said
    assert said.endswith("similarity of pixels alone says the same (a correlation of 0.950).")


def test_methods_by_their_names() -> None:
    assert named_methods(["das", "d_trak", "unlearning"]) == "DAS, D-TRAK and unlearning"
    assert named_methods(["das"]) == "DAS"
    assert named_methods([]) == ""


def test_each_image_says_where_each_method_has_it(tmp_path: Path) -> None:
    scores = np.array([[2.0], [1.0], [0.0]], np.float32)
    table = ScoreTable(
        keys=["a", "b", "c"],
        shards=["one"] * 3,
        queries=["query"],
        scores=scores,
        base_losses=np.ones(3, np.float32),
        run={
            "fingerprints": {},
            "targets": {"query": {"sure": {"words": "methods agree", "first_ten": 1.0}}},
            "parts": ["das", "d_trak"],
        },
        parts={"das": -scores, "d_trak": scores},
    )
    page = write_report(tmp_path / "report.html", table, [], lambda keys: []).read_text()
    assert "rank by das 3, d_trak 1" in page
    assert "rank by das 1, d_trak 3" in page
    assert "Methods agree: of their first ten" in page
    assert "by DAS and D-TRAK together." in page
    assert "nothing was unlearned" not in page
