"""A training with its own answers: what it logs, and that nothing of the training knows of it."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_toys import toy_folder
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from processes import run_ranks
from torch import nn
from toys import grey_png, tiny_unet, toy_fields

from lightning_unlearn import (
    AttributionDataModule,
    AttributionLogger,
    DenoisingObjective,
    DiffusionModule,
    FisherAccumulator,
    InputError,
    Newton,
    SampleLossLogger,
    TrainingDataModule,
    Views,
    load_fisher,
    read_scores,
)
from lightning_unlearn.baselines import DAS, Consensus
from lightning_unlearn.callbacks.aside import frozen_copy
from lightning_unlearn.data.samples import Sample, decode_sample
from lightning_unlearn.data.shards import write_shards

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

EPOCHS, TOP = 2, 3


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toys' folder, with pictures in its shards."""
    folder = tmp_path_factory.mktemp("pictured")
    fields = [{**toy_fields(number), "png": grey_png(np.full((12, 12), number / 24))} for number in range(24)]
    write_shards(fields, folder / "train", samples_per_shard=5)
    for name in ("queries", "network.pt"):
        (folder / name).symlink_to(toy_folder() / name)
    return folder


def data_of(folder: Path, *, queries: bool = True) -> AttributionDataModule:
    return AttributionDataModule(
        str(folder / "train"), str(folder / "queries") if queries else None, draws=4, draw_batch_size=4
    )


def asked(folder: Path, **settings: Any) -> AttributionLogger:
    # A size of step that no loss has to be searched for, on the keys and values of the text.
    chosen: dict[str, Any] = {"views": Views(2), "top": TOP, "strict": True, **settings}
    if "method" not in chosen:
        chosen.setdefault("strategy", Newton(alpha=2e-5, N=1))
    queries = chosen.get("prompts") is None
    fisher = chosen.pop("fisher", None) or FisherAccumulator("network", fisher="diagonal")
    return AttributionLogger(chosen.pop("data", None) or data_of(folder, queries=queries), fisher, **chosen)


def training(
    folder: Path, root: Path, *callbacks: Callback, loggers: Any = False, module: Any = None, **settings: Any
) -> tuple[Trainer, nn.Module]:
    """A training from one seed, and its network."""
    seed_everything(0, verbose=False)
    if module is None:
        network = tiny_unet()
        network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
        module = DiffusionModule(network, DenoisingObjective())
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "logger": loggers,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "log_every_n_steps": 1,
            "default_root_dir": str(root),
            **settings,
        },
        callbacks=list(callbacks),
    )
    trainer.fit(module, TrainingDataModule(str(folder / "train"), batch_size=8))
    return trainer, module.network


def left_behind(network: nn.Module) -> dict[str, Any]:
    """The weights, and where all random states stand."""
    return {
        "weights": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "warnings": list(warnings.filters),
    }


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    for name, tensor in one["weights"].items():
        assert torch.equal(tensor, other["weights"][name]), name
    assert one["random"] == other["random"]
    assert one["warnings"] == other["warnings"]


@pytest.fixture(scope="module")
def plain(pictured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training with the accumulator alone, or with nothing."""
    root = tmp_path_factory.mktemp("plain")
    logger = TensorBoardLogger(str(root), "tb")
    _, network = training(pictured, root, FisherAccumulator("network", fisher="diagonal"), loggers=[logger])
    return {"root": root, "log": Path(logger.log_dir), **left_behind(network)}


@pytest.fixture(scope="module")
def logged(pictured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training with both callbacks and all loggers, which answers after each epoch for queries made anew."""
    root = tmp_path_factory.mktemp("logged")
    os.environ["WANDB_SILENT"] = "true"
    tensorboard, table = TensorBoardLogger(str(root), "tb"), CSVLogger(str(root), "csv")
    online = WandbLogger(save_dir=str(root), offline=True)
    loggers = [tensorboard, table, online]
    callbacks = [asked(pictured, every_n_epochs=1, generate=2), SampleLossLogger(top=TOP)]
    _, network = training(pictured, root, *callbacks, loggers=loggers)
    found = {"root": root, "log": Path(tensorboard.log_dir), "csv": Path(table.log_dir), **left_behind(network)}
    online.experiment.finish()
    return found


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format after seven bytes of its own."""
    content, block = path.read_bytes(), 2**15
    at, parts = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # nothing begins so late in a block
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(root: Path) -> dict[str, list[Any]]:
    """What W&B's offline folder holds, by name."""
    from wandb.proto import wandb_internal_pb2

    (path,) = root.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, list[Any]] = {}
    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append(json.loads(item.value_json))
    return found


# ---------------------------------------------------------------------- the training


def test_no_bit_of_the_training_changes_nor_of_its_fisher(plain: dict[str, Any], logged: dict[str, Any]) -> None:
    assert_same(plain, logged)
    with_answers, without = (load_fisher(str(run["root"] / "fisher.safetensors")) for run in (logged, plain))
    assert with_answers.count == without.count
    assert all(torch.equal(tensor, with_answers.tensors()[name]) for name, tensor in without.tensors().items())


def test_losses_are_logged_as_without(plain: dict[str, Any], logged: dict[str, Any]) -> None:
    for name in ("train_loss", "epoch"):
        ours, theirs = ([(e.step, e.value) for e in events(run["log"]).Scalars(name)] for run in (logged, plain))
        assert ours == theirs
        assert ours


# ---------------------------------------------------------------------- what it logs


def test_folder_is_an_ordinary_run_with_the_queries_that_were_made(logged: dict[str, Any]) -> None:
    steps = sorted((logged["log"] / "attribution").iterdir())
    assert [step.name for step in steps] == ["step=3", "step=6"]
    tables = [read_scores(step) for step in steps]
    assert all(len(table.keys) == 24 for table in tables)
    # The network moved between the answers, and so did what it generates.
    assert not np.allclose(tables[0].scores, tables[1].scores)
    manifests = [(step / "queries" / "manifest.json").read_text() for step in steps]
    assert manifests[0] != manifests[1]
    rows = list(csv.DictReader(io.StringIO((steps[1] / "sources.csv").read_text())))
    for query in tables[1].queries:
        named = [(row["key"], float(row["score"])) for row in rows if row["query"] == query]
        assert named == tables[1].top(query, TOP)
    assert rows[0]["caption"].startswith("caption 0 of ")


def test_tensorboard_holds_pictures_and_numbers(logged: dict[str, Any]) -> None:
    from PIL import Image

    found = events(logged["log"])
    table = read_scores(logged["log"] / "attribution" / "step=6")
    for query in table.queries:
        tag = f"attribution/{query}"
        assert [event.step for event in found.Images(tag)] == [3, 6]
        sheet = Image.open(io.BytesIO(found.Images(tag)[1].encoded_image_string))
        assert sheet.size == ((160 + 12) * 4, 160 + 12 + 13)  # the query and three sources
        text = found.Tensors(f"{tag}/text_summary")[1].tensor_proto.string_val[0].decode()
        assert all(key in text for key, _ in table.top(query, TOP))
        numbers = {name: found.Scalars(f"{tag}/{name}")[1].value for name in ("top_score", "loss_before", "loss_after")}
        assert numbers["top_score"] == pytest.approx(table.top(query, 1)[0][1])
        assert numbers["loss_after"] > numbers["loss_before"] > 0
    assert [event.step for event in found.Images("sample_losses/worst")] == [6]


def test_wandb_holds_pictures_and_numbers(logged: dict[str, Any]) -> None:
    found = history(logged["root"])
    table = read_scores(logged["log"] / "attribution" / "step=6")
    (files,) = logged["root"].glob("wandb/offline-run-*/files")
    for query in table.queries:
        assert found[f"attribution/{query}/top_score"][1] == pytest.approx(table.top(query, 1)[0][1])
        pictures = {name: found[f"attribution/{query}/{name}"][1] for name in ("captions", "filenames")}
        # What is generated has a picture only where its latent is one.
        said = pictures["captions"][-TOP:]
        assert [caption.split(" · ")[1] for caption in said] == [key for key, _ in table.top(query, TOP)]
        assert all("caption 0 of" in caption for caption in said)
        assert len(pictures["filenames"]) == len(pictures["captions"]) >= TOP
        assert all((files / name).stat().st_size > 0 for name in pictures["filenames"])
    assert found["sample_losses/samples"] == [24]
    assert len(found["sample_losses/worst/filenames"][0]) == TOP
    rows = json.loads((files / found["attribution/sources/path"][1]).read_text())
    assert [tuple(row[:3]) for row in rows["data"]] == [
        (query, rank, key) for query in table.queries for rank, (key, _) in enumerate(table.top(query, TOP), 1)
    ]


def test_csv_logger_has_the_numbers(logged: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO((logged["csv"] / "metrics.csv").read_text())))
    for name in ("attribution/query-00000/top_score", "sample_losses/highest_corrected"):
        assert [row for row in rows if row[name]]


# ---------------------------------------------------------------------- other ways to ask


@pytest.mark.parametrize("method", [DAS(), Consensus(rise=0.001)], ids=["DAS", "Consensus"])
def test_other_methods_answer_too(method: Any, tmp_path: Path) -> None:
    _, network = training(toy_folder(), tmp_path, asked(toy_folder(), method=method), max_epochs=1)
    table = read_scores(tmp_path / "attribution" / "step=3")
    assert table.run["method_class"] == type(method).__name__
    assert np.isfinite(table.scores).all()
    assert (tmp_path / "fisher.safetensors").exists() == isinstance(method, Consensus)
    assert network.training  # as the user's module is


def test_the_answer_is_the_one_that_attribute_gives_afterwards(tmp_path: Path) -> None:
    from lightning_unlearn import ScoreWriter, UnlearningModule

    folder = toy_folder()
    _, network = training(folder, tmp_path, asked(folder), max_epochs=1)
    module = UnlearningModule(
        network,
        DenoisingObjective(),
        str(tmp_path / "fisher.safetensors"),
        strategy=Newton(alpha=2e-5, N=1),
        views=Views(2),
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[ScoreWriter(str(tmp_path / "after"))], **quiet)
    trainer.fit(module, data_of(folder))
    trainer.predict(module, data_of(folder), return_predictions=False)
    ours, theirs = read_scores(tmp_path / "attribution" / "step=3"), read_scores(tmp_path / "after")
    assert ours.keys == theirs.keys
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-5, atol=1e-9)


def test_prompts_are_made_by_a_function_or_given_as_samples(tmp_path: Path) -> None:
    seen: list[Any] = []

    def make(network: nn.Module, prompts: list[Any]) -> list[Sample]:
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        seen.extend(prompts)
        torch.randn(5)  # whoever makes pictures may draw
        return [decode_sample({"__url__": "toys", **toy_fields(number, prefix="made")}) for number in range(2)]

    folder = toy_folder()
    _, first = training(folder, tmp_path / "a", asked(folder, prompts=["a tiger"], generate=make), max_epochs=1)
    after = left_behind(first)
    assert seen == ["a tiger"]
    given = [decode_sample({"__url__": "toys", **toy_fields(number, prefix="made")}) for number in range(2)]
    _, second = training(folder, tmp_path / "b", asked(folder, prompts=given), max_epochs=1)
    assert_same(after, left_behind(second))
    tables = [read_scores(tmp_path / name / "attribution" / "step=3") for name in "ab"]
    assert tables[0].queries == tables[1].queries == ["made-00000", "made-00001"]
    assert np.array_equal(tables[0].scores, tables[1].scores)


def test_a_second_training_answers_beside_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        training(toy_folder(), tmp_path, asked(toy_folder()), max_epochs=1)
    assert sorted(place.name for place in (tmp_path / "attribution").iterdir()) == ["step=3", "step=3-v1"]


# ---------------------------------------------------------------------- what goes wrong


def test_a_failed_answer_is_told_and_the_training_ends_well(tmp_path: Path) -> None:
    def broken(network: nn.Module, prompts: list[Any]) -> list[Sample]:
        torch.randn(3)
        raise ValueError("out of paint")

    folder = toy_folder()
    with pytest.warns(UserWarning, match="no answer after step 3.*goes on without: ValueError: out of paint"):
        trainer, network = training(
            folder, tmp_path, asked(folder, prompts=["a"], generate=broken, strict=False), max_epochs=1
        )
    after = left_behind(network)
    assert trainer.state.finished
    assert (tmp_path / "fisher.safetensors").exists()
    with pytest.raises(ValueError, match="out of paint"):
        training(folder, tmp_path, asked(folder, prompts=["a"], generate=broken), max_epochs=1)
    _, bare = training(folder, tmp_path, max_epochs=1)
    assert_same(after, left_behind(bare))


class NoObjective(DiffusionModule):
    """Somebody's module, which does not say its loss."""

    def __init__(self) -> None:
        super().__init__(tiny_unet(), DenoisingObjective())
        self.loss = self.objective
        self.objective = None  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        pytest.fail("it is refused before any step")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompts": ["a tiger"]}, "can't make a picture of the prompt 'a tiger'; give generate"),
        ({"prompts": []}, "can't make a picture of the prompt ''; give generate"),
        ({"top": 0}, "must be at least 1, not 0"),
        ({"every_n_epochs": 0}, "must be at least 1, not 0"),
        ({"method": DAS(), "strategy": Newton()}, "DAS has no strategy"),
    ],
)
def test_arguments_out_of_range_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        AttributionLogger(data_of(toy_folder()), **settings)


@pytest.mark.parametrize(
    ("settings", "module", "sentence"),
    [
        ({"data": data_of(Path("nowhere"))}, None, "nowhere"),
        ({"fisher": FisherAccumulator("unet")}, None, "unet"),
        ({}, NoObjective, "does not say what loss its network is trained with"),
    ],
)
def test_what_no_answer_could_come_of_is_refused_before_training(
    settings: dict[str, Any], module: type[LightningModule] | None, sentence: str, tmp_path: Path
) -> None:
    logger = asked(toy_folder(), **{"strict": False, **settings})
    with pytest.raises(InputError, match=sentence):
        training(toy_folder(), tmp_path, logger, module=None if module is None else module())


def test_missing_queries_are_refused_before_training(tmp_path: Path) -> None:
    logger = asked(toy_folder(), data=data_of(toy_folder(), queries=False))
    with pytest.raises(InputError, match="has no queries"):
        training(toy_folder(), tmp_path, logger)


def test_a_copy_has_the_networks_own_hooks_and_not_ours() -> None:
    from lightning_unlearn.weights.outermost_calls import OutermostCalls

    network = nn.Sequential(nn.Linear(2, 2))
    network.register_forward_hook(lambda module, arguments, output: 2 * output)
    calls = OutermostCalls(network, ["0"])
    calls.attach()
    made = frozen_copy(network.to(torch.bfloat16))
    assert len(network._forward_hooks) > len(made._forward_hooks) == 1
    assert len(network._forward_pre_hooks) > len(made._forward_pre_hooks) == 0
    assert not made._forward_hooks_always_called
    assert next(made.parameters()).dtype == torch.float32
    inputs = torch.ones(1, 2)
    assert torch.allclose(made(inputs), 2 * made[0](inputs))
    assert next(network.parameters()).requires_grad
    assert network.training


# ---------------------------------------------------------------------- two processes


def test_two_processes_train_as_without_and_the_first_answers(tmp_path: Path) -> None:
    folder = toy_folder()
    run_ranks(__file__, folder, tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for found in ranks:
        for name, tensor in found["plain"].items():
            assert torch.equal(tensor, found["logged"][name]), name
        assert found["warned"] == (found is ranks[0])
    (place,) = (tmp_path / "logged" / "attribution").iterdir()
    table = read_scores(place)
    assert len(table.keys) == 24
    assert table.run["world_size"] == 1
    rows = list(csv.DictReader(io.StringIO((tmp_path / "logged" / "sample_losses.csv").read_text())))
    # Of each process's own samples; the last few don't fill a batch on each.
    assert sum(int(row["count"]) for row in rows) == 16
    (local,) = {len(found["own"]) for found in ranks}
    assert len(rows) == 2 * local == 16


def _as_rank(folder: Path, out: Path) -> None:
    ddp = {"devices": 2, "strategy": "ddp", "max_epochs": 1}
    _, network = training(folder, out / "plain", **ddp)
    plain = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    losses = SampleLossLogger()
    trainer, network = training(folder, out / "logged", asked(folder), losses, **ddp)
    found = {"plain": plain, "logged": dict(network.state_dict()), "own": list(losses._local._rows)}

    def broken(network: nn.Module, prompts: list[Any]) -> list[Sample]:
        raise ValueError("out of paint")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        failing = asked(folder, prompts=["a"], generate=broken, strict=False)
        training(folder, out / "failed", failing, **ddp)
    found["warned"] = any("out of paint" in str(one.message) for one in said)
    torch.save(found, out / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _as_rank(Path(sys.argv[1]), Path(sys.argv[2]))
