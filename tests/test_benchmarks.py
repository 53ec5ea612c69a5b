"""The scripts of ``benchmarks/``: imports lead round in no circle, committed files stay, stacks train as one does."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from lightning_unlearn.command_line.retraining_cli import RetrainingCLI
from lightning_unlearn.data.shards import encode_sample, npy_bytes, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.evaluation import Run, fit_run
from lightning_unlearn.evaluation.runs import without
from lightning_unlearn.training import DiffusionModule

SCRIPTS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The scripts that one imports, within its functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    named |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named & SCRIPTS.keys()


def test_no_script_imports_in_a_circle() -> None:
    order = [*TopologicalSorter({name: imports_of(path) for name, path in SCRIPTS.items()}).static_order()]
    assert order.index("benches") < order.index("judged") < order.index("bench")


def test_reading_a_packed_study_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever judges a bench leaves its committed files as they are."""
    monkeypatch.syspath_prepend(str(SCRIPTS["packed"].parent))
    benches, packed = (importlib.import_module(name) for name in ("benches", "packed"))
    bench = benches.Bench("digits")
    path = bench.folder / "study" / "study.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert packed.open_study(bench).packed
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


STACKED = """\
seed_everything: 0
model:
  class_path: lightning_unlearn.DiffusionModule
  init_args:
    network:
      class_path: diffusers.SD3Transformer2DModel
      init_args: {sample_size: 4, patch_size: 2, in_channels: 3, out_channels: 3, num_layers: 2, num_attention_heads: 2,
        attention_head_dim: 4, joint_attention_dim: 6, caption_projection_dim: 8, pooled_projection_dim: 6,
        pos_embed_max_size: 4, qk_norm: rms_norm}
    objective:
      class_path: lightning_unlearn.FlowMatchingObjective
      init_args: {scheduler: {shift: 1.0}, density: logit_normal}
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data:
  class_path: lightning_unlearn.TrainingDataModule
  init_args: {shards: SHARDS, batch_size: 3, samples_per_epoch: 9, cache: true}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 3
  gradient_clip_val: 0.5
  logger: false
  callbacks:
    - {class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.5}}
"""


def test_a_stack_of_flows_is_trained_as_each_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint attention, pooled text and a density of timesteps: the weights are those of Lightning's own training."""
    monkeypatch.syspath_prepend(str(SCRIPTS["stacked"].parent))
    stacked = importlib.import_module("stacked")
    generator = np.random.default_rng(0)
    fields = []
    for number in range(6):
        text = generator.normal(size=(1, 2, 6)).astype(np.float32)
        latent = generator.normal(size=(3, 4, 4)).astype(np.float32)
        pooled = {"pooled.npy": npy_bytes(text.mean(1))}
        fields.append(encode_sample(f"icon-{number}", latent, text, {"captions": [f"icon {number}"]}) | pooled)
    write_shards(fields, tmp_path / "shards", samples_per_shard=3)
    path = tmp_path / "train.yaml"
    path.write_text(STACKED.replace("SHARDS", str(tmp_path / "shards")))
    shards = sorted(list_shards(str(tmp_path / "shards")), key=lambda shard: shard.url)
    samples = [sample for shard in shards for sample in read_samples(shard)]
    keys = [sample.key for sample in samples]
    cli = RetrainingCLI("evaluate", ["--config", str(path)], "Bench")
    runs = [Run(seed=1), without(keys[:2], seed=2)]
    recorded = [stacked.record(cli, run, keys) for run in runs]
    _, weights = stacked.train(cli, recorded, samples, "cpu")
    for place, (run, one) in enumerate(zip(runs, recorded, strict=True)):
        alone = cast("DiffusionModule", fit_run(lambda run: cli.build(run, keys), run)).network.state_dict()
        for name, stack in weights.items():
            way = (alone[name] - one.state[name]).norm()
            assert (stack[place] - alone[name]).norm() <= 1e-3 * way + 1e-7, name
        moved = [name for name in weights if not torch.equal(alone[name], one.state[name])]
        assert len(moved) > len(weights) / 2
