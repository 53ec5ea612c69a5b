"""Files of our own that were altered: they are read as they were, or one sentence names the file.

Written against issue 14 before its cures: Fishers, deltas, score tables and ``run.json``; truncated, of other types,
with fields, rows or columns missing or added. No other exception comes out, and no table is silently shorter.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from command_toys import run, write_config

from lightning_unlearn.command_line.cli import main
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import DiagonalFisher, EKFACFisher, Fisher, load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.deltas import CHECKPOINT_KEY
from lightning_unlearn.weights.parameters import LayerSpec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

DEEP = "[" * 100_000 + "]" * 100_000


def said_well(text: str, *names: str) -> None:
    """One sentence without raw control characters, that has one of the names in it."""
    assert text.isprintable(), f"raw characters in {text!r}"
    assert not names or any(name in text for name in names), f"none of {names} in {text!r}"


class Touches:
    """Unpickled, it makes a file in the current folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


# ------------------------------------------------------------------------------------------------------- Fishers

LAYERS = {"a": LayerSpec("a", (2, 3), True), "b": LayerSpec("b", (4, 2), False)}


def captured() -> dict[str, CapturedLayer]:
    generator = torch.Generator().manual_seed(0)

    def layer(o: int, i: int) -> CapturedLayer:
        return CapturedLayer(torch.randn(5, 2, i, generator=generator), torch.randn(5, 2, o, generator=generator))

    return {"a": layer(2, 3), "b": layer(4, 2)}


def made(kind: str) -> Fisher:
    fisher: Fisher = DiagonalFisher(LAYERS) if kind == "diagonal" else EKFACFisher(LAYERS)
    fisher.update(captured())
    if kind == "ekfac":
        fisher.next_stage()
        fisher.update(captured())
    fisher.weights = {name: torch.ones(shape) for name, shape in fisher.parameter_shapes.items()}
    fisher.provenance = {"steps": [0, 1]}
    return fisher


def preconditioned(fisher: Fisher) -> dict[str, torch.Tensor]:
    """What everybody uses a Fisher for."""
    fisher.finalize(0.001)
    return fisher.precondition({name: torch.ones(shape) for name, shape in fisher.parameter_shapes.items()})


def check_fisher(path: Path, kind: str) -> None:
    """As it was, or a sentence that names the file, or where its numbers are at fault, the layer."""
    refused: InputError | None = None
    found: dict[str, torch.Tensor] = {}
    try:
        fisher = load_fisher(path)
        found = preconditioned(fisher)
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(str(refused), path.name, "layer a", "layer b", "no sample")
        return
    wanted = preconditioned(made(kind))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=f"{name} is another than it was")
    assert fisher.weights.keys() == made(kind).weights.keys()
    assert fisher.provenance == {"steps": [0, 1]}


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda about: {**about, name: value}


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda about: {key: value for key, value in about.items() if key != name}


def first_layer(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda about: {**about, "layers": [{**about["layers"][0], **changed}, *about["layers"][1:]]}


ABOUT: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"without {name}": without(name)
        for name in ("format", "kind", "count", "targets", "layers", "provenance", "copies")
    },
    "a list": lambda about: [about],
    "null": lambda _: None,
    "a number": lambda _: 7,
    **{f"format {value!r}": put("format", value) for value in ("1", 2, None, [1])},
    **{f"kind {value!r}": put("kind", value) for value in (None, 5, ["diagonal"], {}, "kfac", "identity", "\x1b[31m")},
    **{
        f"count {value!r}": put("count", value)
        for value in (-5, 0, "5", "x", 2.5, None, [5], float("nan"), float("inf"), 10**400, {}, True)
    },
    **{f"targets {value!r}": put("targets", value) for value in ("neither", None, 5, ["data"])},
    **{f"layers {value!r}": put("layers", value) for value in ([], None, {}, "a", [1], [None], [[]])},
    **{f"provenance {value!r}": put("provenance", value) for value in (None, 5, [1], "x")},
    **{f"copies {value!r}": put("copies", value) for value in (None, 5, {"x": "y"}, {"fisher/a.weight": 1}, [1])},
    "a copy of itself": put("copies", {"fisher/a.weight": "fisher/a.weight"}),
    "copies in a ring": put("copies", {"fisher/c": "fisher/d", "fisher/d": "fisher/c"}),
    "one layer gone": lambda about: {**about, "layers": about["layers"][1:]},
    "one layer twice": lambda about: {**about, "layers": [*about["layers"], about["layers"][0]]},
    "layers swapped names": lambda about: {
        **about,
        "layers": [{**layer, "name": "ba"[n]} for n, layer in enumerate(about["layers"])],
    },
    "name of another": first_layer(name="c"),
    "name no text": first_layer(name=5),
    "shape of text": first_layer(weight_shape="23"),
    "shape of others": first_layer(weight_shape=[3, 2]),
    "shape negative": first_layer(weight_shape=[-2, -3]),
    "shape huge": first_layer(weight_shape=[10**9, 10**9]),
    "shape of four": first_layer(weight_shape=[2, 3, 1, 1]),
    "shape null": first_layer(weight_shape=None),
    "bias no": first_layer(has_bias="no"),
    "bias gone": first_layer(has_bias=False),
    "no shape": lambda about: {**about, "layers": [{"name": "a"}, about["layers"][1]]},
    "stage of nothing": put("stage", "neither"),
}


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
@pytest.mark.parametrize("way", ABOUT)
def test_fisher_that_says_something_else_of_itself(tmp_path: Path, kind: str, way: str) -> None:
    path = tmp_path / "fisher.safetensors"
    made(kind).save(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lightning_unlearn"])
    changed = ABOUT[way](about)
    safetensors.torch.save_file(tensors, path, {"lightning_unlearn": json.dumps(changed)})
    harmless = ("without targets", "without copies", "stage of nothing")
    if way in harmless and changed == about:
        return
    check_fisher(path, kind)


@pytest.mark.parametrize("text", ["", "{", DEEP, "\x00", "NaN", '{"format": 1, "format": 2}', "é" * 10])
def test_fisher_whose_metadata_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fisher.safetensors"
    made("diagonal").save(path)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"lightning_unlearn": text})
    check_fisher(path, "diagonal")


def of_name(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: change(t).contiguous() if part in name else t for name, t in tensors.items()}


def dropped(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


TENSORS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda _: {},
    "no Fisher": dropped("fisher/"),
    "no layer a": dropped("a"),
    "half the weights": dropped("weights/a"),
    "one more": lambda tensors: {**tensors, "fisher/c.weight": torch.ones(2)},
    "one more of others": lambda tensors: {**tensors, "strange": torch.ones(2)},
    "turned": of_name("fisher/", lambda t: t.mT if t.ndim == 2 else t),
    "flat": of_name("fisher/", torch.flatten),
    "of four": of_name("fisher/", lambda t: t[None, None]),
    "whole numbers": of_name("fisher/", lambda t: t.to(torch.int64)),
    "true and false": of_name("fisher/", lambda t: t.bool()),
    "complex": of_name("fisher/", lambda t: t.to(torch.complex64)),
    "not a number": of_name("fisher/", lambda t: torch.full_like(t, float("nan"))),
    "one not a number": of_name(
        "fisher/", lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 0, torch.nan, t)
    ),
    "infinite": of_name("fisher/", lambda t: torch.full_like(t, float("inf"))),
    "negative": of_name("fisher/", lambda t: -t.abs() - 1),
    "weights of other shapes": of_name("weights/", lambda t: t[:1]),
    "weights not a number": of_name("weights/", lambda t: t * float("nan")),
    "empty": of_name("fisher/", lambda t: t[:0]),
}


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
@pytest.mark.parametrize("way", TENSORS)
def test_fisher_with_other_tensors(tmp_path: Path, kind: str, way: str) -> None:
    """Sums of squares are neither negative nor infinite, and have the shapes that the file says."""
    path = tmp_path / "fisher.safetensors"
    made(kind).save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = {**json.loads(metadata["lightning_unlearn"]), "copies": {}}
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    fisher = made(kind)
    tensors |= {f"fisher/{name}": tensor.clone().contiguous() for name, tensor in fisher.tensors().items()}
    tensors |= {f"weights/{name}": tensor.clone() for name, tensor in fisher.weights.items()}
    safetensors.torch.save_file(TENSORS[way](tensors), path, {"lightning_unlearn": json.dumps(about)})
    if way in ("one more of others", "weights not a number"):  # its weights are compared where it is used
        return
    check_fisher(path, kind)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 0.3, 0.6, 0.9, 0.999])
def test_fisher_that_is_cut_off(tmp_path: Path, kind: str, cut: float) -> None:
    path = tmp_path / "fisher.safetensors"
    made(kind).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut if cut >= 1 or cut == 0 else cut * len(content))])
    check_fisher(path, kind)


FOREIGN: dict[str, bytes] = {
    "text": b"not a file of ours\n",
    "a header of 2^63": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a header of 2 GB": (2**31).to_bytes(8, "little") + b"{}",
    "a deep header": len(DEEP).to_bytes(8, "little") + DEEP.encode(),
    "overlapping tensors": b"",
    "a pickle": b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "parquet": b"PAR1" + bytes(100) + b"PAR1",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("way", FOREIGN)
def test_fisher_that_is_another_file(tmp_path: Path, way: str) -> None:
    path = tmp_path / "fisher.safetensors"
    content = FOREIGN[way]
    if way == "overlapping tensors":
        text = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("fisher/a", "fisher/b")})
        content = len(text).to_bytes(8, "little") + text.encode() + bytes(8)
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_fisher(path)
    said_well(str(error.value), path.name)


@pytest.mark.parametrize("name", ["folder", "nowhere/fisher.safetensors", "a\x1b[31mb.safetensors"])
def test_fisher_where_there_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as error:
        load_fisher(tmp_path / name)
    said_well(str(error.value))


# --------------------------------------------------------------------------------------------- tables and run.json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a finished run, and the YAML file that it was made with beside it."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "toy.yaml")
    run("attribute", "--config", config, "--output", folder / "run", "--trainer.enable_progress_bar", "false")
    return folder / "run"


@pytest.fixture
def altered(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def check_table(folder: Path, whole: Path, *, partial: bool = False) -> None:
    """As it was, or a sentence that names the folder; with ``partial``, rows may be missing, but none is changed."""
    refused: InputError | None = None
    found: ScoreTable | None = None
    try:
        found = read_scores(folder, partial=partial)
    except InputError as error:
        refused = error
    if refused is not None:
        said_well(str(refused), str(folder), "shard-00000")
        return
    assert found is not None
    wanted = read_scores(whole)
    rows = [wanted.keys.index(key) for key in found.keys]
    assert partial or found.keys == wanted.keys, "a table with other rows"
    assert sorted(found.queries) == wanted.queries, "a table with other queries"
    columns = [wanted.queries.index(query) for query in found.queries]
    assert np.array_equal(found.scores, wanted.scores[rows][:, columns])
    assert np.array_equal(found.base_losses, wanted.base_losses[rows])
    assert found.shards == [wanted.shards[row] for row in rows]
    assert found.scores.dtype == np.float32
    assert found.errors is not None
    assert wanted.errors is not None
    assert np.array_equal(found.errors, wanted.errors[rows][:, columns])


def a_file(folder: Path) -> Path:
    return sorted((folder / "scores").glob("*.parquet"))[1]


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table], *, all_files: bool = False) -> None:
    """Change a shard's table, or all of them, and keep what the file says of itself."""
    for path in sorted((folder / "scores").glob("*.parquet")) if all_files else [a_file(folder)]:
        table = pq.read_table(path)
        changed = change(table)
        if not changed.schema.metadata:
            changed = changed.replace_schema_metadata(table.schema.metadata)
        pq.write_table(changed, path)


def column(name: str, values: Callable[[pa.Table], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, values(table))


SCORE, OTHER, ERROR = "score:query-00000", "score:query-00001", "error:query-00000"
TABLES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "the last row gone": lambda t: t.slice(0, len(t) - 1),
    "the first row gone": lambda t: t.slice(1),
    "all rows gone": lambda t: t.slice(0, 0),
    "rows twice": lambda t: pa.concat_tables([t, t]),
    "one row twice, one gone": lambda t: pa.concat_tables([t.slice(0, len(t) - 1), t.slice(0, 1)]),
    "rows in another order": lambda t: t.take(list(range(len(t)))[::-1]),
    "columns in another order": lambda t: t.select(t.column_names[::-1]),
    "a query gone": lambda t: t.drop_columns([OTHER, OTHER.replace("score", "error")]),
    "a query's scores gone": lambda t: t.drop_columns([OTHER]),
    "a query's errors gone": lambda t: t.drop_columns([ERROR]),
    "a query more": lambda t: t.append_column("score:strange", t.column(SCORE)),
    "a query twice": lambda t: t.append_column(SCORE, t.column(OTHER)),
    "a query of another name": lambda t: t.rename_columns([n.replace("00001", "00009") for n in t.column_names]),
    "a column more": lambda t: t.append_column("strange", t.column(SCORE)),
    "no keys": lambda t: t.drop_columns(["key"]),
    "no shards": lambda t: t.drop_columns(["shard"]),
    "no base losses": lambda t: t.drop_columns(["base_loss"]),
    "keys of numbers": column("key", lambda t: pa.array(range(len(t)))),
    "keys of bytes": column("key", lambda t: t.column("key").cast(pa.binary())),
    "keys of nothing": column("key", lambda t: pa.nulls(len(t), pa.string())),
    "one key of nothing": column("key", lambda t: pa.array([None, *t.column("key").to_pylist()[1:]])),
    "keys in a dictionary": column("key", lambda t: t.column("key").combine_chunks().dictionary_encode()),
    "large keys": column("key", lambda t: t.column("key").cast(pa.large_string())),
    "scores of text": column(SCORE, lambda t: t.column(SCORE).cast(pa.string())),
    "scores of whole numbers": column(SCORE, lambda t: pa.array(range(len(t)))),
    "scores of doubles": column(SCORE, lambda t: t.column(SCORE).cast(pa.float64())),
    "scores of nothing": column(SCORE, lambda t: pa.nulls(len(t), pa.float32())),
    "one score of nothing": column(SCORE, lambda t: pa.array([None, *t.column(SCORE).to_pylist()[1:]], pa.float32())),
    "scores of lists": column(SCORE, lambda t: pa.array([[x] for x in t.column(SCORE).to_pylist()])),
    "base losses of text": column("base_loss", lambda t: pa.array(["x"] * len(t))),
    "one base loss of nothing": column("base_loss", lambda t: pa.array([None] + [1.0] * (len(t) - 1), pa.float32())),
    "errors of text": column(ERROR, lambda t: pa.array(["x"] * len(t))),
    "shards of another": column("shard", lambda t: pa.array(["strange"] * len(t))),
    "shards of numbers": column("shard", lambda t: pa.array(range(len(t)))),
    "finished, in no race": lambda t: t.append_column("finished", pa.array([True] * len(t))),
    "finished of text": lambda t: t.append_column("finished", pa.array(["yes"] * len(t))),
    "of another run": lambda t: t.replace_schema_metadata({**t.schema.metadata, b"run": b"0" * 32}),
    "of another content": lambda t: t.replace_schema_metadata({**t.schema.metadata, b"content": b"0"}),
    "of content that is no text": lambda t: t.replace_schema_metadata({**t.schema.metadata, b"content": b"\xff\xfe"}),
    "of no run": lambda t: t.replace_schema_metadata({b"content": t.schema.metadata[b"content"]}),
    "of no content": lambda t: t.replace_schema_metadata({b"run": t.schema.metadata[b"run"]}),
}


@pytest.mark.parametrize("all_files", [False, True], ids=["one file", "all files"])
@pytest.mark.parametrize("way", TABLES)
def test_table_that_was_altered(altered: Path, whole: Path, way: str, all_files: bool) -> None:
    """No row, query or type but what the run says; also when all files were altered alike."""
    rewritten(altered, TABLES[way], all_files=all_files)
    if way == "a query more" and all_files:
        with pytest.raises(InputError, match="strange"):
            read_scores(altered)
        return
    check_table(altered, whole)
    if way not in ("the last row gone", "the first row gone", "all rows gone"):
        check_table(altered, whole, partial=True)


FILES: dict[str, Callable[[Path, bytes], Any]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "text": lambda path, _: path.write_bytes(b"scores\n" * 100),
    "half": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "without its last byte": lambda path, content: path.write_bytes(content[:-1]),
    "without its first byte": lambda path, content: path.write_bytes(content[1:]),
    "footer of zeros": lambda path, content: path.write_bytes(content[:-200] + bytes(192) + content[-8:]),
    "footer of 2 GB": lambda path, content: path.write_bytes(
        content[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    ),
    "pages of zeros": lambda path, content: path.write_bytes(content[:4] + bytes(300) + content[304:]),
    "pages of ones": lambda path, content: path.write_bytes(content[:40] + b"\xff" * 200 + content[240:]),
    "gone": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "a broken link": lambda path, _: (path.unlink(), path.symlink_to("nowhere")),
    "another's": lambda path, _: path.write_bytes(sorted(path.parent.glob("*.parquet"))[0].read_bytes()),
    "one more": lambda path, content: (path.parent / "strange.parquet").write_bytes(content),
    "one more that is none": lambda path, _: (path.parent / "strange.parquet").write_bytes(b"x"),
}


@pytest.mark.parametrize("way", FILES)
def test_file_of_scores_that_was_damaged(altered: Path, whole: Path, way: str) -> None:
    path = a_file(altered)
    FILES[way](path, path.read_bytes())
    check_table(altered, whole)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(change(json.loads(content))).encode()


def shard(**changed: Any) -> Callable[[bytes], bytes]:
    """Change what ``run.json`` says of its second shard."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        name = sorted(record["shards"])[1]
        kept = {key: value for key, value in {**record["shards"][name], **changed}.items() if value != "gone"}
        return {**record, "shards": {**record["shards"], name: kept}}

    return edited(change)


def shards(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    return edited(lambda record: {**record, "shards": change(record["shards"])})


RECORDS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "without its last brace": lambda content: content[:-1],
    "no text": lambda content: content.replace(b"query-00000", b"query-\xff\xfe"),
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "deep": lambda _: DEEP.encode(),
    "deep within": lambda content: content[:-1] + b', "x": ' + DEEP.encode() + b"}",
    "a list": lambda content: b"[" + content + b"]",
    "null": lambda _: b"null",
    "a number": lambda _: b"5",
    "a long number": lambda content: content[:-1] + b', "x": ' + b"9" * 10_000 + b"}",
    "nothing in it": lambda _: b"{}",
    **{
        f"without {name}": edited(lambda record, name=name: {k: v for k, v in record.items() if k != name})
        for name in ("fingerprints", "shards", "targets")
    },
    **{
        f"{name} {value!r}": edited(lambda record, name=name, value=value: {**record, name: value})
        for name in ("fingerprints", "shards", "targets")
        for value in (None, 5, "x", [1], [], {})
    },
    "a fingerprint gone": edited(
        lambda record: {**record, "fingerprints": {k: v for k, v in record["fingerprints"].items() if k != "views"}}
    ),
    "a fingerprint of numbers": edited(
        lambda record: {**record, "fingerprints": {**record["fingerprints"], "views": 5}}
    ),
    "a fingerprint of lists": edited(
        lambda record: {**record, "fingerprints": {**record["fingerprints"], "views": [DEEP[:10]]}}
    ),
    "a target gone": edited(
        lambda record: {**record, "targets": {k: v for k, v in record["targets"].items() if not k.endswith("1")}}
    ),
    "a target more": edited(lambda record: {**record, "targets": {**record["targets"], "strange": {}}}),
    "a shard gone": shards(lambda s: {k: v for k, v in s.items() if k != sorted(s)[1]}),
    "a shard more": shards(lambda s: {**s, "strange": next(iter(s.values()))}),
    "a shard of a path": shards(lambda s: {**s, "../../x": next(iter(s.values()))}),
    "shards as a list": shards(lambda s: list(s.values())),
    "shards of names": shards(lambda s: dict.fromkeys(s, "x")),
    "shards of nothing": shards(lambda s: dict.fromkeys(s)),
    "one sample fewer": shard(samples=4),
    "one sample more": shard(samples=6),
    "samples of text": shard(samples="5"),
    "samples negative": shard(samples=-5),
    "samples of nothing": shard(samples=None),
    "version of another": shard(version="0"),
    "version of numbers": shard(version=5),
    "version gone": shard(version="gone"),
    "address of numbers": shard(url=5),
    "address gone": shard(url="gone"),
}


@pytest.mark.parametrize("way", RECORDS)
@pytest.mark.parametrize("partial", [False, True])
def test_record_that_was_altered(altered: Path, whole: Path, way: str, partial: bool) -> None:
    """What is refused names the folder; a shard that is gone from the record has scores that nobody may overlook."""
    path = altered / "run.json"
    path.write_bytes(RECORDS[way](path.read_bytes()))
    check_table(altered, whole, partial=partial and way not in ("a shard gone",))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff", b"{}", b'{"error": 5}', DEEP.encode()])
def test_note_of_a_failed_shard_that_was_altered(altered: Path, whole: Path, content: bytes) -> None:
    path = a_file(altered)
    (altered / "failed").mkdir()
    (altered / "failed" / f"{path.stem}.json").write_bytes(content)
    path.unlink()
    check_table(altered, whole)


# -------------------------------------------------------------------------------------------------------- deltas


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def about(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    def change(checkpoint: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in {**checkpoint[CHECKPOINT_KEY], **changed}.items() if v != "gone"}
        return {**checkpoint, CHECKPOINT_KEY: kept}

    return change


def state(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, Any]], Any]:
    def changed(checkpoint: dict[str, Any]) -> dict[str, Any]:
        new = {name: change(name, value) for name, value in checkpoint["state_dict"].items()}
        return {**checkpoint, "state_dict": {name: value for name, value in new.items() if value is not None}}

    return changed


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda c: [c],
    "a tensor": lambda c: torch.ones(3),
    "nothing": lambda c: None,
    "no deltas": lambda c: {k: v for k, v in c.items() if k != CHECKPOINT_KEY},
    "deltas null": lambda c: {**c, CHECKPOINT_KEY: None},
    "deltas a list": lambda c: {**c, CHECKPOINT_KEY: [1]},
    "fingerprints gone": about(fingerprints="gone"),
    "fingerprints null": about(fingerprints=None),
    "fingerprints of a list": about(fingerprints=["a"]),
    "a fingerprint gone": lambda c: about(fingerprints={"weights": c[CHECKPOINT_KEY]["fingerprints"]["weights"]})(c),
    "targets gone": about(targets="gone"),
    "targets null": about(targets=None),
    "targets of numbers": about(targets=[1, 2]),
    "targets swapped": lambda c: about(targets=c[CHECKPOINT_KEY]["targets"][::-1])(c),
    "a target fewer": lambda c: about(targets=c[CHECKPOINT_KEY]["targets"][:1])(c),
    "results gone": about(results="gone"),
    "results null": about(results=None),
    "results of numbers": about(results={"query-00000": 5}),
    "settings gone": about(settings="gone"),
    "settings null": about(settings=None),
    "members of numbers": about(members={"query-00000": 5}),
    "no state": lambda c: {k: v for k, v in c.items() if k != "state_dict"},
    "an empty state": lambda c: {**c, "state_dict": {}},
    "state of numbers": lambda c: {**c, "state_dict": dict.fromkeys(c["state_dict"], 5)},
    "state null": lambda c: {**c, "state_dict": None},
    "deltas of another shape": state(lambda _, v: v[..., :1]),
    "deltas not a number": state(lambda _, v: v * float("nan")),
    "deltas of other numbers": state(lambda _, v: 2 * v),
    "deltas of whole numbers": state(lambda _, v: v.to(torch.int64)),
    "no version": lambda c: {k: v for k, v in c.items() if k != "pytorch-lightning_version"},
    "version of numbers": lambda c: {**c, "pytorch-lightning_version": 5},
    "version of text": lambda c: {**c, "pytorch-lightning_version": "x.y"},
    "no loops": lambda c: {k: v for k, v in c.items() if k != "loops"},
    "loops null": lambda c: {**c, "loops": None},
}
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("deltas"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its end": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "a flipped bit": lambda path: path.write_bytes(
        bytes(b ^ (4 if n == path.stat().st_size // 3 else 0) for n, b in enumerate(path.read_bytes()))
    ),
    "a pickle": lambda path: torch.save({CHECKPOINT_KEY: Touches()}, path),
    "an old pickle": lambda path: torch.save({CHECKPOINT_KEY: Touches()}, path, _use_new_zipfile_serialization=False),
    "a zip of zeros": lambda path: zipped(path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def zipped(path: Path) -> None:
    """A small file that unpacks to a lot."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as member:
        for _ in range(64):
            member.write(bytes(2**22))


@pytest.mark.parametrize("way", [*CHECKPOINTS, *DAMAGE])
def test_deltas_that_were_altered(
    altered: Path, whole: Path, way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running again says in one sentence what is wrong, or gives the table as it was."""
    monkeypatch.chdir(altered.parent)
    path = altered / "deltas.ckpt"
    if way in CHECKPOINTS:
        torch.save(CHECKPOINTS[way](loaded(path)), path)
    else:
        DAMAGE[way](path)
    shutil.rmtree(altered / "scores")
    capsys.readouterr()
    config = str(whole.parent / "toy.yaml")
    options = ["--method", "unlearning", "--trainer.enable_progress_bar", "false"]
    status = main(["attribute", "--config", config, "--output", str(altered), *options])
    said = capsys.readouterr()
    text = said.err + said.out
    assert "Traceback" not in text
    assert not (altered.parent / "was-run").exists(), "it ran"
    if status != 0:
        assert "deltas" in text or "run" in text or "checkpoint" in text
        last = [line for line in text.splitlines() if line.strip()][-1]
        said_well(last, "deltas", "checkpoint", str(altered))
        return
    check_table(altered, whole)
