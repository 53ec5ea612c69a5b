"""On a GPU everything gives what it gives on the CPU, but for rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_runs import random_fisher, trainer
from toys import ToyDenoiser, ToyObjective, toy_shards

from lightning_unlearn.baselines import DTRAK, TRAK, Baseline, GradientSimilarity, Influence, Subject
from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.datamodules import AttributionDataModule, TrainingDataModule
from lightning_unlearn.draws.views import Views
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.strategies import Mirrored, Newton, Penalised, Strategy
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.module import UnlearningModule

# Named by hand, so that what is compared can be tried where there is no GPU: there it agrees with itself.
DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="compares a GPU with the CPU, and there is none"
)
STRATEGIES: dict[str, Strategy] = {
    "newton": Newton(target_increase=0.1),
    "steps": Newton(steps=3, target_increase=0.1),
    "penalised": Penalised(N=1000, steps=5, target_increase=1e-3),
    "mirrored": Mirrored(steps=5, lr=1e-3, null_loss=3.0),
}
RIVALS: dict[str, Baseline] = {
    "gradient_similarity": GradientSimilarity(),
    "influence": Influence(),
    "trak": TRAK(1.0),
    "d_trak": DTRAK(1.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerator")
    toy_shards(folder / "train", 6, 3)
    toy_shards(folder / "queries", 2, 2, captions=2, prefix="query")
    return folder


def on(device: str) -> dict[str, Any]:
    return {"accelerator": "gpu" if device == "cuda" else "cpu"}


def parts(folder: Path, **settings: Any) -> tuple[UnlearningModule, AttributionDataModule]:
    network = ToyDenoiser().double()
    defaults = {"fisher": random_fisher(network, "all"), "parameters": "all", "views": Views(3)}
    module = UnlearningModule(network, ToyObjective(), **{**defaults, **settings})
    data = AttributionDataModule(str(folder / "train"), str(folder / "queries"), draws=8, draw_batch_size=4)
    return module, data


def deviations(folder: Path, strategy: Strategy, device: str) -> torch.Tensor:
    module, data = parts(folder, strategy=strategy)
    run = trainer(folder, **on(device))
    run.fit(module, data)
    found: Any = run.predict(module, data)
    return torch.cat([(one.unlearned - one.base).flatten(2).cpu() for one in found], 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_queries_are_unlearned_and_samples_scored_alike(name: str, folder: Path) -> None:
    here, there = (deviations(folder, STRATEGIES[name], device) for device in ("cpu", DEVICE))
    assert float(here.abs().min()) > 0
    assert float((there - here).norm()) <= 1e-5 * float(here.norm())


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_score_alike(name: str, folder: Path) -> None:
    found = []
    for device in ("cpu", DEVICE):
        module, data = parts(folder)
        data.setup("predict")
        fisher = random_fisher(module.network, "all")
        module.loss.to(device).eval()
        subject = Subject(module.loss, module.layers, module.views, data.queries, data.predict_dataloader, fisher)
        found.append(RIVALS[name].scores(subject))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9 * float(found[0].abs().max()))


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_a_fisher_is_that_of_the_same_draws(kind: Any, folder: Path, tmp_path: Path) -> None:
    class OnTheCPU(FisherPass):
        """Draws where the same numbers come wherever it runs."""

        def _draw(self, batch: Any) -> Any:
            views, *_ = super()._draw(batch)
            generator = torch.Generator().manual_seed(len(batch.keys))
            timesteps = torch.randint(0, self.objective.num_timesteps, (len(batch),), generator=generator)
            noise = torch.randn(batch.latents.shape, generator=generator, dtype=torch.float64)
            return views, timesteps.to(self.device), noise.to(batch.latents)

    class Wide(TrainingDataModule):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            batch.latents, batch.text = batch.latents.double(), batch.text.double()
            return batch

    found = []
    for device in ("cpu", DEVICE):
        module = OnTheCPU(ToyDenoiser().double(), ToyObjective(), "all")
        path = tmp_path / f"{device}-{kind}.safetensors"
        accumulator = FisherAccumulator("network", "all", kind, str(path))
        data = Wide(str(folder / "train"), batch_size=3, shuffle=1)
        trainer(tmp_path, accumulator, max_epochs=2, **on(device)).fit(module, data)
        fisher = load_fisher(path)
        fisher.finalize(0.1)
        weights = {name: torch.ones(1, *value.shape) for name, value in ToyDenoiser().double().named_parameters()}
        found.append(fisher.precondition(weights))
    for name, rows in found[0].items():
        assert float((found[1][name] - rows).norm()) <= 1e-4 * float(rows.norm()), name
