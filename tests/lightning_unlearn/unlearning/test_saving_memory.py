"""Weights in bfloat16, checkpointed unlearning and compiled scoring: the answers of float32, in less memory or time."""

from __future__ import annotations

from functools import partialmethod
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from attribution_runs import trainer
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from toys import ToyDenoiser, ToyObjective, tiny_unet

from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.module import UnlearningModule

SAMPLE = Path(str(files("lightning_unlearn.datamodules"))) / "sample"
CONFIG = Path(str(files("lightning_unlearn.configs"))) / "sample.yaml"


def trained() -> nn.Module:
    """The sample model: a network that learned nothing has no loss that could be raised."""
    settings = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]["network"]["init_args"]
    return load_network(UNet2DConditionModel(**settings), str(SAMPLE / "model.safetensors"))


def module(network: nn.Module | None = None, **settings: Any) -> UnlearningModule:
    defaults: dict[str, Any] = {
        "objective": DenoisingObjective({"num_train_timesteps": 1000}),
        "fisher": str(SAMPLE / "fisher.safetensors"),
        "parameters": "text_kv",
        "strategy": Newton(target_increase=0.3),
        "views": Views(2),
        "rise_draws": 4,
    }
    return UnlearningModule(network or trained(), **{**defaults, **settings})


def data() -> AttributionDataModule:
    """The 136 samples of one shard, and one query."""
    shard, queries = str(SAMPLE / "shards" / "emoji-000000.tar"), str(SAMPLE / "queries")
    return AttributionDataModule(shard, queries, query_keys=["generated-tiger"], draws=8, batch_size=136)


def deltas_of(found: UnlearningModule) -> dict[str, Tensor]:
    assert found.deltas is not None
    return {name: delta.detach().clone() for name, delta in found.deltas.named().items()}


def scores_of(found: UnlearningModule, out: Path) -> Tensor:
    here = data()
    trainer(out).fit(found, here)
    trainer(out, ScoreWriter(str(out))).predict(found, here)
    return torch.from_numpy(read_scores(out).scores).double()[:, 0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and deltas in float32."""
    found = module()
    return scores_of(found, tmp_path_factory.mktemp("plain")), deltas_of(found)


def test_weights_in_bfloat16_rank_samples_as_float32_does(tmp_path: Path, plain: Any) -> None:
    found = module(dtype="bfloat16")
    ours = scores_of(found, tmp_path)
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.bfloat16}
    assert {delta.dtype for delta in deltas_of(found).values()} == {torch.float32}
    assert spearman_corrcoef(ours, plain[0]) > 0.99
    assert read_scores(tmp_path).run["precision"] == "32-true, weights in half precision"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_computed_with_as_float32(dtype: torch.dtype) -> None:
    """Losses and their gradients are those of a float32 network with the same numbers, deltas and all."""
    rounded = nn.Module.to(tiny_unet(), dtype)
    networks = [rounded, nn.Module.to(nn.Module.to(tiny_unet(), dtype), torch.float32)]
    modules = [module(network, fisher=None, parameters="linear") for network in networks]
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    batch = ViewBatch(latents, {"text": torch.randn(4, 4, 6, generator=generator)})
    found = []
    for one in modules:
        weights = {f"{name}.weight": layer.weight.detach().float() for name, layer in one.layers.items()}
        deltas = {name: (weight[None] * 2**-14).requires_grad_() for name, weight in weights.items()}
        losses = one.loss.under(one.loss.target_weights(deltas, 0), batch, torch.tensor([1, 300, 500, 900]), noise)
        base = one.loss.under({}, batch, torch.tensor([1, 300, 500, 900]), noise)
        found.append((losses, base, *torch.autograd.grad(losses.sum(), list(deltas.values()))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert (found[0][0] != found[0][1]).all()
    assert {weight.dtype for weight in rounded.parameters()} == {dtype}


def test_checkpointed_unlearning_gives_the_same_deltas_and_keeps_less(tmp_path: Path, plain: Any) -> None:
    kept: dict[bool, int] = {}
    for checkpointing in (False, True):
        found, sizes = module(checkpointing=checkpointing), []

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer(tmp_path).fit(found, data())
        kept[checkpointing] = sum(sizes)
        assert not any(layer._forward_hooks for layer in found.layers.values())
    for name, delta in deltas_of(found).items():
        torch.testing.assert_close(delta, plain[1][name], rtol=1e-3, atol=1e-3 * float(delta.abs().max()))
    assert kept[True] < 0.7 * kept[False]


def test_checkpointing_needs_a_network_that_has_it() -> None:
    with pytest.raises(InputError, match="ToyDenoiser has no enable_gradient_checkpointing"):
        module(ToyDenoiser(), objective=ToyObjective(), parameters="all", checkpointing=True)


def test_compiled_scoring_gives_the_same_losses_under_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as ever, but run by torch's own kernels: inductor takes a minute (benchmarks/lower_precision.py)."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    found = module(tiny_unet(), fisher=None, parameters="linear")
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    batch = ViewBatch(latents, {"text": torch.randn(4, 4, 6, generator=generator)})
    weights = {f"{name}.weight": layer.weight.detach() for name, layer in found.layers.items()}
    deltas = {name: torch.stack([weight * 0.1, weight * 0.2]) for name, weight in weights.items()}

    def losses() -> Tensor:
        under = [{}, *(found.loss.target_weights(deltas, target) for target in range(2))]
        return torch.stack([found.loss.under(one, batch, torch.tensor([1, 300, 500, 900]), noise) for one in under])

    with torch.no_grad():
        plain = losses()
        found.network.compile()
        compiled = losses()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled, plain)
    assert (plain[1:] != plain[:-1]).all()


def test_compiled_scoring_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    calls: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: calls.append(type(network).__name__))
    assert torch.equal(scores_of(module(compile=True), tmp_path), plain[0])
    run = read_scores(tmp_path).run
    assert calls == ["UNet2DConditionModel"]
    assert run["precision"] == "32-true, compiled"
    assert run["rank_correlation_with_float32"] == pytest.approx(1)


def test_precision_that_gives_another_answer_is_refused(tmp_path: Path) -> None:
    """A training image's loss rises by some 1e-4 of itself, which arithmetic in bfloat16 drowns."""
    found, here = module(), data()
    trainer(tmp_path).fit(found, here)
    scoring = trainer(tmp_path, ScoreWriter(str(tmp_path)), precision="bf16-mixed")
    with pytest.raises(InputError, match=r"in bf16-mixed rank the first 136 samples .* correlation of 0\.\d+ only"):
        scoring.predict(found, here)


def test_compiling_weights_in_bfloat16_is_refused() -> None:
    with pytest.raises(InputError, match="widened layer by layer, which can't be compiled"):
        module(dtype="bfloat16", compile=True)


def test_what_a_failed_fit_had_set_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = module(checkpointing=True)
    before = torch.backends.mkldnn.matmul.fp32_precision

    def fail(*_: Any) -> None:
        raise RuntimeError("as anything may")

    monkeypatch.setattr(found, "on_train_epoch_end", fail)
    with pytest.raises(RuntimeError, match="as anything may"):
        trainer(tmp_path).fit(found, data())
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert not any(layer._forward_hooks for layer in found.layers.values())


def test_a_loss_after_a_checkpointed_pass_is_that_of_the_network() -> None:
    found = module(tiny_unet(), fisher=None, parameters="linear", checkpointing=True)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2))
    given = ViewBatch(latents, {"text": torch.randn(4, 4, 6, generator=generator)}), torch.tensor([1, 3, 5, 9]), noise
    plain = found.loss(*given)
    deltas = {f"{name}.weight": layer.weight.detach()[None] for name, layer in found.layers.items()}
    assert (found.loss.under(found.loss.target_weights(deltas, 0), *given) != plain).any()
    assert torch.equal(found.loss(*given), plain)


def test_few_samples_a_batch_are_compared_until_there_are_enough(tmp_path: Path) -> None:
    found, here = module(), data()
    trainer(tmp_path).fit(found, here)
    here.batch_size = 7
    scoring = trainer(tmp_path, ScoreWriter(str(tmp_path)), precision="bf16-mixed")
    with pytest.raises(InputError, match=r"in bf16-mixed rank the first 21 samples"):
        scoring.predict(found, here)
