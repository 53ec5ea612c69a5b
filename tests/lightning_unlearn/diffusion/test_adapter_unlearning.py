"""A, B alone are unlearned, on a frozen base; a Fisher of a PEFT training needs no pattern."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import adapter_forms as forms
import pytest
import torch
from attribution_runs import decoded, ragged_fields, random_fisher, score, toy_data, unlearn
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import tiny_unet, toy_shards

from lightning_unlearn.baselines import Subject
from lightning_unlearn.baselines.gradients import batch_gradients
from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.diffusion.adapters import load_adapter
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.strategies import Newton
from lightning_unlearn.training import DiffusionModule
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.deltas import NetworkLoss
from lightning_unlearn.weights.parameters import layer_parameters, select_layers

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAYERS = [f"{ATTENTION}.to_k", f"{ATTENTION}.to_v"]
WEIGHTS = {f"{layer}.lora_{part}.default" for layer in LAYERS for part in "AB"}


@pytest.fixture(params=[False, True], ids=["lora", "dora"])
def lora(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    adapter = forms.random_adapter(tiny_unet(), LAYERS, dora=request.param)
    return forms.save(tmp_path / "lora.safetensors", forms.kohya_state(adapter))


def network(lora: str) -> nn.Module:
    found = tiny_unet()
    load_adapter(found, lora)
    return found


def module(lora: str, **settings: Any) -> UnlearningModule:
    defaults: dict[str, Any] = {
        "network": tiny_unet(),
        "objective": DenoisingObjective(),
        "adapter": lora,
        "parameters": "adapter",
        "fisher": random_fisher(network(lora), "adapter"),
        "strategy": Newton(alpha=1.0, N=20),
        "views": Views(2),
    }
    return UnlearningModule(**{**defaults, **settings})


def test_selection_is_the_adapters_weights_and_nothing_else(lora: str) -> None:
    assert set(select_layers(network(lora), "adapter")) == WEIGHTS
    assert set(select_layers(network(lora), "auto")) == WEIGHTS
    with pytest.raises(InputError, match="no adapter whose weights could be chosen"):
        select_layers(tiny_unet(), "adapter")
    for selection in ("text_kv", "all"):
        with pytest.raises(InputError, match=f"'{selection}' is of networks without one; choose `adapter`"):
            select_layers(network(lora), selection)


def test_adapter_alone_is_unlearned(lora: str, tmp_path: Path) -> None:
    toy_shards(tmp_path / "train", 4, 2)
    toy_shards(tmp_path / "queries", 2, 2, prefix="query")
    found = module(lora)
    before = {name: value.clone() for name, value in found.network.state_dict().items()}
    unlearn(found, toy_data(tmp_path, draws=4))
    assert found.deltas is not None
    deltas = found.deltas.named()
    assert {name.removesuffix(".weight") for name in deltas} == WEIGHTS
    # Both parts: with B far from zero A has a gradient, too.
    assert all(bool(delta.any()) for delta in deltas.values())
    assert all(torch.equal(value, before[name]) for name, value in found.network.state_dict().items())
    score(found, toy_data(tmp_path, draws=4), tmp_path / "scores", None)
    scores = read_scores(str(tmp_path / "scores")).scores
    assert bool(torch.as_tensor(scores).isfinite().all())


def test_merged_adapter_is_a_network_without_one(lora: str) -> None:
    found = module(lora, merge=True, parameters="text_kv", fisher="identity")
    assert all("lora" not in name for name in found.layers)
    sample = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.ones(1, 4, 6), "return_dict": False}
    with torch.no_grad():
        ours, theirs = (one(sample, 5, **inputs)[0] for one in (found.network, network(lora)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_fingerprint_knows_the_scale(tmp_path: Path) -> None:
    weights = forms.random_adapter(tiny_unet(), LAYERS)
    paths = []
    for number, alpha in enumerate((2.0, 1.0, 2.0)):
        adapter = {name: one._replace(alpha=alpha) for name, one in weights.items()}
        paths.append(forms.save(tmp_path / f"{number}.safetensors", forms.kohya_state(adapter)))
    marks = [module(path, fisher="identity").weights_fingerprint() for path in paths]
    assert marks[0] == marks[2] != marks[1]


def test_header_sets_the_objective_where_none_is_given(tmp_path: Path) -> None:
    state = forms.kohya_state(forms.random_adapter(tiny_unet(), LAYERS))
    path = forms.save(tmp_path / "lora.safetensors", state, {"ss_min_snr_gamma": "5"})
    found = UnlearningModule(tiny_unet(), adapter=path, parameters="adapter", fisher="identity")
    assert found.objective.settings()["snr_gamma"] == 5
    with pytest.warns(UserWarning, match="snr_gamma = 5.0, but the objective has None"):
        module(path)


class PeftTraining(LightningModule):
    """Somebody's training of a LoRA with diffusers' ``add_adapter``."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = tiny_unet().requires_grad_(False)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False)
        self.unet.add_adapter(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        latents, text = batch
        noise = torch.randn_like(latents)
        predicted = self.unet(latents + noise, 3, encoder_hidden_states=text, return_dict=False)[0]
        return (predicted - noise).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        chosen = [weight for weight in self.unet.parameters() if weight.requires_grad]
        return torch.optim.SGD(chosen, lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(8, 3, 8, 8, generator=generator)
        text = torch.randn(8, 4, 6, generator=generator)
        return DataLoader(torch.utils.data.TensorDataset(latents, text), batch_size=4)


@pytest.mark.filterwarnings("ignore:.*(many workers|max_epochs|LeafSpec|tensorboardX|litlogger).*")
def test_fisher_of_a_peft_training_takes_the_adapter_without_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    training = PeftTraining()
    kept = FisherAccumulator(target="unet", parameters="adapter", fisher="diagonal", path=str(path))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[kept], **quiet)
    trainer.fit(training)
    fisher = load_fisher(str(path))
    chosen = select_layers(training.unet, "adapter")
    assert set(fisher.layers) == set(chosen)
    assert {name.split(".")[-1] for name in chosen} == {"default"}
    # The same layers by the same names when the adapter comes back from its file.
    adapter: dict[str, forms.Adapter] = {}
    for name in (name.removesuffix(".lora_A.default") for name in chosen if "lora_A" in name):
        down, up = (training.unet.get_parameter(f"{name}.lora_{part}.default.weight").detach() for part in "AB")
        adapter[name] = forms.Adapter(down, up, 3.0, None)
    again = network(forms.save(tmp_path / "trained.safetensors", forms.kohya_state(adapter)))
    assert layer_parameters(select_layers(again, "adapter")).keys() == layer_parameters(chosen).keys()
    module(str(tmp_path / "trained.safetensors"), fisher=str(path))
    assert copy.deepcopy(again).state_dict().keys() == training.unet.state_dict().keys()


def test_base_in_half_precision_is_shown_what_it_takes(tmp_path: Path) -> None:
    adapter = forms.random_adapter(tiny_unet(), LAYERS)
    path = forms.save(tmp_path / "lora.safetensors", forms.kohya_state(adapter))
    batch = collate_samples("shard", [decoded(fields) for fields in ragged_fields(range(3))])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        network = nn.Module.to(tiny_unet(), dtype)
        load_adapter(network, path)
        network.eval().requires_grad_(False)
        loss, layers = NetworkLoss(network, DenoisingObjective()), select_layers(network, "adapter")
        subject = Subject(loss, layers, Views(timesteps=2), [], lambda: [batch])
        gradients = batch_gradients(subject, batch, "loss")
        assert {values.dtype for values in gradients.parameters.values()} == {torch.float32}
        found.append(torch.cat(list(gradients.parameters.values()), 1))
        torch.manual_seed(0)
        module = DiffusionModule(network, loss.objective)
        module.log = lambda *_, **__: None  # type: ignore[assignment]
        found.append(module.training_step(batch, 0)["loss"].detach().reshape(1, 1))
    exact, exact_loss, half, half_loss = found
    assert float(torch.cosine_similarity(exact.flatten(), half.flatten(), 0)) > 0.99
    torch.testing.assert_close(half_loss, exact_loss, rtol=0.02, atol=0)
