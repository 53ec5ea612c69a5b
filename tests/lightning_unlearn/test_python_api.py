"""The example of README and docs, run as it stands, where its files lie."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import SAMPLES, run, toy_config, toy_folder, write_config
from diffusers import DDPMScheduler
from toys import tiny_unet

from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.scores.files import read_scores

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "attribute.md"
RISE = 0.1
SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear"}


def example() -> str:
    """The block of Python under the docs' heading "From Python", which stands in the README, too."""
    found = re.search(r"^#+ From Python\n.*?^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[1] in README.read_text()
    return found[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the example names, as a user's training leaves it."""
    toys = toy_folder()
    (tmp_path / "shards").symlink_to(toys / "train")
    (tmp_path / "queries").symlink_to(toys / "queries")
    # Other weights than those of the checkpoint.
    tiny_unet().save_pretrained(tmp_path / "pipeline" / "unet")
    DDPMScheduler(**SCHEDULE).save_pretrained(tmp_path / "pipeline" / "scheduler")
    weights = torch.load(toys / "network.pt", weights_only=True)
    state = {f"unet.{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": {**state, "head.weight": torch.ones(1)}}, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    content = toy_config()
    init = content["model"]["init_args"]
    init["strategy"] = {"class_path": "Newton", "init_args": {"target_increase": RISE}}
    init["objective"] = {"class_path": "DenoisingObjective", "init_args": {"scheduler": SCHEDULE}}
    content["data"]["init_args"]["draws"] = 128
    for name in ("views", "rise_draws"):
        del init[name]
    config = write_config(tmp_path / "same.yaml", content)
    quiet = ("--trainer.enable_progress_bar", "false")
    run("fisher", "--config", config, "--passes", "2", "--kind", "diagonal", "--output", "fisher.safetensors", *quiet)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*(many workers|eval mode|max_epochs|LeafSpec|tensorboardX).*")
def test_example_of_the_readme_does_what_the_command_line_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = example()
    assert len([line for line in code.splitlines() if line and not line.startswith(("#", "from", "import"))]) <= 10
    capsys.readouterr()
    # The loss of a network that never was trained can't be doubled, which is the default.
    plain, smaller = (
        'fisher="fisher.safetensors")',
        f'fisher="fisher.safetensors", strategy=Newton(target_increase={RISE}))',
    )
    assert code.count(plain) == 1
    code = "from lightning_unlearn.strategies import Newton\n" + code.replace(plain, smaller)
    exec(compile(code, "attribute.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out
    table = read_scores(place / "attribution")
    assert len(table.keys) == SAMPLES
    for query in table.queries:
        assert f"{query} {table.top(query, 12)}" in said
    assert table.run["unlearning"]["objective"] == DenoisingObjective(dict(SCHEDULE)).settings()
    run(
        *("attribute", "--config", "same.yaml", "--output", "commanded", "--trainer.enable_progress_bar", "false"),
        *("--model.init_args.fisher", "fisher.safetensors", "--data.init_args.draw_batch_size", "32"),
        *("--data.init_args.batch_size", "64"),
    )
    theirs = read_scores(place / "commanded")
    # The weights are those of the checkpoint, not those of the pipeline's folder, and the Fisher is the file's.
    assert theirs.run["fingerprints"]["fisher"] == table.run["fingerprints"]["fisher"]
    assert theirs.keys == table.keys
    deviation = theirs.scores.std(0)
    assert (deviation > 0).all()
    assert (np.abs(table.scores - theirs.scores).max(0) <= 1e-4 * deviation).all()
