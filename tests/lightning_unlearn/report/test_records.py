"""What lies beside the page for machines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from report_toys import encoded_picture, sample_of, table_of

from lightning_unlearn.data.files import read_json
from lightning_unlearn.errors import InputError
from lightning_unlearn.report.report import write_report
from lightning_unlearn.scores.table import ScoreTable


def _written(folder: Path, table: ScoreTable, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    query = sample_of("query-0", "a fox", picture=encoded_picture(40, 30), seed=3)
    path = write_report(
        folder / "report.html", table, [query], lambda keys: [sample_of(key) for key in sorted(keys)], **options
    )
    return json.loads((folder / "report.json").read_text()), json.loads(path.with_name("assertion.json").read_text())


def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(files("lightning_unlearn.report").joinpath("assertion.schema.json").read_text())
    return schema


def test_the_record_has_what_the_page_shows(tmp_path: Path) -> None:
    table = table_of([[3.0, 1.0], [2.0, 5.0], [1.0, 0.0]], flips="max")
    table = replace(
        table, errors=np.full((3, 2), 0.1, np.float32), parts={"das": -table.scores, "d_trak": table.scores}
    )
    table.run["targets"]["query-0"]["sure"] = {"words": "not sure", "first_ten": 0.3}
    record, _ = _written(tmp_path, table, top=2, bottom=1)
    assert (record["training_images"], record["fingerprints"]) == (3, {"weights": "0123456789abcdef"})
    assert record["settings"]["rule"] == "difference"
    first, second = record["queries"]
    assert (first["key"], first["captions"], second["captions"]) == ("query-0", ["a fox"], ["prompt of query-1"])
    assert first["made"] == {"key": "query-0", "seed": "3"}
    assert first["sure"].startswith("Not sure: of their first ten the methods have 30.0")
    assert first["target"]["rise"] == 0.1
    image = first["most_influential"][0]
    assert (image["rank"], image["key"], image["score"], image["ranks"]) == (1, "image-0000", 3.0, [1, 1])
    assert image["error"] == pytest.approx(0.1)
    assert image["ranks_by_method"] == {"das": 3, "d_trak": 1}
    assert image["captions"] == ["caption of image-0000"]
    assert [one["rank"] for one in first["least_influential"]] == [3]


def test_the_assertion_says_how_the_answer_was_made_in_its_documented_form(tmp_path: Path) -> None:
    table = table_of([1.0, 2.0], network={"file": "/home/someone/models/last.ckpt", "adapter": "~/my_lora.safetensors"})
    table.run["shards"] = {"shard-a": {"url": "/home/someone/a.tar", "samples": 2, "bytes": 9, "version": "00-9"}}
    _, said = _written(tmp_path, table, recorded="2026-11-28T10:00:00+00:00")
    jsonschema.validate(said, _schema(), format_checker=jsonschema.FormatChecker())
    assert said["label"] == "org.lightning-unlearn.attribution"
    data = said["data"]
    assert data["signed"] is False
    assert "not signed" in data["signed_note"]
    assert data["recorded"] == "2026-11-28T10:00:00+00:00"
    assert data["fingerprints"]["weights"] == "0123456789abcdef"
    assert data["method"]["name"] == "unlearning"
    assert data["method"]["settings"]["unlearning"]["strategy"] == "newton"
    assert data["training_data"]["shards"] == [{"name": "shard-a", "samples": 2, "bytes": 9, "version": "00-9"}]
    # Where files lie is nobody's concern, in none of the three.
    assert data["method"]["settings"]["network"] == {"file": "last.ckpt", "adapter": "my_lora.safetensors"}
    for path in tmp_path.iterdir():
        assert "someone" not in path.read_text()
    assert data["queries"][0] == {
        "key": "query-0",
        "alg": "sha256",
        "hash": hashlib.sha256(encoded_picture(40, 30)).hexdigest(),
    }
    for file in data["files"]:
        assert hashlib.sha256((tmp_path / file["url"]).read_bytes()).hexdigest() == file["hash"]
    assert {file["url"] for file in data["files"]} == {"report.html", "report.json"}


def test_the_form_refuses_what_is_none(tmp_path: Path) -> None:
    _, said = _written(tmp_path, table_of([1.0]))
    for change in ({"signed": True}, {"files": [{"url": "x"}]}, {"surprise": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**said, "data": {**said["data"], **change}}, _schema())


def test_a_record_that_was_altered_shows_it(tmp_path: Path) -> None:
    _written(tmp_path, table_of([1.0, 2.0]))
    for name in ("report.json", "assertion.json"):
        path = tmp_path / name
        read_json(path, "is damaged", "make it again")
        path.write_text(path.read_text().replace("image-0001", "image-0000").replace("newton", "mirrored"))
        with pytest.raises(InputError, match="was altered"):
            read_json(path, "is damaged", "make it again")
