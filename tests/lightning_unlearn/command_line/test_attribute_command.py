"""The commands that run a Trainer, on toy shards and a toy YAML, as a user runs them."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import grouped_fields
from command_toys import SAMPLES, run, toy_config, toy_folder, write_config
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from toys import ToyDenoiser, tiny_unet

from lightning_unlearn.callbacks import FisherAccumulator, ScoreWriter
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.module import UnlearningModule

QUIET = ["--trainer.enable_progress_bar", "false"]
UNLEARNING = ["--method", "unlearning"]
DIAGONAL = ["--kind", "diagonal"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning may leave its logs where a command is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(tmp_path / "toy.yaml")


def assert_same_scores(ours: ScoreTable, theirs: ScoreTable, spread: float = 1e-4) -> None:
    """Scores agree to a share of their own standard deviation over samples."""
    assert ours.keys == theirs.keys
    assert ours.queries == theirs.queries
    assert len(ours.keys) == SAMPLES
    deviation = theirs.scores.std(0)
    assert (deviation > 0).all()
    assert (np.abs(ours.scores - theirs.scores).max(0) <= spread * deviation).all()


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of the files that must not be made again."""
    found = [folder / "deltas.ckpt", *sorted((folder / "scores").glob("*.parquet"))]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def bare_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that prints and saves nothing."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **{**off, **settings})


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert main([*map(str, arguments), *QUIET]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# ---------------------------------------------------------------------- attribute


@pytest.fixture(scope="module")
def attributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the toy YAML, which no test changes."""
    folder = tmp_path_factory.mktemp("attributed")
    run("attribute", "--config", write_config(folder / "toy.yaml"), "--output", folder / "run", *QUIET)
    return folder / "run"


def test_attribute_leaves_deltas_scores_settings_and_a_report(attributed: Path) -> None:
    pages = {"report.html", "report.json", "assertion.json"}
    assert {path.name for path in attributed.iterdir()} == {"deltas.ckpt", "run.json", "scores", *pages}
    settings = json.loads((attributed / "run.json").read_text())
    assert len(list((attributed / "scores").glob("*.parquet"))) == len(settings["shards"]) == 5
    assert settings["views"]["timesteps"] == 2
    for result in settings["targets"].values():
        assert result["rise"] == pytest.approx(0.5, rel=1e-3)
    table = read_scores(attributed)
    assert table.queries == ["query-00000", "query-00001"]
    assert np.isfinite(table.scores).all()
    page = (attributed / "report.html").read_text()
    assert all(query in page and table.top(query, 1)[0][0] in page for query in table.queries)


def test_second_run_says_what_is_done_and_makes_nothing_again(
    attributed: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(attributed)
    run("attribute", "--config", config, "--output", attributed, *UNLEARNING)
    said = capsys.readouterr().out
    assert files(attributed) == before
    assert f"2 queries unlearned already, in {attributed / 'deltas.ckpt'}." in said
    assert f"5 of 5 shards scored already, in {attributed / 'scores'}." in said
    assert "Unlearning" not in said
    assert "Scoring" not in said


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [
        ("--data.init_args.draws", "8", "unlearning"),
        ("--model.init_args.strategy", "{class_path: Newton, init_args: {target_increase: 0.2}}", "unlearning"),
        ("--data.init_args.query_keys", "[query-00001]", "unlearning"),
        ("--model.init_args.views.timesteps", "3", "views"),
        ("--rule", "difference", "rule"),
        ("--flips", "mean", "flips"),
        ("--keep_deviations", "true", "columns"),
    ],
)
def test_another_setting_with_the_same_output_is_refused(
    option: str, value: str, other: str, attributed: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(attributed)
    said = refused(capsys, "attribute", "--config", config, "--output", attributed, option, value)
    assert str(attributed) in said
    assert f"other {other}" in said
    assert files(attributed) == before


def test_chosen_keys_that_no_shard_holds_are_named(
    config: str, tmp_path: Path, attributed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(attributed / "deltas.ckpt", output)
    keys = "[sample-00001, sample-99999]"
    run("attribute", "--config", config, "--output", output, "--data.init_args.keys", keys, *QUIET)
    assert read_scores(output).keys == ["sample-00001"]
    assert (
        "1 chosen sample without a score, in no shard or left out as bad: 'sample-99999'.\n" in capsys.readouterr().out
    )


def test_deleted_scores_of_a_shard_come_back_the_same(config: str, tmp_path: Path, attributed: Path) -> None:
    output = tmp_path / "run"
    run("attribute", "--config", config, "--output", output, *QUIET)
    before = files(output)
    lost = next((output / "scores").glob("*.parquet"))
    lost.unlink()
    run("attribute", "--config", config, "--output", output, *QUIET)
    after = files(output)
    assert after[lost.name][1] == before[lost.name][1]
    assert after[lost.name][0] > before[lost.name][0]
    assert {name: kept for name, kept in after.items() if name != lost.name} == {
        name: kept for name, kept in before.items() if name != lost.name
    }
    # The same YAML gives the same scores, bit for bit, in another folder and on another day.
    assert (read_scores(output).scores == read_scores(attributed).scores).all()


def grouped_config(folder: Path) -> str:
    """The toy YAML with five queries of two artists in the place of its own."""
    write_shards(grouped_fields(), folder / "grouped", samples_per_shard=2)
    config = toy_config()
    config["data"]["init_args"] |= {"queries": str(folder / "grouped"), "targets_by": "artist"}
    return write_config(folder / "grouped.yaml", config)


def test_attribute_unlearns_sets_and_the_report_lists_their_members(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = grouped_config(tmp_path), tmp_path / "run"
    run("attribute", "--config", config, "--output", output, *QUIET)
    assert "Unlearning 2 sets of 5 queries with 6 draws each on cpu …" in capsys.readouterr().out
    table = read_scores(output)
    assert table.queries == ["Klee", "Marc"]
    members = {name: about["members"] for name, about in table.run["targets"].items()}
    assert members == {"Klee": ["query-00001", "query-00003", "query-00005"], "Marc": ["query-00002", "query-00004"]}
    assert all(about["rise"] == pytest.approx(0.5, rel=1e-3) for about in table.run["targets"].values())
    page = (output / "report.html").read_text()
    lists = [part.partition("</ul>")[0] for part in page.split('<ul class="members">')[1:]]
    assert [re.findall(r"caption 0 of (\d)</p>", part) for part in lists] == [["1", "3", "5"], ["2", "4"]]
    assert page.count("Set’s loss before") == 2

    # The same command finds all of it done; other sets of the same queries are another run.
    before = files(output)
    run("attribute", "--config", config, "--output", output, *QUIET)
    assert "2 sets of 5 queries unlearned already" in capsys.readouterr().out
    assert files(output) == before
    alone = ("--config", config, "--output", output, "--data.init_args.targets_by", "null")
    assert "was made with other unlearning than this run's" in refused(capsys, "attribute", *alone)
    page = (output / "report.html").read_text()
    run("report", "--folder", output)
    assert (output / "report.html").read_text() == page


def test_queries_that_do_not_say_their_target_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--config", grouped_config(tmp_path), "--output", tmp_path / "run")
    said = refused(capsys, "attribute", *options, "--data.init_args.targets_by", "licence")
    assert "The query 'query-00001' has no 'licence' in its json" in said
    assert not (tmp_path / "run" / "deltas.ckpt").exists()


def test_report_command_writes_the_same_page_again(attributed: Path, tmp_path: Path) -> None:
    pages = [attributed / name for name in ("report.html", "report.json", "assertion.json")]
    before = [page.read_bytes() for page in pages]
    for page in pages:
        page.unlink()
    run("report", "--folder", attributed, "--top", "12")
    assert [page.read_bytes() for page in pages] == before


def test_report_command_refuses_to_group_by_a_field_that_nobody_has(
    attributed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(attributed, tmp_path / "run")
    for groups in ("artst", "[artst, licence]"):
        assert main(["report", "--folder", str(tmp_path / "run"), "--groups", groups]) == 1
        assert "No training image has 'artst' in its json" in capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").read_bytes() == (attributed / "report.html").read_bytes()


def test_attribute_reads_calmly(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        run("attribute", "--config", config, "--output", output, *UNLEARNING)
    bar = r"(Training|Epoch \d+|Scoring): .*| +"
    lines = [line for line in re.split(r"[\r\n]+", capfd.readouterr().out) if line and not re.fullmatch(bar, line)]
    assert lines == [
        "Unlearning 2 queries with 6 draws each on cpu …",
        "Searching how far the step should go, on 4 draws a query …",
        f"Deltas: {output / 'deltas.ckpt'}",
        f"Scoring {SAMPLES} samples in 5 shards on cpu …",
        f"Report: {output / 'report.html'}",
    ]
    assert [record.getMessage() for record in caplog.records] == []
    ours = [str(warning.message) for warning in warned if not issubclass(warning.category, DeprecationWarning)]
    assert ours == []


def test_warnings_of_others_are_still_heard(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "warning_callback.py").write_text(
        "import warnings\nfrom lightning.pytorch import Callback\n"
        "class Warns(Callback):\n    def on_predict_start(self, *_):\n        warnings.warn('somebody warns')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(UserWarning, match="somebody warns"):
        run(
            *("attribute", "--config", config, "--output", tmp_path / "run", *QUIET),
            *("--trainer.callbacks", "warning_callback.Warns"),
        )


# Advice on loaders and steps is Lightning's to give where a test makes a Trainer itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|eval mode|max_epochs|LeafSpec|returned `None`).*")


# ---------------------------------------------------------------------- fit and predict


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `fit` with the toy YAML."""
    folder = tmp_path_factory.mktemp("fitted")
    path = write_config(folder / "toy.yaml")
    run("fit", "--config", path, *QUIET, "--trainer.default_root_dir", folder, "--trainer.logger", "false")
    (checkpoint,) = folder.rglob("*.ckpt")
    return checkpoint


def predict(config: str, checkpoint: Path, output: Path, *options: str) -> None:
    run(
        *("predict", "--config", config, "--ckpt_path", checkpoint, *QUIET, "--trainer.logger", "false", *options),
        *("--trainer.callbacks+=ScoreWriter", f"--trainer.callbacks.folder={output}"),
    )


def test_fit_then_predict_give_what_attribute_gives(
    config: str, fitted: Path, attributed: Path, tmp_path: Path
) -> None:
    predict(config, fitted, tmp_path / "run")
    ours, theirs = read_scores(tmp_path / "run"), read_scores(attributed)
    assert_same_scores(ours, theirs)
    assert ours.run["fingerprints"] == theirs.run["fingerprints"]


def test_command_line_wins_over_what_the_checkpoint_was_made_with(config: str, fitted: Path, tmp_path: Path) -> None:
    predict(config, fitted, tmp_path / "run", "--model.init_args.views.timesteps", "3")
    assert read_scores(tmp_path / "run").run["views"]["timesteps"] == 3


def test_predict_that_would_lose_its_scores_is_refused(
    config: str, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "callbacks+=ScoreWriter" in refused(capsys, "predict", "--config", config, "--ckpt_path", fitted)
    assert "'best' names no file" in refused(capsys, "predict", "--config", config, "--ckpt_path", "best")
    writer = ["--trainer.callbacks+=ScoreWriter", f"--trainer.callbacks.folder={config}"]
    said = refused(capsys, "predict", "--config", config, "--ckpt_path", fitted, *writer)
    assert "can't be made (File exists); give ScoreWriter another folder." in said


def test_command_line_wins_over_hyperparameters_that_a_users_module_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "storing_module.py").write_text(STORING_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = {"class_path": "storing_module.Data"}
    trainer = {"accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path), "max_epochs": 1}
    model = {"class_path": "storing_module.Module", "init_args": {"rate": 0.5}}
    path = write_config(tmp_path / "storing.yaml", {"model": model, "data": data, "trainer": trainer})
    run("fit", "--config", path, *QUIET)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["rate"] == 0.5
    run("predict", "--config", path, *QUIET, "--ckpt_path", checkpoint, "--model.init_args.rate", "0.25")
    assert sys.modules["storing_module"].rates == [0.25]


STORING_MODULE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule

rates = []


class Module(LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def predict_step(self, batch, batch_idx):
        rates.append(self.hparams.rate)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)


class Data(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(1, 1))

    predict_dataloader = train_dataloader
"""


# ---------------------------------------------------------------------- precision


def test_scores_in_half_precision_say_how_they_rank_against_float32(
    config: str, fitted: Path, attributed: Path, tmp_path: Path
) -> None:
    predict(config, fitted, tmp_path / "run", "--trainer.precision", "bf16-mixed", "--data.init_args.batch_size", "5")
    table = read_scores(tmp_path / "run")
    assert table.run["precision"] == "bf16-mixed"
    assert 0 < table.run["rank_correlation_with_float32"] <= 1
    assert table.scores.shape == read_scores(attributed).scores.shape
    assert (table.scores != read_scores(attributed).scores).any()


@pytest.mark.parametrize(("precision", "remedy"), [("bf16-mixed", "unlearn with 32-true"), ("bf16-true", "32-true")])
def test_unlearning_in_half_precision_is_refused(
    precision: str, remedy: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        capsys, "attribute", "--config", config, "--output", tmp_path / "run", "--trainer.precision", precision
    )
    assert precision in said
    assert remedy in said


def test_scoring_with_half_precision_weights_is_refused(
    config: str, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = ("--trainer.callbacks+=ScoreWriter", f"--trainer.callbacks.folder={tmp_path / 'run'}")
    half = ("--trainer.precision", "bf16-true")
    assert "bf16-true" in refused(capsys, "predict", "--config", config, "--ckpt_path", fitted, *half, *writer)
    assert not (tmp_path / "run" / "scores").exists()


# ---------------------------------------------------------------------- fisher


@pytest.fixture(scope="module")
def fisher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fisher")
    path = write_config(folder / "toy.yaml")
    run(
        "fisher",
        "--config",
        path,
        "--passes",
        "3",
        *DIAGONAL,
        "--output",
        folder / "made" / "fisher.safetensors",
        *QUIET,
    )
    return folder / "made" / "fisher.safetensors"


def test_fisher_counts_every_sample_in_every_pass(fisher_file: Path) -> None:
    fisher = load_fisher(str(fisher_file))
    assert fisher.count == 3 * SAMPLES
    assert fisher.provenance["module"] == "lightning_unlearn.training.FisherPass"
    assert fisher.provenance["objective"] == DenoisingObjective().settings()
    weights = torch.load(toy_folder() / "network.pt", weights_only=True)
    assert fisher.weights.keys() == fisher.parameter_shapes.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in fisher.weights.items())


def test_fisher_command_is_the_accumulator_over_frozen_passes(fisher_file: Path, tmp_path: Path) -> None:
    network = load_network(tiny_unet(), str(toy_folder() / "network.pt"))
    accumulator = FisherAccumulator("network", fisher="diagonal", path=str(tmp_path / "fisher.safetensors"))
    passes = FisherPass(network, DenoisingObjective(), "text_kv")
    bare_trainer(accumulator, max_epochs=3).fit(passes, TrainingDataModule(str(toy_folder() / "train"), 4))
    theirs, ours = load_fisher(str(tmp_path / "fisher.safetensors")), load_fisher(str(fisher_file))
    assert theirs.count == ours.count
    assert theirs.tensors().keys() == ours.tensors().keys()
    for name, total in ours.tensors().items():
        torch.testing.assert_close(total, theirs.tensors()[name], rtol=1e-5, atol=0)
        assert (total > 0).any()


def test_fisher_takes_the_data_of_a_training_config_too(config: str, tmp_path: Path) -> None:
    data = {"class_path": "TrainingDataModule", "init_args": {"shards": "${oc.env:TOYS}/train", "batch_size": 8}}
    path = write_config(tmp_path / "training.yaml", {**toy_config(), "data": data})
    run("fisher", "--config", path, "--passes", "1", *DIAGONAL, "--output", tmp_path / "fisher.safetensors", *QUIET)
    assert load_fisher(str(tmp_path / "fisher.safetensors")).count == SAMPLES


def test_attribute_works_with_the_fisher_that_the_command_made(config: str, fisher_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("attribute", "--config", config, "--output", output, "--model.init_args.fisher", fisher_file, *QUIET)
    assert len(read_scores(output).keys) == SAMPLES


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--passes", "0"], "--passes"),
        (["--model", "{class_path: DiffusionModule, init_args: {network: x}}"], "x is no folder"),
    ],
)
def test_fisher_that_can_not_be_taken_gets_one_sentence(
    options: list[str], part: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, "fisher", "--config", config, *options)


# ---------------------------------------------------------------------- a run that knows nothing of this package


SOMEBODYS_MODULE = """
import torch
from lightning.pytorch import LightningModule
from lightning_unlearn.diffusion.objective import Objective
from toys import DIM, LATENT, ToyDenoiser, TOKENS


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = ToyDenoiser()


class Training(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.head = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        noisy, timesteps, text, noise = batch
        return (self.model.unet(noisy, timesteps, text) - noise).square().mean()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        rows = [
            (
                torch.randn(LATENT, generator=generator),
                torch.randint(0, 10, (), generator=generator),
                torch.randn(TOKENS, DIM, generator=generator),
                torch.randn(LATENT, generator=generator),
            )
            for _ in range(16)
        ]
        return torch.utils.data.DataLoader(rows, batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class TheirObjective(Objective):
    num_timesteps = 10

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, network, batch, timesteps, noise):
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        return self.weight * (prediction - noise).square().flatten(1).mean(1)
"""


@pytest.fixture(scope="module")
def somebodys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module of somebody's, and the checkpoints of two runs of it, one with averaged weights."""
    folder = tmp_path_factory.mktemp("somebodys")
    (folder / "somebodys_module.py").write_text(SOMEBODYS_MODULE)
    sys.path.insert(0, str(folder))
    from somebodys_module import Training  # type: ignore[import-not-found]

    def train(name: str, *callbacks: Callback) -> None:
        # Saved while it trains: at its end Lightning puts the averaged weights in the place of the raw ones.
        saving = ModelCheckpoint(dirpath=folder, filename=name, every_n_train_steps=11)
        bare_trainer(*callbacks, saving, max_epochs=3, enable_checkpointing=True).fit(Training())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train("plain")
        train("averaged", EMAWeightAveraging(decay=0.9))
    yield folder
    sys.path.remove(str(folder))


def somebodys_config(folder: Path, checkpoint: str, prefix: str = "model.unet.", **settings: Any) -> dict[str, Any]:
    config = toy_config()
    config["model"]["init_args"] = {
        "network": {"class_path": "toys.ToyDenoiser"},
        "objective": {"class_path": "somebodys_module.TheirObjective", "init_args": {"weight": 2.0}},
        "weights": str(folder / checkpoint),
        "prefix": prefix,
        "parameters": ["text", r"conv_.*"],
        "rise_draws": 4,
        "views": {"timesteps": 2},
        **settings,
    }
    return config


@pytest.mark.parametrize(
    ("checkpoint", "averaged", "where"),
    [
        ("plain.ckpt", True, "state_dict"),
        ("averaged.ckpt", True, "state_dict"),
        ("averaged.ckpt", False, "current_model_state"),
    ],
)
def test_checkpoint_of_a_foreign_module_is_attributed_with_its_own_objective(
    checkpoint: str, averaged: bool, where: str, somebodys: Path, tmp_path: Path
) -> None:
    content = somebodys_config(somebodys, checkpoint, averaged=averaged, fisher=str(tmp_path / "fisher.safetensors"))
    config = write_config(tmp_path / "theirs.yaml", content)
    run("fisher", "--config", config, "--passes", "2", "--output", tmp_path / "fisher.safetensors", *QUIET)
    fisher = load_fisher(str(tmp_path / "fisher.safetensors"))
    # The very weights that the run had, and no others.
    stored = torch.load(somebodys / checkpoint, weights_only=True)[where]
    assert set(fisher.layers) == {"conv_in", "text", "conv_out"}
    for name, weight in fisher.weights.items():
        assert torch.equal(weight, stored[f"model.unet.{name}"])
    run("attribute", "--config", config, "--output", tmp_path / "run", *QUIET)
    table = read_scores(tmp_path / "run")
    assert len(table.keys) == SAMPLES
    assert table.run["unlearning"]["objective"]["class"] == "somebodys_module.TheirObjective"
    # A record says whether averaged weights were taken, whatever was asked for.
    taken = checkpoint == "averaged.ckpt" and averaged
    network = {"file": str(somebodys / checkpoint), "place": f"{where}.model.unet", "averaged": taken}
    assert table.run["network"].items() >= network.items()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h3>Network</h3>" in page
    assert f'<dt>averaged</dt><dd dir="auto">{str(taken).lower()}</dd>' in page
    assert all(result["rise"] == pytest.approx(0.3, rel=1e-3) for result in table.run["targets"].values())


def test_averaged_and_raw_weights_are_told_apart(somebodys: Path) -> None:
    path = str(somebodys / "averaged.ckpt")
    averaged = load_network(ToyDenoiser(), path, "model.unet.", averaged=True).state_dict()
    raw = load_network(ToyDenoiser(), path, "model.unet.", averaged=False).state_dict()
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


def test_foreign_checkpoint_from_python(somebodys: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "theirs.yaml", somebodys_config(somebodys, "plain.ckpt"))
    run("fisher", "--config", config, "--passes", "1", *DIAGONAL, "--output", tmp_path / "fisher.safetensors", *QUIET)
    theirs = somebodys_config(somebodys, "plain.ckpt", fisher=str(tmp_path / "fisher.safetensors"))
    config = write_config(tmp_path / "theirs.yaml", theirs)
    run("attribute", "--config", config, "--output", tmp_path / "run", *UNLEARNING, *QUIET)

    from somebodys_module import TheirObjective

    module = UnlearningModule(
        ToyDenoiser(),
        TheirObjective(2.0),
        str(tmp_path / "fisher.safetensors"),
        ["text", r"conv_.*"],
        views=Views(2),
        rise_draws=4,
        weights=str(somebodys / "plain.ckpt"),
        prefix="model.unet.",
    )
    data = AttributionDataModule(
        str(toy_folder() / "train"), str(toy_folder() / "queries"), draws=6, draw_batch_size=4, batch_size=4
    )
    trainer = bare_trainer(ScoreWriter(str(tmp_path / "python")))
    trainer.fit(module, data)
    trainer.predict(module, data)
    assert_same_scores(read_scores(tmp_path / "python"), read_scores(tmp_path / "run"))


def test_wrong_prefix_names_those_that_hold_the_network(
    somebodys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "theirs.yaml", somebodys_config(somebodys, "plain.ckpt", prefix="unet."))
    assert "'model.unet.'" in refused(capsys, "attribute", "--config", config)
