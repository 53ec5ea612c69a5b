from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from attribution_runs import SAMPLES, SAMPLES_PER_SHARD, decoded, ragged_fields, toy_data
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import LATENT, toy_fields, toy_shards

from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.data.shards import MANIFEST, ShardInfo, npy_bytes, shard_id, write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_keys, read_samples
from lightning_unlearn.datamodules.scoring import ScoringStream
from lightning_unlearn.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(ragged_fields(), tmp_path / "train", samples_per_shard=SAMPLES_PER_SHARD)
    toy_shards(tmp_path / "queries", 3, 2, prefix="query")
    return tmp_path


def on_rank(data: AttributionDataModule, rank: int = 0, world_size: int = 1, epoch: int = 0) -> AttributionDataModule:
    data.trainer = cast(Any, SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=epoch))
    return data


def batches(data: AttributionDataModule) -> list[SampleBatch]:
    data.setup("predict")
    return list(data.predict_dataloader())


# ---------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("num_workers", [0, 2, 9])
def test_each_sample_comes_once_in_batches_that_do_not_straddle_shards(
    folder: Path, batch_size: int, num_workers: int
) -> None:
    found = batches(
        toy_data(folder, batch_size=batch_size, num_workers=num_workers, multiprocessing_context="fork")
    )  # 9 > shards
    assert sorted(key for batch in found for key in batch.keys) == [fields["__key__"] for fields in ragged_fields()]
    assert max(map(len, found)) == min(batch_size, SAMPLES_PER_SHARD)
    for shard in {batch.shard for batch in found}:
        own = [batch for batch in found if batch.shard == shard]
        assert [batch.end_of_shard for batch in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].end_of_shard == sum(map(len, own))
        assert all(batch.error is None for batch in own)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=12), world_size=st.integers(1, 6))
def test_every_shard_is_dealt_to_one_rank_and_ranks_get_as_many_give_or_take_one(
    sizes: list[int], world_size: int
) -> None:
    data = AttributionDataModule("shards", "queries")
    data.shards = [ShardInfo(f"{n}.tar", bytes=size) for n, size in enumerate(sizes)]
    dealt = [on_rank(data, rank, world_size).shards_to_score() for rank in range(world_size)]
    assert sorted(shard.url for part in dealt for shard in part) == sorted(shard.url for shard in data.shards)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_shards_are_dealt_before_those_done_are_dropped(folder: Path) -> None:
    # Dealt after dropping, a rank could get what another one is at.
    data = toy_data(folder)
    data.setup("predict")
    before = [on_rank(data, rank, 2).shards_to_score() for rank in range(2)]
    data.skip_shards(frozenset([shard_id(before[0][0].url)]))
    assert [on_rank(data, rank, 2).shards_to_score() for rank in range(2)] == [before[0][1:], before[1]]


def test_largest_shard_comes_first(folder: Path) -> None:
    data = toy_data(folder)
    data.setup("predict")
    sizes = [shard.bytes or 0 for shard in data.shards]
    assert sizes == sorted(sizes, reverse=True)


def test_rank_without_a_shard_has_nothing_to_do(folder: Path) -> None:
    data = on_rank(toy_data(folder, num_workers=2), 7, 8)
    assert data.shards_to_score() == []
    assert batches(data) == []


def test_shard_without_samples_says_that_it_is_whole(folder: Path) -> None:
    tarfile.open(folder / "train" / "empty.tar", "w").close()
    (folder / "train" / MANIFEST).unlink()
    found = [batch for batch in batches(toy_data(folder)) if batch.shard.startswith("empty")]
    assert [(len(batch), batch.end_of_shard) for batch in found] == [(0, 0)]


def test_shard_that_breaks_off_gives_an_error_and_the_others_go_on(folder: Path) -> None:
    (folder / "train" / MANIFEST).unlink()
    path = folder / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = batches(toy_data(folder))
    broken = [batch for batch in found if batch.shard.startswith("shard-000001")]
    assert "shard-000001.tar" in str(broken[-1].error)
    assert all(batch.end_of_shard is None for batch in broken)
    assert sum(batch.end_of_shard or 0 for batch in found) == SAMPLES - SAMPLES_PER_SHARD


def stream(shard: Path, query: Sample, **arguments: Any) -> list[SampleBatch]:
    return list(ScoringStream([ShardInfo(str(shard))], 4, query, **arguments))


def test_samples_that_cannot_be_used_are_left_out_and_counted_if_asked_for(tmp_path: Path) -> None:
    fields = [toy_fields(number) for number in range(7)]
    fields[0]["json"] = b"no json"
    fields[3]["latent.npy"] = npy_bytes(torch.zeros(4, 8, 8).numpy())
    fields[6]["text.npy"] = b""
    (shard,) = write_shards(fields, tmp_path)
    query = decoded(toy_fields(9))
    found = stream(Path(shard.url), query, skip_bad=True)
    assert [key for batch in found for key in batch.keys] == [f"sample-0000{n}" for n in (1, 2, 4, 5)]
    assert (found[-1].end_of_shard, found[-1].skipped) == (4, 3)
    (failed,) = stream(Path(shard.url), query)
    assert "'sample-00000'" in str(failed.error)


def test_shard_of_which_every_sample_is_left_out_is_whole(tmp_path: Path) -> None:
    fields = [{**toy_fields(number), "json": b"{}"} for number in range(3)]
    (shard,) = write_shards(fields, tmp_path)
    (found,) = stream(Path(shard.url), decoded(toy_fields(9)), skip_bad=True)
    assert (len(found), found.end_of_shard, found.skipped, found.error) == (0, 0, 3, None)


# ---------------------------------------------------------------------------------- draws


@pytest.mark.parametrize(("world_size", "draws", "draw_batch_size"), [(1, 10, 4), (3, 10, 4), (3, 100, 32), (4, 2, 8)])
def test_an_epoch_has_all_draws_of_all_queries_in_as_many_batches_on_every_rank(
    folder: Path, world_size: int, draws: int, draw_batch_size: int
) -> None:
    for epoch in range(2):
        drawn: list[tuple[int, int]] = []
        lengths = []
        for rank in range(world_size):
            data = toy_data(folder, draws=draws, draw_batch_size=draw_batch_size)
            data.setup("fit")
            loader = on_rank(data, rank, world_size, epoch).train_dataloader()
            found = list(loader)
            assert len(found) == len(loader)
            lengths.append([(batch.target, len(batch.numbers)) for batch in found])
            drawn += [
                (batch.target, number)
                for batch in found
                for number, weight in zip(batch.numbers, batch.weights.tolist(), strict=True)
                if weight
            ]
        assert all(length == lengths[0] for length in lengths)
        assert sorted(drawn) == list(itertools.product(range(3), range(epoch * draws, (epoch + 1) * draws)))


# ---------------------------------------------------------------------------------- queries


def test_queries_come_in_the_order_of_their_shards_or_as_asked_for(folder: Path) -> None:
    data = toy_data(folder)
    data.setup("fit")
    assert [query.key for query in data.queries] == ["query-00000", "query-00001", "query-00002"]
    data = toy_data(folder, query_keys=["query-00002", "query-00000"])
    data.setup("fit")
    assert [query.key for query in data.queries] == ["query-00002", "query-00000"]


def test_queries_keep_their_pictures_for_the_report(folder: Path) -> None:
    write_shards([{**toy_fields(0), "png": b"picture"}], folder / "queries")
    (folder / "queries" / "shard-000001.tar").unlink()
    data = toy_data(folder)
    data.setup("fit")
    assert [query.picture for query in data.queries] == [b"picture"]


def test_query_that_is_not_there_is_an_error_that_lists_some(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no query 'nobody' in .*query-00000, query-00001"):
        toy_data(folder, query_keys=["nobody"]).setup("fit")


def test_query_set_without_a_query_is_an_error(folder: Path) -> None:
    tarfile.open(folder / "empty.tar", "w").close()
    with pytest.raises(InputError, match=r"no query in .*empty\.tar"):
        AttributionDataModule(str(folder / "train"), str(folder / "empty.tar")).setup("fit")
    with pytest.raises(InputError, match="no query in"):
        toy_data(folder, query_keys=[]).setup("fit")


def test_query_key_that_stands_twice_is_an_error(folder: Path) -> None:
    patterns = [str(folder / "queries"), str(folder / "more")]
    toy_shards(folder / "more", 1, 1, prefix="query")
    with pytest.raises(InputError, match="query 'query-00000' stands twice"):
        AttributionDataModule(str(folder / "train"), patterns).setup("fit")


def test_queries_of_different_channels_are_an_error_and_of_different_sizes_none(folder: Path) -> None:
    fields = toy_fields(5, prefix="query")
    fields["latent.npy"] = npy_bytes(torch.zeros(4, 8, 8).numpy())
    write_shards([toy_fields(4, prefix="query"), fields], folder / "queries")
    with pytest.raises(InputError, match=r"'query-00005' in the queries .*'query-00004'.*channels"):
        toy_data(folder).setup("fit")
    fields["latent.npy"] = npy_bytes(torch.zeros(3, 4, 12).numpy())
    write_shards([toy_fields(4, prefix="query"), fields], folder / "queries")
    data = toy_data(folder)
    data.setup("fit")
    assert [tuple(query.latent.shape) for query in data.queries] == [LATENT, (3, 4, 12)]


# ---------------------------------------------------------------------------------- what is seen before any work


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_shard_whose_first_sample_has_another_shape_is_found_before_any_work(folder: Path, stage: str) -> None:
    fields = toy_fields(50)
    fields["text.npy"] = npy_bytes(torch.zeros(1, 4, 7).numpy())
    write_shards([fields], folder / "other")
    patterns = [str(folder / "train"), str(folder / "other")]
    with pytest.raises(InputError, match=r"'sample-00050' in .*other.* has latent .*\(4, 7\).* but 'query-00000'"):
        AttributionDataModule(patterns, str(folder / "queries")).setup(stage)


def test_shard_that_is_no_tar_file_is_found_before_any_work(folder: Path) -> None:
    (folder / "train" / MANIFEST).unlink()
    (folder / "train" / "shard-000002.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(InputError, match=r"shard-000002\.tar"):
        toy_data(folder).setup("fit")


def test_only_own_shards_that_are_not_done_are_looked_at_before_work(folder: Path) -> None:
    (folder / "train" / MANIFEST).unlink()
    data = toy_data(folder)
    data.setup("predict")
    last = data.shards[-1]
    Path(last.url).write_bytes(b"broken")
    with pytest.raises(InputError):
        data.setup("predict")
    data.skip_shards(frozenset([shard_id(last.url)]))
    data.setup("predict")
    assert sum(map(len, data.predict_dataloader())) > 0


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"draw_batch_size": 0}, {"batch_size": 0}, {"num_workers": -1}])
def test_numbers_out_of_range_are_refused(folder: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must"):
        toy_data(folder, **wrong)


def test_commands_are_refused_unless_asked_for(folder: Path) -> None:
    address = f"pipe:cat {folder}/train/shard-000000.tar"
    with pytest.raises(InputError, match="runs a command"):
        AttributionDataModule(address, str(folder / "queries")).setup("predict")
    data = AttributionDataModule(address, str(folder / "queries"), allow_pipe=True)
    assert sum(map(len, batches(data))) == SAMPLES_PER_SHARD


def test_shard_that_holds_code_instead_of_arrays_never_runs_it(folder: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "ran",))

    stream = io.BytesIO()
    stream.write(b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")
    fields = {**toy_fields(0), "latent.npy": stream.getvalue() + pickle.dumps(Evil())}
    write_shards([fields], folder / "evil")
    with pytest.raises(InputError, match="is not a plain NumPy array"):
        AttributionDataModule(str(folder / "evil"), str(folder / "queries")).setup("predict")
    assert not (folder / "ran").exists()


# ---------------------------------------------------------------------------------- keys and bad samples


def test_keys_of_which_no_shard_holds_any_are_found_before_any_work(folder: Path) -> None:
    with pytest.raises(InputError, match=r"holds any of the 2 chosen keys, e\.g\. 'nobody'"):
        toy_data(folder, keys=["nobody", "sample"]).setup("fit")
    toy_data(folder, keys=["nobody", "sample-00023"]).setup("fit")


def test_keys_from_a_windows_editor_are_the_same_and_other_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_bytes("\ufeffa\r\nb\r\n".encode())
    assert read_keys(str(tmp_path / "keys.txt")) == {"a", "b"}
    (tmp_path / "keys.txt").write_bytes("a\r\nb\r\n".encode("utf-16"))
    with pytest.raises(InputError, match="is not UTF-8"):
        read_keys(str(tmp_path / "keys.txt"))


@pytest.mark.parametrize("huge", [3e38, -1e9, float("nan")])
def test_a_huge_number_is_a_bad_sample_and_no_number_of_a_run(folder: Path, huge: float) -> None:
    latent = torch.zeros(3, 8, 8)
    latent[0, 0, 0] = huge
    fields = [toy_fields(n) for n in range(30, 34)]
    fields[2]["latent.npy"] = npy_bytes(latent.numpy())
    write_shards(fields, folder / "train")
    data = toy_data(folder, on_bad_sample="skip")
    data.setup("fit")
    keys = [sample.key for sample in data.real_samples("others", 0).take(0, 9)]
    assert set(keys) == {"sample-00030", "sample-00031", "sample-00033"}
    strict = toy_data(folder)
    strict.setup("fit")
    with pytest.raises(InputError, match=r"'sample-00032' in .*shard-000000\.tar"):
        strict.real_samples("others", 0).take(0, 9)


def test_a_bad_sample_is_not_decoded_for_the_report(folder: Path) -> None:
    fields = [toy_fields(0), {**toy_fields(1), "json": b"{}"}]
    (shard,) = write_shards(fields, folder / "bad")
    assert [sample.key for sample in read_samples(shard, keys=frozenset(["sample-00000"]))] == ["sample-00000"]
    with pytest.raises(InputError):
        list(read_samples(shard))


def test_a_rank_without_a_shard_and_without_queries_has_nothing_to_score(tmp_path: Path) -> None:
    write_shards([toy_fields(0)], tmp_path)
    data = on_rank(AttributionDataModule(str(tmp_path)), 1, 2)
    data.setup("predict")
    assert list(data.predict_dataloader()) == []
