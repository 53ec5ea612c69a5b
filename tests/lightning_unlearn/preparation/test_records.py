import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts import read_records
from lightning_unlearn.preparation.records import Reading, Record


def records(source: Path, **settings: Any) -> list[Record]:
    return list(read_records(str(source), Reading(**settings)))


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        lines = [",".join('"' + _cell(value).replace('"', '""') + '"' for value in line) for line in cells]
        path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")  # as spreadsheets write it
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "captions"])
def test_a_table_gives_captions_pictures_keys_and_whatever_else_it_holds(
    suffix: str, column: str, tmp_path: Path
) -> None:
    rows = [
        {"file_name": "a/one.png", column: ["a, b", 'with "quotes"'], "city": "Aarhus"},
        {"file_name": "two.jpg", column: ["c"], "city": "Bern"},
    ]
    for source in (
        write_table(tmp_path / f"table{suffix}", rows),
        write_table(tmp_path / f"metadata{suffix}", rows).parent,
    ):
        first, second = records(source)
        assert first.captions == ["a, b", 'with "quotes"']
        assert first.picture == tmp_path / "a" / "one.png"
        assert [first.key, second.key] == ["a-one", "two"]
        assert first.metadata == {"file_name": "a/one.png", "city": "Aarhus"}
        assert second.captions == ["c"]
        assert [record.key for record in records(source, key="city")] == ["Aarhus", "Bern"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_one_caption_needs_no_list_and_may_start_with_a_bracket(suffix: str, tmp_path: Path) -> None:
    texts = ["a cat", "[sic] a cat", "[1]", ""]
    table = write_table(
        tmp_path / f"t{suffix}", [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(texts)]
    )
    assert [record.captions for record in records(table)] == [["a cat"], ["[sic] a cat"], ["[1]"], []]


def test_values_that_json_does_not_know_become_text(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.parquet", [{"file_name": "a.png", "text": "a", "price": Decimal("1.50")}])
    assert records(table)[0].metadata["price"] == "1.50"


def test_a_folder_gives_pictures_in_the_order_of_their_paths_with_the_texts_beside_them(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".git/d.png", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"one \r\n\r\n two\n")
    (tmp_path / "sub" / "c.txt").write_text("three")
    found = records(tmp_path)
    assert [(record.key, record.captions) for record in found] == [
        ("a", []),
        ("b", ["one", "two"]),
        ("sub-c", ["three"]),
    ]
    assert found[0].fault is not None
    assert "a.JPG has no caption" in found[0].fault
    assert found[1].fault is None


def test_a_picture_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    (record,) = records(write_table(tmp_path / "t.jsonl", [{"file_name": "gone.png", "text": "gone"}]))
    assert record.fault is not None
    assert "there is no picture at" in record.fault


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", json.dumps(["one", ["two", "three"], {"captions": ["four"], "id": 7}])),
        ("c.jsonl", '"one"\n["two", "three"]\n{"caption": "four", "id": 7}\n'),
    ],
)
def test_captions_alone_are_numbered_in_their_order(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    found = records(tmp_path / name, pictures=False)
    assert [record.captions for record in found] == [["one"], ["two", "three"], ["four"]]
    assert [record.key for record in found] == ["00000000", "00000001", "00000002"]
    assert found[2].metadata == {"id": 7}
    assert all(record.picture is None and record.fault is None for record in found)


def test_lines_of_text_are_captions_and_an_empty_one_keeps_its_row(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("one\n\nthree\n")
    assert [record.captions for record in records(tmp_path / "c.txt", pictures=False)] == [["one"], [], ["three"]]


@pytest.mark.parametrize(
    ("key", "plain"),
    [(" a b ", "a b"), ("x/../y.z", "x-__-y_z"), ("line\nbreak", "line_break"), (17, "17")],
)
def test_a_key_can_not_split_a_tar_member_a_folder_or_a_line(key: Any, plain: str, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"file_name": "a.png", "text": "a", "id": key}])
    assert [record.key for record in records(table, key="id")] == [plain]


def test_pictures_outside_the_folder_are_called_by_their_names(tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": "a"} for name in ("/data/one.png", "../two.png", "in/./three.png")]
    assert [record.key for record in records(write_table(tmp_path / "t.jsonl", rows))] == ["one", "two", "in-three"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", b"path,text\na.png,a\n", "no column 'file_name'.*path, text"),
        ("t.csv", b"file_name,words\na.png,a\n", "no column of captions"),
        ("t.csv", b"file_name,text\na.png\n", "row 1 has not as many cells"),
        ("t.csv", b"file_name,text\na.png,a,b\n", "row 1 has not as many cells"),
        ("t.csv", b"file_name,text\n,a\n", "row 1 has no file_name"),
        ("t.csv", b"file_name,text\na.png,caf\xe9\n", "not UTF-8"),
        ("t.jsonl", b'{"file_name": "a.png"', "line 1"),
        ("t.jsonl", b"17\n", "row 1 is a int"),
        ("t.json", b'{"a": 1}', "no list"),
        ("t.parquet", b"nothing", "can't be read as .parquet"),
        ("t.xlsx", b"", "name a folder of pictures"),
    ],
)
def test_a_table_that_can_not_be_used_gets_one_sentence(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence) as caught:
        records(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_column_must_be_there_and_filled(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"file_name": "a.png", "text": "a", "id": " "}])
    with pytest.raises(InputError, match="no column 'number'"):
        records(table, key="number")
    with pytest.raises(InputError, match="no key in its column 'id'"):
        records(table, key="id")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no metadata table"):
        records(tmp_path / "folder", key="id")


def test_a_folder_with_two_tables_is_refused(tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl"):
        write_table(tmp_path / f"metadata{suffix}", [{"file_name": "a.png", "text": "a"}])
    with pytest.raises(InputError, match=r"metadata\.csv and metadata\.jsonl"):
        records(tmp_path)
