"""The example of the README, run as it stands, where its files lie."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_toys import SAMPLES, run, toy_config, toy_folder, write_config
from diffusers import DDPMScheduler
from toys import tiny_unet

from lightning_unlearn.fingerprints import tensors_digest
from lightning_unlearn.objective import DenoisingObjective
from lightning_unlearn.scores import read_scores

README = Path(__file__).parents[2] / "README.md"
SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "scaled_linear"}
PYTHON_EXAMPLE = """\
from lightning.pytorch import Trainer

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.module import UnlearningModule
from lightning_unlearn.scores import read_scores

# Network and noise schedule of a diffusers folder, weights of your own run, the Fisher that its callback left.
module = UnlearningModule("pipeline", weights="last.ckpt", prefix="unet.", fisher="fisher.safetensors")
data = AttributionDataModule(shards="shards", queries="queries")
trainer = Trainer(callbacks=[ScoreWriter("attribution")])
trainer.fit(module, data)  # unlearns the queries
trainer.predict(module, data)  # scores every training image
scores = read_scores("attribution")
for query in scores.queries:
    print(query, scores.top(query, 12))
"""


def example() -> str:
    """The block of Python under the README's heading "From Python"."""
    found = re.search(r"^#+ From Python\n.*?^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return PYTHON_EXAMPLE if found[1] == "PLACEHOLDER\n" else found[1]


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
    init["objective"] = {"class_path": "DenoisingObjective", "init_args": {"scheduler": SCHEDULE}}
    content["data"]["init_args"]["draws"] = 128
    for name in ("views", "rise_draws"):
        del init[name]
    config = write_config(tmp_path / "same.yaml", content)
    quiet = ("--trainer.enable_progress_bar", "false")
    run("fisher", "--config", config, "--passes", "2", "--output", "fisher.safetensors", *quiet)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*(many workers|eval mode|max_epochs|LeafSpec|tensorboardX).*")
def test_example_of_the_readme_does_what_the_command_line_does(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = example()
    assert len([line for line in code.splitlines() if line and not line.startswith(("#", "from", "import"))]) <= 10
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    said = capsys.readouterr().out
    table = read_scores(place / "attribution")
    assert len(table.keys) == SAMPLES
    for query in table.queries:
        assert f"{query} {table.top(query, 12)}" in said
    weights = torch.load(place / "last.ckpt", weights_only=True)["state_dict"]
    network = {name.removeprefix("unet."): value for name, value in weights.items() if name.startswith("unet.")}
    assert table.run["fingerprints"]["weights"] == tensors_digest(network)
    assert table.run["unlearning"]["objective"] == DenoisingObjective(dict(SCHEDULE)).settings()
    run(
        *("attribute", "--config", "same.yaml", "--output", "commanded", "--trainer.enable_progress_bar", "false"),
        *("--model.init_args.fisher", "fisher.safetensors", "--data.init_args.draw_batch_size", "32"),
        *("--data.init_args.batch_size", "64"),
    )
    theirs = read_scores(place / "commanded")
    assert theirs.keys == table.keys
    deviation = theirs.scores.std(0)
    assert (deviation > 0).all()
    assert (np.abs(table.scores - theirs.scores).max(0) <= 1e-4 * deviation).all()
