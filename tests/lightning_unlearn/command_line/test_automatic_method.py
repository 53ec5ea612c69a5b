"""What ``lightning-unlearn attribute`` does where nobody names a method, on toy shards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command_toys import SAMPLES, run, toy_config, write_config
from toys import DIM, LATENT, TOKENS, tiny_unet, told, toy_fields

from lightning_unlearn.baselines.consensus import Consensus
from lightning_unlearn.command_line.automatic_method import automatic_method
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.unlearning.module import UnlearningModule

QUIET = ["--trainer.enable_progress_bar", "false"]
ALONE = "The images are scored by unlearning alone, without D-TRAK and DAS beside it, since "


@pytest.fixture
def content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)  # Lightning may leave its logs where a command is started
    content = toy_config()
    del content["model"]["init_args"]["strategy"]
    return content


def test_by_default_several_methods_are_asked_on_the_fisher_s_weights(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del content["model"]["init_args"]["parameters"]
    content["model"]["init_args"]["views"] = {"timesteps": 4}
    config = write_config(tmp_path / "toy.yaml", content)
    folder = tmp_path / "run"
    run("attribute", "--config", config, "--output", folder, *QUIET)
    said = capsys.readouterr().out
    assert "Weights: 'text_kv' (the Fisher in " in said
    assert ALONE not in said
    table = read_scores(folder)
    assert table.run["method"] == Consensus().settings()
    assert table.run["parameters"] == "text_kv"
    assert "for more, take one with `parameters: all`" in table.run["parameters_reason"]
    assert list(table.parts) == ["das", "d_trak", "unlearning"]
    # Unlearning looks at each other draw, and the losses that it measured are not measured again.
    alone = read_scores(folder / "unlearning")
    assert (table.run["views"]["timesteps"], table.run["views"].get("every", 1)) == (4, 1)
    assert (alone.run["views"]["timesteps"], alone.run["views"]["every"]) == (4, 2)
    np.testing.assert_array_equal(table.base_losses, alone.base_losses)
    for key, target in table.run["targets"].items():
        # How far its step went is said of the answer, too.
        for name in ("rise", "length", "out_of_range"):
            assert target[name] == alone.run["targets"][key][name]
        assert target["sure"]["alike"].keys() == {"captions", "pixels"}
        assert 0 <= target["sure"]["halves"] <= 1
    page = (folder / "report.html").read_text()
    assert "unlearning by one half of its views and by the other has" in page


def test_a_new_fisher_is_of_all_weights_and_they_are_chosen(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del content["model"]["init_args"]["parameters"]
    config, fisher = write_config(tmp_path / "toy.yaml", content), tmp_path / "new.safetensors"
    # The config's own Fisher is of `text_kv`.
    run("fisher", "--config", config, "--kind", "diagonal", "--passes", "1", "--output", fisher, *QUIET)
    said = "Weights: 'all' (82 layers, 23,179 weights)."
    assert said in capsys.readouterr().out
    run("attribute", "--config", config, "--output", tmp_path / "run", "--model.init_args.fisher", fisher, *QUIET)
    assert said in capsys.readouterr().out
    run_record = read_scores(tmp_path / "run").run
    assert (run_record["parameters"], run_record["unlearning"]["parameters"]) == ("all", "all")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--rule", "difference"], "--rule is for it."),
        (["--rule", "difference", "--flips", "mean"], "--rule, --flips are for it."),
        (["--race.top", "3", "--race.views", "4", "--model.init_args.views.timesteps", "8"], "--race is for it."),
        (
            ["--model.init_args.strategy", "{class_path: Newton, init_args: {target_increase: 0.2}}"],
            "names a strategy.",
        ),
        (["--data.init_args.keys", "[sample-00001, sample-00002]"], "keys asks for some images alone"),
        (["--trainer.precision", "bf16-mixed"], "the Trainer in bf16-mixed."),
        (["--data.init_args.targets_by", "of"], "targets_by asks for sets of queries (of)"),
        (["--model.init_args.views.flips", "true"], "has no latent_flip.npy"),
    ],
)
def test_what_only_unlearning_can_do_is_done_by_it(
    options: list[str], why: str, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = [told(toy_fields(number, prefix="query"), of="x") for number in range(2)]
    write_shards(queries, tmp_path / "queries", name="queries")
    content["data"]["init_args"]["queries"] = str(tmp_path / "queries")
    config = write_config(tmp_path / "toy.yaml", content)
    status = main(["attribute", "--config", config, "--output", str(tmp_path / "run"), *options, *QUIET])
    said = capsys.readouterr()
    assert ALONE in said.out
    assert why in said.out
    if "latent_flip" in why or "bf16" in why:  # nor have the samples; nor does it measure a rise in such numbers
        assert status == 1
        return
    assert status == 0, said.err
    assert "unlearning" in read_scores(tmp_path / "run").run
    assert "method" not in read_scores(tmp_path / "run").run


@pytest.mark.parametrize(
    ("processes", "origin", "why"),
    [
        (2, {}, "since the others work in one process, and the Trainer has 2."),
        (
            1,
            {"adapter": "lora.safetensors"},
            "since of few pictures that a model was customised with it finds far more",
        ),
    ],
)
def test_what_the_others_can_not_or_do_worse(
    processes: int, origin: dict[str, Any], why: str, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module = UnlearningModule(tiny_unet(), DenoisingObjective(), "identity")
    module.origin |= origin
    data = AttributionDataModule("shards", "queries")  # not looked at
    trainer: Any = SimpleNamespace(world_size=processes, precision="32-true")
    assert automatic_method(module, data, trainer, []) is None
    assert why in capsys.readouterr().out


def test_what_does_not_fit_in_memory_is_done_by_unlearning(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_unlearn.command_line.automatic_method.MOST_MEMORY", 1000)
    config = write_config(tmp_path / "toy.yaml", content)
    run("attribute", "--config", config, "--output", tmp_path / "run", *QUIET)
    assert f"what they keep of {SAMPLES} images takes" in capsys.readouterr().out
    assert len(read_scores(tmp_path / "run").keys) == SAMPLES


def test_an_index_needs_no_memory_for_all_and_unknown_counts_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_unlearn.command_line.automatic_method.MOST_MEMORY", 1000)
    module = UnlearningModule(tiny_unet(), DenoisingObjective(), "identity")
    data = AttributionDataModule("shards", "queries")
    monkeypatch.setattr(data, "setup", lambda stage: None)
    data.shards = [SimpleNamespace(samples=None), SimpleNamespace(samples=50)]  # type: ignore[list-item]
    trainer: Any = SimpleNamespace(world_size=1, precision="32-true")
    assert automatic_method(module, data, trainer, [], by_index=True) is not None
    assert automatic_method(module, data, trainer, []) is None
    assert "How many images 1 of 2 shards hold is not known" in capsys.readouterr().out


def test_gradients_that_do_not_fit_are_sketched(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "toy.yaml", content)
    run("attribute", "--config", config, "--output", tmp_path / "whole", *QUIET)
    monkeypatch.setattr("lightning_unlearn.baselines.sketch.GRADIENT_BYTES", 4 * 2 * SAMPLES * 128)
    monkeypatch.setattr("lightning_unlearn.baselines.sketch.LEAST_NUMBERS", 32)
    run("attribute", "--config", config, "--output", tmp_path / "sketched", *QUIET)
    assert json.loads((tmp_path / "sketched" / "run.json").read_text())["sketch"] == 128
    whole, sketched = (read_scores(tmp_path / name) for name in ("whole", "sketched"))
    assert "sketch" not in whole.run
    assert not np.array_equal(whole.parts["d_trak"], sketched.parts["d_trak"])
    for query in range(2):
        assert np.corrcoef(whole.scores[:, query], sketched.scores[:, query])[0, 1] > 0.9


def test_samples_that_unlearning_left_out_are_left_out_of_all(
    content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [toy_fields(number) for number in range(8)]
    huge = np.full(LATENT, 1e30, np.float32)  # its loss is infinite
    fields[3] = encode_sample("sample-00003", huge, np.zeros((1, TOKENS, DIM), np.float32), {"captions": ["huge"]})
    write_shards(fields, tmp_path / "train", name="train")
    content["data"]["init_args"] |= {"shards": str(tmp_path / "train"), "on_bad_sample": "skip"}
    config = write_config(tmp_path / "toy.yaml", content)
    run("attribute", "--config", config, "--output", tmp_path / "run", *QUIET)
    table = read_scores(tmp_path / "run")
    assert table.keys == [f"sample-{number:05d}" for number in range(8) if number != 3]
    assert np.isfinite(table.scores).all()
    assert "1 bad samples were left out." in capsys.readouterr().out
