"""``lightning-unlearn attribute --method ...`` on toy shards and a toy YAML, as a user runs it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_forms
import numpy as np
import pytest
import torch
from attribution_runs import grouped_fields
from command_toys import SAMPLES, SHARDS, run, toy_config, toy_folder, write_config
from toys import done_shards, tiny_unet, toy_fields

from lightning_unlearn.baselines import BASELINES, Random, Subject
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.shards import write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.unlearning.scoring import measure_losses
from lightning_unlearn.weights.deltas import DeltaStore, NetworkLoss
from lightning_unlearn.weights.parameters import select_layers

QUIET = ["--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning may leave its logs where a command is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(tmp_path / "toy.yaml")


def score(config: str, folder: Path, *options: str) -> ScoreTable:
    run("attribute", "--config", config, "--output", folder, *options, *QUIET)
    return read_scores(folder)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence that a command ends with."""
    capsys.readouterr()
    try:
        status = main(["attribute", *map(str, arguments), *QUIET])
    except SystemExit as left:
        status = int(left.code or 0)
    assert status in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def toy_subject(views: Views) -> Subject:
    """The same model and data without any command."""
    folder = toy_folder()
    network = load_network(tiny_unet(), str(folder / "network.pt")).eval().requires_grad_(False)
    training = [sample for shard in list_shards(str(folder / "train")) for sample in read_samples(shard)]
    queries = [sample for shard in list_shards(str(folder / "queries")) for sample in read_samples(shard)]
    return Subject(
        NetworkLoss(network, DenoisingObjective()),
        select_layers(network, "text_kv"),
        views,
        sorted(queries, key=lambda query: query.key),
        lambda: [collate_samples("all", sorted(training, key=lambda sample: sample.key))],
        load_fisher(folder / "fisher.safetensors"),
    )


OPTIONS: dict[str, list[str]] = {
    "random": ["--method", "Random", "--method.seed", "3"],
    "pixel_similarity": ["--method", "PixelSimilarity", "--method.similarity", "l2"],
    "text_similarity": ["--method", "TextSimilarity"],
    "gradient_similarity": ["--method", "GradientSimilarity", "--method.per_timestep", "true"],
    "influence": ["--method", "Influence", "--method.damping", "0.5"],
    "trak": ["--method", "lightning_unlearn.baselines.trak.TRAK", "--method.ridge", "0.5"],
    "d_trak": ["--method", "DTRAK"],
    "das": ["--method", "DAS", "--method.leverage", "false"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_table_holds_what_the_method_gives(name: str, config: str, tmp_path: Path) -> None:
    table = score(config, tmp_path / "run", *OPTIONS[name])
    method = BASELINES[name](
        **{
            "random": {"seed": 3},
            "pixel_similarity": {"similarity": "l2"},
            "gradient_similarity": {"per_timestep": True},
            "influence": {"damping": 0.5},
            "trak": {"ridge": 0.5},
            "das": {"leverage": False},
        }.get(name, {})
    )
    expected = method.scores(toy_subject(Views(timesteps=2))).numpy()
    assert table.keys == [f"sample-{number:05d}" for number in range(SAMPLES)]
    assert table.queries == ["query-00000", "query-00001"]
    np.testing.assert_allclose(table.scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert table.run["method"] == method.settings()


@pytest.mark.parametrize("encoder", [{"class_path": "torch.nn.Flatten"}, "baseline_toys.rows"], ids=str)
def test_an_encoder_is_named_by_its_class_or_as_a_function(encoder: Any, tmp_path: Path) -> None:
    method = {"class_path": "EncoderSimilarity", "init_args": {"encoder": encoder}}
    table = score(write_config(tmp_path / "toy.yaml", {**toy_config(), "method": method}), tmp_path / "run")
    expected = BASELINES["pixel_similarity"]().scores(toy_subject(Views(timesteps=2))).numpy()
    np.testing.assert_allclose(table.scores, expected, rtol=1e-5, atol=1e-6)
    assert table.run["method"]["encoder"] in ("torch.nn.modules.flatten.Flatten", "baseline_toys.rows")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("baseline")
    score(write_config(folder / "toy.yaml"), folder / "run", "--method", "DTRAK")
    return folder / "run"


def test_run_is_recorded_as_scoring_records_it(finished: Path) -> None:
    settings = json.loads((finished / "run.json").read_text())
    assert {path.name for path in finished.iterdir()} == {
        "assertion.json",
        "report.html",
        "report.json",
        "run.json",
        "scores",
    }
    assert len(settings["shards"]) == len(done_shards(finished)) == SHARDS
    assert settings["views"]["timesteps"] == 2
    assert settings["seconds"] > 0
    assert settings["method"] == {"method": "d_trak", "ridge": 0.1, "projection": None, "seed": 0}
    assert set(settings["fingerprints"]) == {
        "weights",
        "objective",
        "parameters",
        "views",
        "method",
        "samples",
        "queries",
    }
    assert settings["targets"]["query-00001"]["captions"] == ["caption 0 of 1"]
    assert (read_scores(finished).base_losses > 0).all()


def test_base_losses_are_those_that_attribute_writes(finished: Path, config: str, tmp_path: Path) -> None:
    run("attribute", "--config", config, "--output", tmp_path / "ours", *QUIET)
    np.testing.assert_allclose(read_scores(finished).base_losses, read_scores(tmp_path / "ours").base_losses, rtol=1e-5)


def test_report_is_written_of_a_baseline_too(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    run("report", "--folder", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "by the method “DTRAK”" in page
    assert "was unlearned:" not in page
    assert "The loss rose" not in page


def test_finished_run_is_left_as_it_is(
    finished: Path, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    # The page is made anew, as that of unlearning, and what lies beside it.
    anew = {"report.html", "report.json", "assertion.json"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name not in anew]
    before = {path: path.stat().st_mtime_ns for path in files}
    page = (tmp_path / "run" / "report.html").read_bytes()
    score(config, tmp_path / "run", "--method", "DTRAK")
    assert "All shards are scored already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (tmp_path / "run" / "report.html").read_bytes() == page


def test_run_that_was_cut_short_is_finished(finished: Path, config: str, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    next((tmp_path / "run" / "scores").iterdir()).unlink()
    assert np.array_equal(score(config, tmp_path / "run", "--method", "DTRAK").scores, read_scores(finished).scores)


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (["--method", "DTRAK", "--method.ridge", "0.2"], "method"),
        (["--method", "Random"], "method"),
        (["--method", "DTRAK", "--model.init_args.views.seed", "1"], "views"),
        (["--method", "DTRAK", "--model.init_args.parameters", "attention"], "parameters"),
        (["--method", "DTRAK", "--data.init_args.query_keys", "[query-00001]"], "queries"),
        (["--method", "Influence"], "method, fisher"),
    ],
    ids=str,
)
def test_folder_of_another_run_is_refused(
    finished: Path, config: str, capsys: pytest.CaptureFixture[str], options: list[str], other: str
) -> None:
    before = read_scores(finished).scores
    said = refused(capsys, "--config", config, "--output", finished, *options)
    assert f"holds scores of another run (other {other})" in said
    assert np.array_equal(read_scores(finished).scores, before)


def test_folder_of_an_attribution_is_refused(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("attribute", "--config", config, "--output", tmp_path / "ours", *QUIET)
    assert "holds scores of another run" in refused(
        capsys, "--config", config, "--output", tmp_path / "ours", "--method", "Random"
    )
    score(config, tmp_path / "theirs", "--method", "Random")
    assert main(["attribute", "--config", config, "--output", str(tmp_path / "theirs"), *QUIET]) == 1
    assert "holds scores of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--data.init_args.batch_size", "1"], ["--data.init_args.num_workers", "2"]], ids=str
)
def test_batches_and_workers_change_nothing(finished: Path, config: str, tmp_path: Path, options: list[str]) -> None:
    expected = read_scores(finished)
    table = score(config, tmp_path / "run", "--method", "DTRAK", *options)
    assert table.keys == expected.keys
    np.testing.assert_allclose(
        table.scores, expected.scores, rtol=1e-3, atol=1e-4 * float(np.abs(expected.scores).max())
    )


def shards(folder: Path) -> Any:
    """A copy of the toy shards, and a config that names it."""
    shutil.copytree(toy_folder() / "train", folder / "train")
    config = toy_config()
    config["data"]["init_args"]["shards"] = str(folder / "train")
    return config


def test_shard_that_is_cut_off_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "toy.yaml", shards(tmp_path))
    victim = sorted((tmp_path / "train").glob("*.tar"))[-1]
    victim.write_bytes(victim.read_bytes()[:5000])
    said = refused(capsys, "--config", config, "--output", tmp_path / "run", "--method", "Random")
    assert victim.name in said
    assert not done_shards(tmp_path / "run")


def test_key_in_two_shards_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards([toy_fields(number) for number in (0, 1, 2, 0)], tmp_path / "twice", samples_per_shard=2)
    config = toy_config()
    config["data"]["init_args"]["shards"] = str(tmp_path / "twice")
    said = refused(
        capsys,
        "--config",
        write_config(tmp_path / "toy.yaml", config),
        "--output",
        tmp_path / "run",
        "--method",
        "Random",
    )
    assert "The key 'sample-00000' stands in" in said


def test_bad_samples_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {**toy_fields(1), "text.npy": b"nothing"}
    write_shards([toy_fields(0), bad, toy_fields(2), toy_fields(3)], tmp_path / "some", samples_per_shard=2)
    config = toy_config()
    config["data"]["init_args"] |= {"shards": str(tmp_path / "some"), "on_bad_sample": "skip"}
    table = score(write_config(tmp_path / "toy.yaml", config), tmp_path / "run", "--method", "TRAK")
    assert table.keys == ["sample-00000", "sample-00002", "sample-00003"]
    assert "1 bad samples were left out." in capsys.readouterr().out


def test_scores_that_are_not_finite_are_refused(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Random, "_draw", lambda self, query, key: float("nan" if key == "sample-00003" else 1))
    said = refused(capsys, "--config", config, "--output", tmp_path / "run", "--method", "Random")
    assert "The scores of Random are not finite for 'sample-00003'" in said
    assert not done_shards(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--method", "Random", "--trainer.devices", "2", "--trainer.strategy", "ddp"], "set trainer.devices to 1"),
        (["--method", "Random", "--trainer.precision", "bf16-mixed"], "is computed in precision 32-true"),
        (["--method", "TRAK", "--method.ridge", "0"], "ridge must be finite and above 0"),
        (["--method", "Influence", "--model.init_args.fisher", "null"], "A Fisher is needed"),
        (["--method", "JourneyTRAK"], "'query-00000' can't be made again for JourneyTRAK"),
        (["--method", "EAK"], "There is no class EAK; take Consensus, DAS, DTRAK, EncoderSimilarity, "),
        (["--method", "DTRAK", "--rule", "difference"], "--rule is for unlearning, and DTRAK has nothing of the kind"),
    ],
    ids=str,
)
def test_what_can_not_be_run_is_one_sentence(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    said = refused(capsys, "--config", config, "--output", tmp_path / "run", *options)
    assert reason in said
    assert not done_shards(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--data.init_args.targets_by", "artist"],
            "scores each query by itself, not sets of them; leave targets_by",
        ),
        ([], "looks at whole pictures, but the query 'query-00004' has a mask"),
    ],
    ids=str,
)
def test_sets_and_regions_are_one_sentence(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(grouped_fields(), tmp_path / "grouped")
    config = toy_config()
    config["data"]["init_args"]["queries"] = str(tmp_path / "grouped")
    path = write_config(tmp_path / "toy.yaml", config)
    said = refused(capsys, "--config", path, "--output", tmp_path / "run", "--method", "Random", *options)
    assert says in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "fine"), [("TRAK", False), ("PixelSimilarity", True)])
def test_query_without_a_flip_is_one_sentence_before_samples_are_measured_where_it_is_needed(
    method: str, fine: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards([toy_fields(number, flip=True) for number in range(3)], tmp_path / "train")
    write_shards([toy_fields(9, prefix="query")], tmp_path / "queries")
    config = toy_config()
    config["data"]["init_args"] |= {"shards": str(tmp_path / "train"), "queries": str(tmp_path / "queries")}
    path = write_config(tmp_path / "toy.yaml", config)
    words = ["--config", path, "--method", method, "--model.init_args.views.flips", "true"]
    if fine:
        assert len(score(path, tmp_path / "run", *words[2:]).keys) == 3
    else:
        said = refused(capsys, *words, "--output", tmp_path / "run")
        assert "the query 'query-00009' has no latent_flip.npy; prepare the queries with flips" in said
        assert not (tmp_path / "run").exists()


def test_bar_counts_samples(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("attribute", "--config", config, "--output", tmp_path / "run", "--method", "PixelSimilarity")
    out = capsys.readouterr().out
    assert f"{SAMPLES}/{SAMPLES}" in out
    assert "Scoring by PixelSimilarity on cpu" in out
    assert f"{SAMPLES} samples scored into {tmp_path / 'run' / 'scores'}.\n" in out
    run("report", "--folder", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()


def test_what_an_adapter_learned_needs_no_query(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    network = load_network(tiny_unet(), str(toy_folder() / "network.pt"))
    adapter = adapter_forms.random_adapter(network, ["mid_block.attentions.0.proj_in", "conv_in"])
    path = adapter_forms.save(tmp_path / "lora.safetensors", adapter_forms.kohya_state(adapter))
    content = toy_config()
    del content["data"]["init_args"]["queries"], content["model"]["init_args"]["fisher"]
    content["model"]["init_args"] |= {"adapter": path, "parameters": "adapter"}
    alone = write_config(tmp_path / "alone.yaml", content)
    table = score(alone, tmp_path / "run", "--method", "Undone")
    assert table.queries == ["adapter"]
    assert len(table.keys) == SAMPLES
    before = toy_subject(Views(timesteps=2))
    after = replace(before, loss=NetworkLoss(adapter_forms.applied(network, adapter), DenoisingObjective()))
    losses = [
        torch.cat([measure_losses(s.loss, DeltaStore({}, []), s.views, b, torch.device("cpu"))[0] for b in s.batches()])
        for s in (before, after)
    ]
    expected = (losses[0] - losses[1]).nanmean((-3, -2, -1)).detach().numpy()
    np.testing.assert_allclose(table.scores[:, 0], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert table.run["network"]["adapter"] == path
    assert table.run["query_shards"] == []
    assert "sample-" in (tmp_path / "run" / "report.html").read_text()
    # Nothing else can do without.
    assert "name some as `queries`" in refused(
        capsys, "--config", alone, "--output", str(tmp_path / "a"), "--method", "DTRAK"
    )
    said = refused(capsys, "--config", alone, "--output", str(tmp_path / "b"), "--model.strategy", "Mirrored")
    assert "name the generated images as `queries`" in said
