from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from attribution_runs import SAMPLES, SAMPLES_PER_SHARD, ragged_fields, score, toy_data, trainer
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, done_shards, toy_shards

import lightning_unlearn.scores.shard_file
from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.data.shards import MANIFEST, npy_bytes, shard_id, write_shards
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import FAILED, RUN_FILE, SCORES, read_deviations, read_run, read_scores, run_digest
from lightning_unlearn.scores.firmness import half_widths
from lightning_unlearn.scores.rules import Flips
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.deltas import DeltaStore
from lightning_unlearn.weights.parameters import layer_parameters

SHARDS = -(-SAMPLES // SAMPLES_PER_SHARD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(ragged_fields(), tmp_path / "train", samples_per_shard=SAMPLES_PER_SHARD)
    toy_shards(tmp_path / "queries", 2, 2, prefix="query")
    return tmp_path


class Overflowing(ToyObjective):
    """The toy network would bear any latent; a real one overflows."""

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        losses = super().__call__(network, batch, timesteps, noise)
        return losses.masked_fill(batch.latents.flatten(1).amax(1) > 1e20, torch.inf)


def module(views: Views | None = None, size: float = 0.01, objective: ToyObjective | None = None) -> UnlearningModule:
    found = UnlearningModule(
        ToyDenoiser(), objective or Overflowing(), parameters=[".*"], views=views or Views(3, noise="per_sample")
    )
    found.deltas = DeltaStore(layer_parameters(found.layers), ["query-00000", "query-00001"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for delta in found.deltas.parameters():
            delta.copy_(size * torch.randn(delta.shape, generator=generator))
    return found


def shard(folder: Path, number: int) -> Path:
    return folder / "train" / f"shard-{number:06d}.tar"


def parquet(folder: Path, number: int) -> Path:
    return folder / "out" / SCORES / f"{shard_id(str(shard(folder, number)))}.parquet"


def run(folder: Path, found: UnlearningModule | None = None, writer: Any = None, **data: Any) -> ScoreWriter:
    return score(found or module(), toy_data(folder, **data), folder / "out", None, writer=writer)


def repack(path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """Write a shard's files again after a change to them; its manifest goes, which has its old size."""
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    with tarfile.open(path, "w") as archive:
        for name, content in change(files).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (path.parent / MANIFEST).unlink(missing_ok=True)


def spoiled(key: str, value: float) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    latent = npy_bytes(torch.full(LATENT, value).numpy())
    return lambda files: {**files, f"{key}.latent.npy": latent}


# ---------------------------------------------------------------------------------- what is written


def test_each_sample_is_scored_once_in_one_file_a_shard(folder: Path) -> None:
    writer = run(folder)
    assert (writer.scored, writer.skipped, writer.failures) == (SAMPLES, 0, {})
    files = sorted((folder / "out" / SCORES).iterdir())
    assert files == sorted(parquet(folder, number) for number in range(SHARDS))
    table = read_scores(folder / "out")
    assert table.keys == sorted(fields["__key__"] for fields in ragged_fields())
    assert table.queries == ["query-00000", "query-00001"]
    frame = pandas.read_parquet(folder / "out" / SCORES).set_index("key").loc[table.keys]
    assert (frame[["score:query-00000", "score:query-00001"]].to_numpy() == table.scores).all()
    assert table.scores.std() > 0


def test_run_file_tells_how_the_scores_came_about(folder: Path) -> None:
    found = module()
    found.results = {"query-00000": {"rise": 0.1}}
    run(folder, found)
    about = read_run(folder / "out")
    assert about is not None
    assert about["rule"] == "ratio"
    assert about["views"] == found.views.settings()
    assert about["targets"]["query-00000"] == {"captions": ["caption 0 of 0"], "rise": 0.1}
    assert set(about["shards"]) == done_shards(folder / "out")
    sizes = {entry["url"]: (entry["samples"], entry["bytes"]) for entry in about["shards"].values()}
    assert sizes[str(shard(folder, 0))] == (SAMPLES_PER_SHARD, shard(folder, 0).stat().st_size)
    own = {"rule": "ratio", "flips": "max", "columns": "scores, errors", "precision": "32-true"}
    assert about["fingerprints"] == {**found.fingerprints(), **own}
    assert about["timesteps"] == found.views.draw_timesteps(ToyObjective.num_timesteps).tolist()
    assert about["versions"]["torch"]
    assert about["seconds"] > 0


def test_predictions_are_not_kept_in_memory_even_if_asked_for(folder: Path) -> None:
    found = trainer(folder, ScoreWriter(str(folder / "out")))
    assert not found.predict(module(), toy_data(folder), return_predictions=True)
    assert done_shards(folder / "out")


def test_shard_without_samples_is_done_and_adds_nothing(folder: Path) -> None:
    tarfile.open(folder / "train" / "empty.tar", "w").close()
    (folder / "train" / MANIFEST).unlink()
    assert run(folder).scored == SAMPLES
    assert len(done_shards(folder / "out")) == SHARDS + 1
    assert len(read_scores(folder / "out").keys) == SAMPLES
    assert run(folder).scored == 0


def test_another_module_or_rule_is_refused(folder: Path) -> None:
    class Other(LightningModule):
        def predict_step(self, batch: Any) -> None:
            return None

    with pytest.raises(InputError, match="UnlearningModule, not of a Other"):
        trainer(folder, ScoreWriter(str(folder / "out"))).predict(Other(), toy_data(folder))
    with pytest.raises(InputError, match="no score rule 'sum'"):
        ScoreWriter("out", rule="sum")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Flips can't be taken by 'sum'; choose one of max, mean"):
        ScoreWriter("out", flips="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(("rule", "flips"), [("difference", "max"), ("ratio", "mean")])
def test_kept_deviations_give_the_scores_and_their_errors(folder: Path, rule: Any, flips: Flips) -> None:
    found = module(Views(3, noises=2, flips=True))
    run(folder, found, {"rule": rule, "flips": flips, "keep_deviations": True})
    tarfile.open(folder / "train" / "empty.tar", "w").close()
    (folder / "train" / MANIFEST).unlink()
    run(folder, found, {"rule": rule, "flips": flips, "keep_deviations": True})
    table = read_scores(folder / "out")
    assert len(table.run["timesteps"]) == 6
    assert table.errors is not None
    for column, query in enumerate(table.queries):
        kept = read_deviations(folder / "out", query)
        assert kept.shape == (SAMPLES, 2, 6)
        sides = kept.astype(np.float64).mean(-1)
        scores = sides.max(-1) if flips == "max" else sides.mean(-1)
        np.testing.assert_allclose(table.scores[:, column], scores, rtol=1e-4, atol=1e-7)
        halves = half_widths(torch.from_numpy(kept)[None], 2, flips)
        assert halves is not None
        np.testing.assert_allclose(table.errors[:, column], halves[:, 0], rtol=1e-3, atol=1e-7)
        assert (table.errors[:, column] > 0).all()


def test_table_of_an_older_version_is_read_but_not_added_to(folder: Path) -> None:
    run(folder)
    about = json.loads((folder / "out" / RUN_FILE).read_bytes())
    for name in ("timesteps", "flips", "format", "digest"):
        del about[name]
    del about["fingerprints"]["flips"], about["fingerprints"]["columns"]
    (folder / "out" / RUN_FILE).write_text(json.dumps(about))
    for path in (folder / "out" / SCORES).iterdir():
        old = pq.read_table(path).select(["key", "shard", "base_loss", "score:query-00000", "score:query-00001"])
        metadata = {b"content": old.schema.metadata[b"content"], b"run": run_digest(about["fingerprints"])}
        pq.write_table(old.replace_schema_metadata(metadata), path)
    table = read_scores(folder / "out")
    assert table.errors is None
    assert len(table.keys) == SAMPLES
    with pytest.raises(InputError, match=r"another run \(other flips, columns\)"):
        run(folder)


def test_a_single_view_has_no_error_column(folder: Path) -> None:
    run(folder, module(Views(1)))
    table = read_scores(folder / "out")
    assert table.errors is None
    assert table.run["fingerprints"]["columns"] == "scores"


@pytest.fixture
def any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of any size are read, so that a loss can be infinite."""
    monkeypatch.setattr("lightning_unlearn.data.samples.LARGEST_LATENT", float("inf"))


@pytest.mark.usefixtures("any_number")
def test_samples_that_are_left_out_leave_no_row_in_any_column(folder: Path) -> None:
    whole = read_scores(run(folder, writer={"keep_deviations": True}).folder)
    shutil.rmtree(folder / "out")
    repack(shard(folder, 1), spoiled("sample-00008", 1e30))
    run(folder, writer={"keep_deviations": True, "on_bad_sample": "skip"})
    table = read_scores(folder / "out")
    kept = [whole.keys.index(key) for key in table.keys]
    assert len(kept) == SAMPLES - 1
    assert table.errors is not None
    assert whole.errors is not None
    np.testing.assert_allclose(table.errors, whole.errors[kept], rtol=1e-4)
    assert read_deviations(folder / "out", "query-00000").shape == (SAMPLES - 1, 1, 3)


# ---------------------------------------------------------------------------------- starting again


def test_restart_scores_only_what_is_missing_and_leaves_the_rest_as_it_is(folder: Path) -> None:
    run(folder)
    whole = read_scores(folder / "out")
    parquet(folder, 1).unlink()
    parquet(folder, 3).unlink()
    times = {path: path.stat().st_mtime_ns for path in (folder / "out" / SCORES).iterdir()}
    seconds = whole.run["seconds"]
    assert run(folder).scored == 2 * SAMPLES_PER_SHARD
    again = read_scores(folder / "out")
    assert (again.scores == whole.scores).all()
    assert again.keys == whole.keys
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert again.run["seconds"] > seconds
    assert run(folder).scored == 0


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"found": lambda: module(Views(4))}, "views"),
        ({"found": lambda: module(size=0.02)}, "deltas"),
        ({"writer": {"rule": "difference"}}, "rule"),
        ({"writer": {"flips": "mean"}}, "flips"),
        ({"writer": {"keep_deviations": True}}, "columns"),
    ],
)
def test_folder_of_another_run_is_refused_and_left_as_it_is(folder: Path, other: dict[str, Any], says: str) -> None:
    run(folder)
    parquet(folder, 0).unlink()
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"holds scores of another run \(other {says}\)"):
        run(folder, other["found"]() if "found" in other else None, other.get("writer"))
    assert before == {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}


def test_other_weights_of_the_network_are_another_run(folder: Path) -> None:
    run(folder)
    other = module()
    with torch.no_grad():
        other.network.get_parameter("conv_in.bias")[0] += 1e-6
    with pytest.raises(InputError, match="another run"):
        run(folder, other)


def test_shard_with_other_samples_of_the_same_size_is_scored_again(folder: Path) -> None:
    run(folder)
    before = read_scores(folder / "out")
    size = shard(folder, 1).stat().st_size
    fields = [*ragged_fields(range(SAMPLES))]
    for sample in fields[SAMPLES_PER_SHARD : 2 * SAMPLES_PER_SHARD]:
        latent = np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)
        sample["latent.npy"] = npy_bytes(-latent)
    write_shards(fields, folder / "train", samples_per_shard=SAMPLES_PER_SHARD)
    assert shard(folder, 1).stat().st_size == size
    assert run(folder).scored == SAMPLES_PER_SHARD
    assert not np.array_equal(read_scores(folder / "out").scores, before.scores)


def test_shard_that_is_left_out_later_is_waited_for_by_nobody(folder: Path) -> None:
    run(folder)
    (folder / "train" / MANIFEST).unlink()
    shard(folder, 0).unlink()
    run(folder)
    assert len(read_scores(folder / "out").keys) == SAMPLES - SAMPLES_PER_SHARD


def test_scores_in_another_precision_are_another_run(folder: Path) -> None:
    run(folder)
    with pytest.raises(InputError, match=r"another run .*precision"):
        trainer(folder, ScoreWriter(str(folder / "out")), precision="bf16-mixed").predict(module(), toy_data(folder))


def test_predict_without_deltas_leaves_no_record(folder: Path) -> None:
    found = module()
    found.deltas = None
    with pytest.raises(InputError, match="no deltas to score with"):
        trainer(folder, ScoreWriter(str(folder / "out"))).predict(found, toy_data(folder))
    assert read_run(folder / "out") is None


def test_shard_that_a_limit_cut_short_is_named(folder: Path) -> None:
    run_of = trainer(folder, ScoreWriter(str(folder / "out")), limit_predict_batches=1)
    with pytest.raises(InputError, match="not read to its end"):
        run_of.predict(module(), toy_data(folder))


def test_shard_that_was_replaced_by_one_of_another_size_is_scored_again(folder: Path) -> None:
    (folder / "train" / MANIFEST).unlink()
    run(folder)
    fields = ragged_fields(range(5)) + ragged_fields(range(90, 100))
    write_shards(fields, folder / "new", samples_per_shard=99)
    shutil.copy(folder / "new" / "shard-000000.tar", shard(folder, 0))
    assert run(folder).scored == 15
    assert "sample-00099" in read_scores(folder / "out").keys
    assert run(folder).scored == 0


# ---------------------------------------------------------------------------------- what goes wrong in the stream


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 7] = b"\xa5" * len(content[len(content) // 2 :: 7])
    path.write_bytes(content)


def repeat(path: Path, order: str) -> None:
    """Write a shard's samples, called by the last digit of their keys, in another order, some of them twice."""
    with tarfile.open(path) as source:
        members = [(member, source.extractfile(member).read()) for member in source]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as archive:
        for digit in order:
            for member, content in members:
                if member.name.startswith(f"sample-0000{digit}"):
                    archive.addfile(member, io.BytesIO(content))


def first_key_again_at_the_end(path: Path) -> None:
    repeat(path, "567895")


def key_twice_in_a_row(path: Path) -> None:
    repeat(path, "567789")


def drop_json_of_a_later_sample(path: Path) -> None:
    repack(path, lambda files: {name: content for name, content in files.items() if name != "sample-00008.json"})


def drop_captions_of_a_later_sample(path: Path) -> None:
    repack(path, lambda files: {**files, "sample-00008.json": b'{"captions": []}'})


def other_shape_later(path: Path) -> None:
    small = {f"sample-00008.{name}.npy": npy_bytes(torch.zeros(4, 4, 4).numpy()) for name in ("latent", "latent_flip")}
    repack(path, lambda files: {**files, **small})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut, "can't be read past its sample"),
        (scramble, "can't be read past its sample|is not a plain NumPy array|holds NaN"),
        (first_key_again_at_the_end, "the key 'sample-00005' twice"),
        (key_twice_in_a_row, r"can't be used \(sample-00007\.json: duplicate file name\)"),
        (drop_json_of_a_later_sample, "'sample-00008' .*lacks json"),
        (drop_captions_of_a_later_sample, "'sample-00008' .*has no captions"),
        (other_shape_later, r"'sample-00008' .*latent \(4, 4, 4\)"),
        (lambda path: repack(path, spoiled("sample-00008", 1e30)), r"'sample-00008' .*numbers as large as 1e\+30"),
        (lambda path: repack(path, spoiled("sample-00008", float("nan"))), "'sample-00008' .*holds NaN"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_shard_that_fails_fails_alone_and_a_restart_after_repair_completes_the_table(
    folder: Path, damage: Callable[[Path], None], says: str, batch_size: int
) -> None:
    (folder / "train" / MANIFEST).unlink()
    good = shard(folder, 1).read_bytes()
    damage(shard(folder, 1))
    with pytest.raises(InputError, match=f"1 shards could not be scored, the others are kept.*({says})"):
        run(folder, batch_size=batch_size)
    assert {path.stem for path in (folder / "out" / FAILED).iterdir()} == {parquet(folder, 1).stem}
    assert len(done_shards(folder / "out")) == SHARDS - 1
    with pytest.raises(InputError, match=f"1 of {SHARDS} shards are not scored yet, e.g. .*shard-000001.*({says})"):
        read_scores(folder / "out")
    assert len(read_scores(folder / "out", partial=True).keys) == SAMPLES - SAMPLES_PER_SHARD
    shard(folder, 1).write_bytes(good)
    assert run(folder, batch_size=batch_size).scored == SAMPLES_PER_SHARD
    assert len(read_scores(folder / "out").keys) == SAMPLES
    assert not list((folder / "out" / FAILED).iterdir())


@pytest.mark.parametrize("damage", [drop_json_of_a_later_sample, drop_captions_of_a_later_sample, other_shape_later])
def test_bad_sample_is_left_out_and_counted_if_asked_for(
    folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(shard(folder, 1))
    writer = run(folder, on_bad_sample="skip")
    assert (writer.scored, writer.skipped) == (SAMPLES - 1, 1)
    assert "sample-00008" not in read_scores(folder / "out").keys
    assert "1 bad samples were left out." in capsys.readouterr().out


def test_bad_first_sample_stops_before_any_work_or_is_left_out_if_asked_for(folder: Path) -> None:
    repack(shard(folder, 1), lambda files: {**files, "sample-00005.json": b"{}"})
    with pytest.raises(InputError, match=r"'sample-00005' .*has no captions"):
        run(folder)
    assert not (folder / "out").exists()
    writer = run(folder, on_bad_sample="skip")
    assert (writer.scored, writer.skipped) == (SAMPLES - 1, 1)


@pytest.mark.usefixtures("any_number")
def test_sample_with_an_infinite_loss_is_left_out_and_counted_if_asked_for(folder: Path) -> None:
    repack(shard(folder, 1), spoiled("sample-00008", 1e30))
    writer = run(folder, writer={"on_bad_sample": "skip"})
    assert (writer.scored, writer.skipped) == (SAMPLES - 1, 1)
    assert "sample-00008" not in read_scores(folder / "out").keys


class PartlyNaN(ToyObjective):
    """Some views of one sample are NaN: under all weights, or only under the targets'."""

    def __init__(self, latent: Tensor, base_too: bool) -> None:
        self.latent, self.base_too = latent, base_too
        self.reference = ToyDenoiser().conv_in.weight

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        losses = super().__call__(network, batch, timesteps, noise)
        hit = (batch.latents == self.latent).flatten(1).all(1) & (timesteps > 5)
        base = torch.equal(network.conv_in.weight, self.reference)  # type: ignore[arg-type]
        return losses.masked_fill(hit, torch.nan) if self.base_too or not base else losses


@pytest.mark.parametrize("rule", ["difference", "ratio"])
@pytest.mark.parametrize("base_too", [True, False])
def test_loss_that_is_nan_in_one_view_only_does_not_slip_through(folder: Path, rule: str, base_too: bool) -> None:
    latent = next(iter(toy_data_samples(folder, 8)))
    found = module(objective=PartlyNaN(latent, base_too))
    with pytest.raises(InputError, match=r"loss of sample 'sample-00008' .*is not finite"):
        run(folder, found, {"rule": rule})
    assert len(done_shards(folder / "out")) == SHARDS - 1
    writer = run(folder, found, {"rule": rule, "on_bad_sample": "skip"})
    assert (writer.scored, writer.skipped) == (SAMPLES_PER_SHARD - 1, 1)


def toy_data_samples(folder: Path, number: int) -> Iterator[Tensor]:
    data = toy_data(folder)
    data.setup("predict")
    for batch in data.predict_dataloader():
        for key, latent in zip(batch.keys, batch.latents, strict=True):
            if key == f"sample-{number:05d}":
                yield latent


def test_shard_without_flips_fails_alone_when_flips_are_scored(folder: Path) -> None:
    def without_flips(files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: content for name, content in files.items() if "flip" not in name}

    repack(shard(folder, 1), without_flips)
    for batch_size in (1, 4):
        with pytest.raises(InputError, match=r"1 shards could not be scored.*shard-000001.* holds no latent_flip.npy"):
            run(folder, module(Views(2, flips=True)), batch_size=batch_size)
        assert len(done_shards(folder / "out")) == SHARDS - 1


def test_key_in_two_shards_is_found_when_the_table_is_read(folder: Path) -> None:
    shutil.copy(shard(folder, 0), folder / "train" / "copy.tar")
    (folder / "train" / MANIFEST).unlink()
    run(folder)
    with pytest.raises(
        InputError, match=r"'sample-00000' stands in (copy-\w+ and in shard|shard-000000-\w+ and in copy)"
    ):
        read_scores(folder / "out")


# ---------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("room", [0, 2])
def test_full_disk_keeps_the_finished_shards_and_a_restart_completes_the_table(
    folder: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = lightning_unlearn.scores.shard_file.write_atomically, []

    def full(path: Path, content: bytes) -> None:
        if len(written) >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(lightning_unlearn.scores.shard_file, "write_atomically", full)
        # Notes and run.json find no room either, once the first of them could be written.
        rest = only_first(real)
        for place in ("scores.run_record", "callbacks.score_writer"):
            patch.setattr(f"lightning_unlearn.{place}.write_atomically", rest)
        with pytest.raises(
            InputError, match=f"{SHARDS - room} shards could not be .*No space left on device.*free the disk"
        ):
            run(folder)
    assert len(done_shards(folder / "out")) == room
    assert run(folder).scored == SAMPLES - room * SAMPLES_PER_SHARD
    assert len(read_scores(folder / "out").keys) == SAMPLES


def only_first(real: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
    written = []

    def write(path: Path, content: bytes) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        real(path, content)

    return write


def test_disk_that_is_full_from_the_start_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_unlearn.scores.run_record.write_atomically", full)
    with pytest.raises(InputError, match=r"can't be recorded in .*No space left on device"):
        run(folder)


def test_really_full_disk_keeps_the_finished_shards(folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(out)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.strip()}")
    try:
        with pytest.raises(
            InputError, match=r"shards could not be scored, the others are kept.*No space left on device"
        ):
            run(folder)
        done = done_shards(out)
        assert 0 < len(done) < SHARDS
        assert json.loads((out / RUN_FILE).read_bytes())["rule"] == "ratio"
        assert len(read_scores(out, partial=True).keys) == SAMPLES_PER_SHARD * len(done)
        assert not list(out.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        run(folder)
        assert len(read_scores(out).keys) == SAMPLES
    finally:
        subprocess.run(["umount", str(out)], check=True)
