"""The program itself, in processes of its own, as the installed entry point starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_toys import SAMPLES, run, run_program, toy_config, toy_folder, write_config
from lightning.pytorch import Trainer
from processes import run_ranks
from toys import LATENT, tiny_unet

import lightning_unlearn.__main__
from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.fingerprints import seed_of
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.training import FisherPass

QUIET = ["--trainer.enable_progress_bar", "false"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]

# Advice on loaders and steps is Lightning's to give where a test makes a Trainer itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|eval mode|max_epochs|LeafSpec|returned `None`).*")

OBJECTIVE = "from lightning_unlearn import DenoisingObjective\n\n\nclass Mine(DenoisingObjective):\n    pass\n"


def rounding_of_a_loss() -> float:
    """How far a loss and its gradient are off in float32, relative to their sizes.

    A dot product of n terms is off by √n units of its terms by chance (Higham and Mary, SIAM J. Sci. Comput. 41, 2019),
    of which 8 are never seen; those of all layers are passed one after the other, forward and back, and a weight's
    gradient is a sum over positions and draws.
    """
    network = tiny_unet()
    terms = 2 * sum(weight[0].numel() for weight in network.parameters() if weight.ndim > 1)
    terms += LATENT[1] * LATENT[2] * 6
    return float(8 * terms**0.5 * np.finfo(np.float32).eps / 2)


def test_attribute_in_two_processes_gives_the_same_scores_and_says_everything_once(tmp_path: Path) -> None:
    content = toy_config()
    # A step of weights that this network's loss depends on, well within the range in which it is about linear. Its
    # preconditioning, by the identity, has a condition of 1, and multiplies no rounding.
    rise = 0.02
    content["model"]["init_args"] |= {"parameters": ["conv_in", "conv_out"], "fisher": "identity"}
    content["model"]["init_args"]["strategy"] = {"class_path": "Newton", "init_args": {"target_increase": rise}}
    run("attribute", "--config", write_config(tmp_path / "toy.yaml", content), "--output", tmp_path / "one", *QUIET)
    # A class of the user's own lies where the program is started, as it does for a script.
    (tmp_path / "users_objective.py").write_text(OBJECTIVE)
    content["model"]["init_args"]["objective"] = {"class_path": "users_objective.Mine"}
    config = write_config(tmp_path / "mine.yaml", content)
    done = run_program("attribute", "--config", config, "--output", "two", *TWO, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = read_scores(tmp_path / "one"), read_scores(tmp_path / "two")
    assert two.run["world_size"] == 2
    assert two.run["unlearning"]["objective"]["class"] == "users_objective.Mine"
    assert (two.keys, two.queries) == (one.keys, one.queries)
    deviation = one.scores.std(0)
    assert (deviation > 0).all()
    assert all(result["length"] < 0.5 for result in one.run["targets"].values())
    # A score is a loss under the delta relative to that without it. It is rounded as losses are; the delta's direction
    # as gradients are, which moves a score by its own size, no more than the loss; and its length as the query's rise,
    # a difference of losses, is rounded: by as much over the rise, and with it all scores.
    off = rounding_of_a_loss() * (2 + np.abs(one.scores).max(0) / rise)
    assert (np.abs(two.scores - one.scores).max(0) <= off).all()
    assert (off < deviation / 2).all()  # so that scores of other samples would not pass
    for line in (
        "Unlearning 2 queries with 6 draws each on cpu …",
        "Deltas: two/deltas.ckpt",
        f"Scoring {SAMPLES} samples in 5 shards on cpu …",
        "Report: two/report.html",
    ):
        assert done.stdout.splitlines().count(line) == 1
    noise = (
        "Warning",
        "warn(",
        "Tip",
        "sync_dist",
        "deprecated",
        "max_epochs",
        "eval mode",
        "workers",
        "args parameter",
    )
    assert [word for word in noise if word in done.stdout + done.stderr] == []


class OneRanksPass(FisherPass):
    """A Fisher pass as one of two ranks makes it."""

    def __init__(self, rank: int) -> None:
        network = load_network(tiny_unet(), str(toy_folder() / "network.pt"))
        super().__init__(network, DenoisingObjective(), "text_kv")
        self.rank = rank

    def on_train_start(self) -> None:
        super().on_train_start()
        torch.manual_seed(seed_of("fisher", 0, self.rank))


class OneRanksData(TrainingDataModule):
    """The batches that one of two ranks sees."""

    def __init__(self, rank: int) -> None:
        super().__init__(str(toy_folder() / "train"), batch_size=4, every_sample=True)
        self.rank = rank

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        loader.stream.rank, loader.stream.world_size, loader.stream.steps = self.rank, 2, SAMPLES // 8  # whole batches
        return loader


def test_fisher_in_two_processes_sums_over_ranks(tmp_path: Path) -> None:
    config = write_config(tmp_path / "toy.yaml")
    options = ("--passes", "1", "--kind", "diagonal", "--output", "fisher.safetensors")
    run_ranks(
        lightning_unlearn.__main__.__file__, "fisher", "--config", config, *options, *QUIET, *TWO, folder=tmp_path
    )
    fisher = load_fisher(str(tmp_path / "fisher.safetensors"))
    assert fisher.count == SAMPLES
    expected: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        path = str(tmp_path / f"rank-{rank}.safetensors")
        accumulator = FisherAccumulator("network", fisher="diagonal", path=path)
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[accumulator], enable_model_summary=False, **off)
        trainer.fit(OneRanksPass(rank), OneRanksData(rank))
        for name, total in load_fisher(str(tmp_path / f"rank-{rank}.safetensors")).tensors().items():
            expected[name] = expected.get(name, 0) + total
    for name, total in fisher.tensors().items():
        torch.testing.assert_close(total, expected[name], rtol=1e-5, atol=0)
