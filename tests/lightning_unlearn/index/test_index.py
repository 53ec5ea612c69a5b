"""An index on disk: what it keeps is its samples' own, whatever runs made it; and what is wrong with it is said."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_baselines as slow
import torch
from attribution_runs import ragged_fields
from index_toys import SAMPLES, SAMPLES_PER_SHARD, make_index, toy_index_data, toy_index_module
from processes import Script, run_ranks
from torch import Tensor

from lightning_unlearn import Index, InputError
from lightning_unlearn.baselines import Subject
from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.baselines.gradients import query_gradients_of, training_gradients
from lightning_unlearn.baselines.sample_gradients import join
from lightning_unlearn.command_line.index_answers import IndexAnswerer
from lightning_unlearn.data.files import json_with_digest
from lightning_unlearn.data.shards import npy_bytes, write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.draws.views import Views
from lightning_unlearn.index.kernel_file import KERNELS
from lightning_unlearn.index.record import INDEX_FILE
from lightning_unlearn.index.rows import widened
from lightning_unlearn.unlearning.module import UnlearningModule

SCRIPT = Path(__file__).parents[2] / "helpers" / "index_toys.py"
SHARDS = -(-SAMPLES // SAMPLES_PER_SHARD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With shards and queries."""
    made = tmp_path_factory.mktemp("index-toys")
    toy_index_data(made)
    return made


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """An index of all samples, made in one go."""
    make_index(toy_index_module(), toy_index_data(folder), folder / "made")
    Index.open(folder / "made")
    return folder / "made"


def copy(made: Path, to: Path) -> Path:
    for path in made.rglob("*"):
        if path.is_file() and path.name != KERNELS:
            (to / path.relative_to(made)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(made)).write_bytes(path.read_bytes())
    return to


def vectors(index: Index, output: str) -> dict[str, Tensor]:
    """Key to kept vector."""
    rows = [widened(halves, exponents) for file in index.files for _, halves, exponents in file.chunks(output)]
    return dict(zip(index.keys, torch.cat(rows), strict=True))


def assert_same(found: Path, expected: Path, *, bits: bool = True) -> None:
    """Whether two indexes keep the same, each sample once."""
    ours, theirs = Index.open(found), Index.open(expected)
    assert sorted(ours.keys) == sorted(theirs.keys)
    for output in ("mean", "square"):
        one, other = vectors(ours, output), vectors(theirs, output)
        for key, values in one.items():
            if bits:
                assert torch.equal(values, other[key])
            else:  # a number that lies between two of float16 may go to either
                torch.testing.assert_close(values, other[key], rtol=2e-3, atol=1e-5 * float(other[key].abs().max()))


def answer_of(index: Index, module: UnlearningModule, data: AttributionDataModule) -> Any:
    data.setup("predict")
    return IndexAnswerer(module, index).answer(data.queries)


def test_it_answers_as_the_kernels_of_all_samples_say(made: Path, folder: Path) -> None:
    index, module, data = Index.open(made), toy_index_module(), toy_index_data(folder)
    answer = answer_of(index, module, data)
    assert answer.scores.dtype == torch.float32
    assert answer.scores.shape == (SAMPLES, 2)
    subject = Subject(
        module.loss,
        module.layers,
        module.views,
        data.queries,
        data.predict_dataloader,
        projection=IndexAnswerer(module, index).projection,
    )
    came = [key for batch in data.predict_dataloader() for key in batch.keys]
    rows = [came.index(key) for key in index.keys]
    mean, square = (join(list(training_gradients(subject, output))).rows(rows) for output in ("mean", "square"))  # type: ignore[arg-type]
    asked = query_gradients_of(subject, ["mean", "square"])
    expected = {
        "das": slow.das(mean.wide(), asked["mean"].wide(), mean.errors.tolist(), 1e-3, leverage=True, squared=True),
        "d_trak": slow.trak(square.wide(), asked["square"].wide(), 1e-2),
    }
    for name, values in expected.items():
        torch.testing.assert_close(answer.parts[name], values, rtol=0.02, atol=0.02 * float(values.abs().max()))
    torch.testing.assert_close(
        answer.scores.double(), combined(answer.parts, {"das": 1.0, "d_trak": 1.0}), atol=1e-5, rtol=0
    )
    assert [sure.words for sure in answer.sure]
    torch.testing.assert_close(index.losses, mean.losses)


def test_what_people_ask_for_is_kept_beside_the_numbers(made: Path) -> None:
    index = Index.open(made)
    fields = {fields["__key__"]: json.loads(fields["json"]) for fields in ragged_fields(range(SAMPLES))}
    assert sorted(index.keys) == sorted(fields)
    assert [list(captions) for captions in index.captions] == [fields[key]["captions"] for key in index.keys]
    assert set(index.field("artist")) == {None}
    assert len(index.shards) == SHARDS
    for row, key in enumerate(index.keys):
        assert key.encode() in Path(index.shard_of(row).url).read_bytes()
    with pytest.raises(IndexError):
        index.shard_of(SAMPLES)
    size = sum(path.stat().st_size for path in (made / "shards").iterdir()) / SAMPLES
    assert size <= 16_000


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_change_nothing(made: Path, folder: Path, tmp_path: Path, batch_size: int) -> None:
    make_index(toy_index_module(), toy_index_data(folder, batch_size=batch_size), tmp_path / "index")
    assert_same(tmp_path / "index", made, bits=False)


def test_cuts_and_order_of_shards_change_nothing(made: Path, folder: Path, tmp_path: Path) -> None:
    write_shards(ragged_fields(reversed(range(SAMPLES))), tmp_path / "train", samples_per_shard=5)
    data = AttributionDataModule(str(tmp_path / "train"), str(folder / "queries"), batch_size=1)
    make_index(toy_index_module(), data, tmp_path / "index")
    make_index(toy_index_module(), toy_index_data(folder, batch_size=1), tmp_path / "other")
    assert_same(tmp_path / "index", tmp_path / "other")


def test_rows_are_in_the_order_of_their_shard_whatever_batches_pictures_of_several_sizes_make(
    folder: Path, tmp_path: Path
) -> None:
    fields = ragged_fields(range(5))
    for one in fields[1::2]:
        for name in ("latent.npy", "latent_flip.npy"):
            one[name] = npy_bytes(np.load(io.BytesIO(one[name]))[..., :6].copy())
    write_shards(fields, tmp_path / "train", samples_per_shard=5)
    data = AttributionDataModule(str(tmp_path / "train"), str(folder / "queries"), batch_size=2)
    make_index(toy_index_module(), data, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert index.keys == [one["__key__"] for one in fields]
    assert [list(captions) for captions in index.captions] == [json.loads(one["json"])["captions"] for one in fields]
    one_by_one = AttributionDataModule(str(tmp_path / "train"), str(folder / "queries"), batch_size=1)
    make_index(toy_index_module(), one_by_one, tmp_path / "other")
    assert_same(tmp_path / "index", tmp_path / "other", bits=False)


def test_added_shards_give_what_making_it_anew_gives(made: Path, folder: Path, tmp_path: Path) -> None:
    first = sorted((folder / f"train-{SAMPLES}").glob("*.tar"))[:1]
    some = AttributionDataModule([str(path) for path in first], str(folder / "queries"), batch_size=3)
    make_index(toy_index_module(), some, tmp_path / "index")
    assert len(Index.open(tmp_path / "index")) == SAMPLES_PER_SHARD
    writer = make_index(toy_index_module(), toy_index_data(folder), tmp_path / "index")
    assert writer.kept == SAMPLES - SAMPLES_PER_SHARD
    assert_same(tmp_path / "index", made)
    ours = answer_of(Index.open(tmp_path / "index"), toy_index_module(), toy_index_data(folder))
    theirs = answer_of(Index.open(made), toy_index_module(), toy_index_data(folder))
    assert torch.equal(ours.scores, theirs.scores)


def test_two_processes_make_what_one_makes(made: Path, folder: Path, tmp_path: Path) -> None:
    job = {"folder": str(folder), "out": str(tmp_path / "index"), "trainer": {"strategy": "ddp", "devices": 2}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_ranks(str(SCRIPT), tmp_path / "job.json", processes=2)
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "index").glob("kept-*"))
    assert kept == [4, 7]
    assert_same(tmp_path / "index", made)


def test_a_killed_run_goes_on_with_the_shards_that_are_missing(made: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    job = {"folder": str(folder), "out": str(out), "stall": 1, "trainer": {}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    with Script(str(SCRIPT), tmp_path / "job.json") as script:
        deadline = time.monotonic() + 200
        while not (out / "stalled").exists():
            assert script.status is None, script.said()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        script.kill()
    with pytest.raises(InputError, match=f"2 of {SHARDS} shards are not in the index"):
        Index.open(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    make_index(toy_index_module(), toy_index_data(folder), out)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert_same(out, made)


def test_another_model_is_refused(made: Path, folder: Path) -> None:
    others = {
        "weights": toy_index_module(seed=1),
        "views": toy_index_module(views=Views(3, flips=True, noise="per_sample")),
        "parameters": toy_index_module(parameters=["text"]),
    }
    for name, module in others.items():
        with pytest.raises(InputError, match=f"of another model \\(other {name}\\)"):
            make_index(module, toy_index_data(folder), made)
        with pytest.raises(InputError, match=f"made with other {name} than this model's"):
            IndexAnswerer(module, Index.open(made))
    with pytest.raises(InputError, match=r"of another model \(other projection\)"):
        make_index(toy_index_module(), toy_index_data(folder), made, seed=1)


def test_settings_that_would_spoil_it_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave keys out"):
        make_index(toy_index_module(), toy_index_data(folder, keys=["sample-00001"]), tmp_path / "index")
    with pytest.raises(InputError, match="precision 32-true"):
        make_index(toy_index_module(), toy_index_data(folder), tmp_path / "index", precision="bf16-mixed")


def test_a_bad_sample_fails_its_shard_alone(folder: Path, tmp_path: Path) -> None:
    fields = ragged_fields(range(6))
    bad = torch.full((3, 8, 8), float("nan")).numpy()
    fields[1]["latent.npy"] = npy_bytes(bad)
    write_shards(fields, tmp_path / "train", samples_per_shard=3)
    data = AttributionDataModule(str(tmp_path / "train"), str(folder / "queries"), batch_size=1, on_bad_sample="error")
    with pytest.raises(InputError, match="could not be indexed, the others are kept"):
        make_index(toy_index_module(), data, tmp_path / "index")
    with pytest.raises(InputError, match=r"1 of 2 shards are not in the index.*run `lightning-unlearn index` again"):
        Index.open(tmp_path / "index")


def test_what_is_no_index_or_damaged_gets_a_sentence(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no index in"):
        Index.open(tmp_path / "nothing")
    altered = copy(made, tmp_path / "altered")
    path = next((altered / "shards").iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="was altered after it was written; remove it"):
        Index.open(altered)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"can't be read \(SafetensorError.*run `lightning-unlearn index` again"):
        Index.open(altered)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="can't be read"):
        Index.open(altered)
    record = copy(made, tmp_path / "record") / INDEX_FILE
    record.write_text(record.read_text().replace("mean", "maen", 1))
    with pytest.raises(InputError, match="was altered after it was written"):
        Index.open(record.parent)
    record.write_bytes(json_with_digest({"fingerprints": {}}))
    with pytest.raises(InputError, match="is not the record of an index"):
        Index.open(record.parent)


def test_an_altered_number_shows_once_the_kernels_are_kept_too(made: Path, tmp_path: Path) -> None:
    index = copy(made, tmp_path / "index")
    before = Index.open(index).kernels["mean"].rest
    path = next((index / "shards").iterdir())
    assert (index / KERNELS).is_file()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="was altered"):
        Index.open(index)
    # Kernels are derived: damaged or gone, they are made again.
    whole = copy(made, tmp_path / "whole")
    Index.open(whole)
    (whole / KERNELS).write_bytes(b"nonsense")
    assert torch.equal(Index.open(whole).kernels["mean"].rest, before)


def test_groups_have_means_and_intervals(made: Path, folder: Path, tmp_path: Path) -> None:
    fields = ragged_fields(range(6))
    for number, one in enumerate(fields):
        about = {**json.loads(one["json"]), **({"artist": "Klee" if number % 2 else "Marc"} if number < 5 else {})}
        one["json"] = json.dumps(about).encode()
    write_shards(fields, tmp_path / "train", samples_per_shard=4)
    data = AttributionDataModule(str(tmp_path / "train"), str(folder / "queries"), batch_size=3)
    make_index(toy_index_module(), data, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    scores = torch.arange(12.0).reshape(6, 2)
    rows = {
        name: [row for row, value in enumerate(index.field("artist")) if value == name] for name in ("Klee", "Marc")
    }
    groups = {group.name: group for group in index.groups("artist", scores)}
    assert {name: group.samples for name, group in groups.items()} == {"Klee": 2, "Marc": 3, None: 1}
    for name, of in rows.items():
        values = scores[of].double()
        torch.testing.assert_close(groups[name].mean, values.mean(0))
        torch.testing.assert_close(groups[name].total, values.sum(0))
        # Student's t: 12.706 of one degree of freedom, 4.303 of two.
        reach = {2: 12.706, 3: 4.303}[len(of)] * values.std(0) / len(of) ** 0.5
        torch.testing.assert_close(groups[name].high, values.mean(0) + reach, rtol=1e-3, atol=0)
    assert groups[None].low.isinf().all()
