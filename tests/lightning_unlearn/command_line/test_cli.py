"""The command line as a person meets it: help, options, and what wrong ones get."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_toys import toy_config, write_config
from toys import DIM, LATENT, TOKENS

import lightning_unlearn
from lightning_unlearn.command_line.cli import COMMANDS, main
from lightning_unlearn.command_line.usage import foreign_class, sentence
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.errors import InputError


class Ends:
    """Runs a command and keeps what a person sees of it."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = int(error.code or 0)
        captured = self.capsys.readouterr()
        return status, captured.out, captured.err


@pytest.fixture
def ends(capsys: pytest.CaptureFixture[str]) -> Ends:
    return Ends(capsys)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning may leave its logs where a command is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(tmp_path / "toy.yaml")


def assert_one_sentence(status: int, err: str, *parts: str) -> None:
    assert status in (1, 2)
    assert err.count("\n") == 1
    assert err.startswith("lightning-unlearn")
    assert err.endswith((".\n", "…\n"))
    for part in parts:
        assert part in err


# ---------------------------------------------------------------------- help


def imported_by(arguments: Sequence[str], first: str = "") -> set[str]:
    """Top-level modules that a command adds to a fresh interpreter after the line ``first``."""
    script = f"""
import json, sys
{first}
before = set(sys.modules)
from lightning_unlearn.command_line.cli import main
try:
    main({list(arguments)!r})
except SystemExit:
    pass
print(json.dumps(sorted({{name.split(".")[0] for name in set(sys.modules) - before}})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_top_level_help_imports_neither_torch_nor_lightning_nor_a_parser() -> None:
    added = imported_by(["--help"])
    assert "lightning_unlearn" in added
    assert not added & {"torch", "lightning", "jsonargparse", "numpy", "yaml"}


def test_help_of_report_imports_no_torch() -> None:
    added = imported_by(["report", "--help"])
    assert "jsonargparse" in added
    assert not added & {"torch", "lightning"}


def test_help_of_fit_imports_nothing_heavy_beyond_lightning_itself() -> None:
    added = imported_by(["fit", "--help"], first="import lightning.pytorch.cli")
    assert "lightning_unlearn" in added
    assert not added & {"diffusers", "transformers", "matplotlib", "pandas", "PIL", "jinja2", "pytorch_lightning"}


def test_help_names_every_command_and_every_ready_config(ends: Ends) -> None:
    status, out, _ = ends("--help")
    assert status == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert "mscoco.yaml, sample.yaml, train_mscoco.yaml, train_sample.yaml" in out
    assert ends()[1] == out


def test_version(ends: Ends) -> None:
    assert ends("--version")[:2] == (0, f"lightning-unlearn {lightning_unlearn.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_a_config_and_prints_one(command: str, ends: Ends, config: str) -> None:
    status, out, _ = ends(command, "--help")
    assert status == 0
    assert "lightning-unlearn" in out.splitlines()[0]
    assert all(option in out for option in ("--config", "--print_config"))
    given = {"report": ["--top", "7"], "race": ["--top", "7"], "prepare": ["--output", "shards"]}.get(
        command, ["--config", config]
    )
    status, out, _ = ends(command, *given, "--print_config")
    assert status == 0
    printed = yaml.safe_load(out)
    wanted = {"report": ("top", 7), "race": ("top", 7), "prepare": ("output", "shards")}.get(
        command, ("seed_everything", 0)
    )
    assert printed[wanted[0]] == wanted[1]


def test_printed_config_is_one_that_gives_the_same_again(ends: Ends, config: str, tmp_path: Path) -> None:
    _, once, _ = ends("attribute", "--config", config, "--print_config")
    (tmp_path / "printed.yaml").write_text(once)
    _, twice, _ = ends("attribute", "--config", tmp_path / "printed.yaml", "--print_config")
    assert yaml.safe_load(once) == yaml.safe_load(twice)
    assert yaml.safe_load(once)["model"]["init_args"]["views"]["timesteps"] == 2


def test_environment_is_left_as_it_was(ends: Ends, config: str) -> None:
    before = dict(os.environ)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in before
    ends("attribute", "--config", config, "--print_config")
    assert dict(os.environ) == before


# ---------------------------------------------------------------------- what wrong options get


def test_unknown_command_gets_one_sentence_with_the_known_ones(ends: Ends) -> None:
    status, _, err = ends("atribute")
    assert_one_sentence(status, err, "'atribute'", *COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_option_gets_one_sentence(command: str, ends: Ends) -> None:
    given = ["--output", "x"] if command == "prepare" else []
    status, _, err = ends(command, *given, "--nonsense", "3")
    assert_one_sentence(status, err, "--nonsense")


def test_a_config_without_its_option_is_told_it(ends: Ends) -> None:
    assert_one_sentence(*ends("attribute", "your.yaml")[::2], "write --config your.yaml")
    assert_one_sentence(*ends("attribute")[::2], "data, model", "--config sample.yaml")
    assert_one_sentence(*ends("fit")[::2], "fit.data, fit.model", "--config sample.yaml")


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_config_file_gets_one_sentence(command: str, ends: Ends, tmp_path: Path) -> None:
    status, _, err = ends(command, "--config", tmp_path / "nowhere.yaml")
    assert_one_sentence(status, err, "nowhere.yaml", "does not exist", f"{command} --help")


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--data.init_args.draws", "many", ["data.draws", "whole number", "many"]),
        ("--model.init_args.nonsense", "1", ["model", "nonsense"]),
        ("--model.init_args.network.init_args.nonsense", "1", ["model.network", "nonsense"]),
        ("--model.init_args.views.timesteps", "few", ["model.views", "timesteps", "few"]),
        (
            "--model.init_args.strategy",
            "Newtron",
            ["model.strategy", "no class Newtron", "Newton, Penalised"],
        ),
        ("--model", "Unlearned", ["model", "Unlearned"]),
        ("--model.init_args.views", "few", ["'few' is nothing that it takes", "--….views.NAME VALUE"]),
        ("--data.init_args.on_bad_sample", "hide", ["data.on_bad_sample", "Expected one of 'error', 'skip'", "hide"]),
        ("--method.ridge", "1", ["auto has no settings here", "--method NAME"]),
        ("--top", "0", ["--top must be at least 1"]),
        ("--trainer.accelerator", "gpu", ["No supported gpu backend found."]),
        # As a YAML file says it: jsonargparse then gives more reasons than one.
        ("--model.init_args.strategy", "{class_path: Newtron}", ["no class Newtron; take Mirrored, "]),
    ],
)
def test_wrong_value_gets_one_sentence_that_names_the_option(
    option: str, value: str, parts: list[str], ends: Ends, config: str
) -> None:
    status, _, err = ends("attribute", "--config", config, option, value)
    assert_one_sentence(status, err, *parts)
    assert len(err) < 400


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        # Refused by the constructors of views, strategy, network and Trainer, which jsonargparse wraps.
        ("--model.init_args.views.timesteps", "0", ["at least one timestep"]),
        ("--model.init_args.strategy", "{class_path: Newton, init_args: {alpha: 1}}", ["alpha and N"]),
        ("--model.init_args.network.init_args.norm_num_groups", "3", ["UNet2DConditionModel", "num_groups (3)"]),
        ("--model.init_args.weights", "nowhere.ckpt", ["nowhere.ckpt"]),
        ("--model.init_args.parameters", "text_qv", ["text_qv", "text_kv"]),
        ("--data.init_args.draws", "0", ["draws"]),
        ("--trainer.accelerator", "tpu", ["torch_xla"]),
        ("--trainer.profiler", "nonsense", ["profiler"]),
        ("--rule", "best", ["best", "difference", "ratio"]),
        ("--flips", "both", ["both", "max", "mean"]),
        # Shown by the run itself.
        ("--model.init_args.fisher", "nowhere.safetensors", ["nowhere.safetensors"]),
        ("--data.init_args.shards", "nowhere", ["nowhere"]),
        ("--data.init_args.query_keys", "[nobody]", ["nobody"]),
        ("--trainer.gradient_clip_val", "1.0", ["gradient_clip_val"]),
        ("--trainer.fast_dev_run", "true", ["fast_dev_run"]),
        ("--data", "{class_path: TrainingDataModule, init_args: {shards: x}}", ["AttributionDataModule"]),
    ],
)
def test_what_can_not_be_used_gets_one_sentence(
    option: str, value: str, parts: list[str], ends: Ends, config: str
) -> None:
    quiet = ["--trainer.enable_progress_bar", "false"]
    status, _, err = ends("attribute", "--config", config, *quiet, option, value)
    assert_one_sentence(status, err, *parts)


def test_output_that_can_not_be_made_shows_before_long_work(ends: Ends, config: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, out, err = ends("attribute", "--config", config, "--output", tmp_path / "file" / "run")
    assert_one_sentence(status, err, "file/run", "--output")
    assert "Unlearning" not in out


def test_deltas_that_can_not_be_written_get_one_sentence(ends: Ends, config: str, tmp_path: Path) -> None:
    # As a full disk does it, but for this process only.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        quiet = ("--trainer.enable_progress_bar", "false")
        status, _, err = ends("attribute", "--config", config, "--output", tmp_path / "run", *quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_sentence(status, err, "deltas.ckpt", "free the disk")
    assert not list((tmp_path / "run").glob("*.ckpt"))


def test_device_without_memory_gets_one_sentence_with_the_remedy() -> None:
    from lightning_unlearn.command_line.trainer_cli import one_sentence

    with pytest.raises(InputError, match="smaller batch_size"), one_sentence():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_checkpoint_that_is_missing_unsafe_or_of_something_else_gets_one_sentence(
    command: str, ends: Ends, config: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": {"lr": 1.0}}, tmp_path / "training.ckpt")
    torch.save({"code": Path("x")}, tmp_path / "unsafe.ckpt")
    for name, part in (
        ("missing", "no checkpoint"),
        ("training", "holds no deltas"),
        ("unsafe", "without running code"),
    ):
        status, _, err = ends(command, "--config", config, "--ckpt_path", tmp_path / f"{name}.ckpt")
        assert_one_sentence(status, err, f"{name}.ckpt", part)


def test_interrupt_ends_without_a_stack_trace(ends: Ends, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_unlearn.command_line.report_command.report", interrupted)
    assert ends("report") == (130, "", "lightning-unlearn: stopped.\n")


def test_sentence_of_a_union_is_the_reason_at_its_bottom() -> None:
    tree = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning.LightningModule'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'somebody.Module':
        Parser key "views":
          - Expected a path but {} either not accessible or invalid
          Option 'nonsense' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'class_path': 'somebody.Module'}"""
    assert sentence(tree) == "model.views: Option 'nonsense' is not accepted"
    assert sentence("unrecognized arguments: --x") == "unrecognized arguments: --x"


# ---------------------------------------------------------------------- the other class tree


@pytest.mark.parametrize("command", ["fit", "attribute"])
def test_module_of_pytorch_lightning_gets_one_sentence_with_the_remedy(
    command: str, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"others_{command}.py").write_text(
        "import pytorch_lightning as pl\n\n"
        "class Module(pl.LightningModule):\n    pass\n\nclass Back(pl.Callback):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    theirs = {"model": {"class_path": f"others_{command}.Module"}}
    path = write_config(tmp_path / "others.yaml", {**toy_config(), **theirs})
    status, _, err = ends(command, "--config", path)
    assert_one_sentence(status, err, f"others_{command}.Module", "pytorch_lightning", "import lightning.pytorch")
    path = write_config(tmp_path / "toy.yaml")
    status, _, err = ends(command, "--config", path, "--trainer.callbacks", f"others_{command}.Back")
    assert_one_sentence(status, err, f"others_{command}.Back", "import lightning.pytorch")


def test_classes_of_lightning_are_not_foreign() -> None:
    import lightning.pytorch  # noqa: F401

    assert foreign_class("Import path lightning.pytorch.LightningModule is no Callback, nor is nowhere.Thing") is None


# ---------------------------------------------------------------------- report and prepare


def test_report_without_a_run_gets_one_sentence(ends: Ends, tmp_path: Path) -> None:
    status, _, err = ends("report", "--folder", tmp_path)
    assert_one_sentence(status, err, str(tmp_path), "attribute")


def test_prepare_makes_shards_that_can_be_read_of_ready_arrays(ends: Ends, tmp_path: Path) -> None:
    latents = np.random.default_rng(0).standard_normal((5, *LATENT)).astype(np.float32)
    text = np.random.default_rng(1).standard_normal((5, TOKENS, DIM)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    np.save(tmp_path / "text.npy", text)
    captions = [f"caption {number}" for number in range(5)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    options = {"latents": "latents.npy", "text": "text.npy", "captions": "captions.json", "output": "shards"}
    (tmp_path / "prepare.yaml").write_text(
        yaml.safe_dump({name: str(tmp_path / path) for name, path in options.items()})
    )
    status, out, _ = ends(
        "prepare", "--config", tmp_path / "prepare.yaml", "--samples_per_shard", "2", "--dtype", "float32"
    )
    assert status == 0
    assert out.splitlines()[-1] == f"5 samples in 3 shards written to {tmp_path / 'shards'}."
    samples = sorted(
        (sample for shard in list_shards(str(tmp_path / "shards")) for sample in read_samples(shard)),
        key=lambda sample: sample.key,
    )
    assert [sample.captions for sample in samples] == [[caption] for caption in captions]
    np.testing.assert_array_equal(torch.stack([sample.latent for sample in samples]).numpy(), latents)
    np.testing.assert_array_equal(torch.stack([sample.text[0] for sample in samples]).numpy(), text)
    status, _, err = ends("prepare", "--config", tmp_path / "prepare.yaml")
    assert_one_sentence(status, err, "is done already", "5 samples in 3 shards")
