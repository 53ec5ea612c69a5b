"""What a config is said to describe and to take, beside what it describes and takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from attribution_runs import decoded
from command_toys import SAMPLES, run, toy_config, write_config
from flow_pipelines import opened, write_samples
from tiny_pipelines import flux, stable_diffusion_3, stable_diffusion_xl
from torch import nn
from toys import DIM, toy_fields

from lightning_unlearn.command_line.check_costs import inputs_of, sizes_of
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.diffusion.loading import network_without_weights
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.weights.parameters import layer_specs, select_layers


def checked(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    run("check", *arguments)
    return capsys.readouterr().out


def line(page: str, label: str) -> str:
    """The line of a label."""
    found = [text for text in page.splitlines() if text.startswith(f"{label} ")]
    assert len(found) == 1, f"{label} in {page}"
    return found[0]


def test_page_of_a_whole_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = checked(capsys, "--config", write_config(tmp_path / "toy.yaml"))
    assert "Stable Diffusion 1 and 2: UNet2DConditionModel" in line(page, "model")
    assert "epsilon" in line(page, "objective")
    assert f"{SAMPLES} samples in 5 shards" in line(page, "training data")
    assert "2 queries in 2 targets" in line(page, "queries")
    assert "diagonal" in line(page, "fisher")
    assert page.count("<- chosen") == 1
    assert "missing" not in page


def test_no_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config()
    (tmp_path / "network.pt").write_bytes(b"no weights at all")
    config["model"]["init_args"]["weights"] = str(tmp_path / "network.pt")
    assert "model " in checked(capsys, "--config", write_config(tmp_path / "toy.yaml", config))


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("model", "weights", "nowhere.ckpt", "There is no weights file or folder nowhere.ckpt"),
        ("model", "network", "nowhere", "nowhere is no folder of a diffusers pipeline"),
        ("model", "parameters", ["nothing.*"], "No Linear or Conv2d layer"),
        ("data", "shards", "nowhere", "nowhere"),
        ("data", "queries", "nowhere", "nowhere"),
    ],
)
def test_what_is_missing_is_named_and_the_rest_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, name: str, value: Any, words: str
) -> None:
    config = toy_config()
    config[part]["init_args"][name] = value
    assert main(["check", "--config", write_config(tmp_path / "toy.yaml", config)]) == 1
    said = capsys.readouterr()
    assert words in line(said.out, "missing")
    assert re.search(r"\d+ things? missing", said.err)
    assert ("training data" in said.out) == (name != "shards")
    assert ("model " in said.out) == (name != "network")


def test_calls_and_files_are_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config()
    config["model"]["init_args"]["fisher"] = str(tmp_path / "fisher.safetensors")
    # Of a step of a given size nothing is searched, so that all of its calls are known before.
    config["model"]["init_args"]["strategy"] = {"class_path": "Newton", "init_args": {"alpha": 0.01, "N": 24}}
    path = write_config(tmp_path / "toy.yaml", config)
    page = checked(capsys, "--config", path, "--passes", "2")
    numbers = {name: int(re.search(r"([\d,]+) evaluations", line(page, name))[1].replace(",", "")) for name in STAGES}  # type: ignore[index]
    seen = _count_views(monkeypatch)
    run("fisher", "--config", path, "--passes", "2", "--output", tmp_path / "fisher.safetensors")
    assert seen.pop() == numbers["fisher"]
    seen.append(0)
    run("attribute", "--config", path, "--output", tmp_path / "out")
    assert sum(seen) == numbers["unlearning"] + numbers["scoring"]
    network = network_without_weights_of_toy()
    sizes = sizes_of(network, layer_specs(select_layers(network, "text_kv")))
    deltas = torch.load(tmp_path / "out" / "deltas.ckpt", weights_only=True)["state_dict"]
    assert sum(delta.numel() * 4 for delta in deltas.values()) == 2 * sizes.delta


STAGES = ("fisher", "unlearning", "scoring")


def network_without_weights_of_toy() -> nn.Module:
    from diffusers import UNet2DConditionModel

    settings = toy_config()["model"]["init_args"]["network"]["init_args"]
    with torch.device("meta"):
        network: nn.Module = UNet2DConditionModel(**settings)
    return network


def _count_views(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen = [0]
    original = DenoisingObjective.__call__

    def counted(self: DenoisingObjective, network: nn.Module, batch: Any, *others: Any) -> Any:
        seen[-1] += len(batch.latents)
        return original(self, network, batch, *others)

    monkeypatch.setattr(DenoisingObjective, "__call__", counted)
    return seen


@pytest.mark.parametrize("module", [stable_diffusion_3, flux], ids=["sd3", "flux"])
def test_flows_are_checked_from_their_folder(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = module.make(tmp_path / "pipeline")
    model = opened(folder)
    shards = write_samples(model, tmp_path / "shards", (module.CHANNELS, 8, 8))
    # FLUX.1 dev is distilled from guidance, and no file says with which it was fine-tuned.
    settings = {"scheduler": str(folder), "guidance": 1.0}
    flow = {"class_path": "FlowMatchingObjective", "init_args": settings}
    objective = {"objective": flow} if module is flux else {}
    (tmp_path / "flow.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "class_path": "UnlearningModule",
                    "init_args": {"network": str(folder), "parameters": "attention", **objective},
                },
                "data": {
                    "class_path": "AttributionDataModule",
                    "init_args": {"shards": str(shards), "queries": str(shards), "query_keys": ["sample-0"]},
                },
            }
        )
    )
    page = checked(capsys, "--config", tmp_path / "flow.yaml")
    assert model.family.title in line(page, "model")
    assert "FlowMatchingObjective" in line(page, "objective")
    assert "memory unknown" not in page
    assert "1 query in 1 target" in line(page, "queries")


# The configs of models as they were published, and how many weights they are known to have.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "SDXL": (
        {
            "_class_name": "UNet2DConditionModel",
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
        },
        2.567e9,
    ),
    "SD3.5 large": (
        {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 38,
            "num_layers": 38,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        },
        8.057e9,
    ),
    "FLUX.1 dev": (
        {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
            "pooled_projection_dim": 768,
        },
        11.90e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_at_full_size_are_weighed_from_their_config(name: str, tmp_path: Path) -> None:
    config, known = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = network_without_weights(str(tmp_path))
    assert all(parameter.is_meta for parameter in network.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(known, rel=0.005)
    specs = layer_specs(select_layers(network, "text_kv"))
    sizes = sizes_of(network, specs)
    assert sizes.network == pytest.approx(4 * known, rel=0.02)  # with the places of patches
    assert sizes.delta == 4 * sum(
        torch.Size(s).numel() for spec in specs.values() for s in spec.parameter_shapes.values()
    )
    assert family_of(network).title in ("Stable Diffusion XL", "Stable Diffusion 3", "FLUX.1")


def test_a_config_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config()
    config["data"] = {"class_path": "TrainingDataModule", "init_args": {"shards": "nowhere", "batch_size": 4}}
    assert main(["check", "--config", write_config(tmp_path / "toy.yaml", config)]) == 1
    assert "takes an AttributionDataModule as data" in capsys.readouterr().err


def test_fisher_file_holds_what_is_promised(tmp_path: Path) -> None:
    path = write_config(tmp_path / "toy.yaml")
    run("fisher", "--config", path, "--passes", "2", "--output", tmp_path / "f.safetensors")
    with safetensors.safe_open(tmp_path / "f.safetensors", "pt") as file:
        held = sum(file.get_tensor(name).numel() * 4 for name in file.keys())  # noqa: SIM118 -- no mapping
    network = network_without_weights_of_toy()
    specs = layer_specs(select_layers(network, "text_kv"))
    sample = decoded(toy_fields(0, 1))
    sizes = sizes_of(network, specs, inputs_of(network, DenoisingObjective(), sample, list(specs)))
    assert held == sizes.fisher + sizes.delta
    # All of them are fed the text, whose basis is kept once.
    assert sizes_of(network, specs).fisher - sizes.fisher == (len(specs) - 1) * 4 * DIM**2


def test_an_adapter_s_network_is_checked_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stable_diffusion_xl.make(tmp_path / "pipeline")
    model = opened(folder)
    saved_adapter(model.network, tmp_path / "lora.safetensors")
    facts = model.family.facts(16, 16, (16, 16), (0, 0))
    conditions = {name: array.numpy() for name, array in model.encoded(["a cat"]).items()}
    latent = np.zeros((stable_diffusion_xl.CHANNELS, 8, 8), np.float32)
    fields = [encode_sample("sample-0", latent, conditions, {"captions": ["a cat"], "conditions": facts})]
    write_shards(fields, tmp_path / "shards")
    data = {"shards": str(tmp_path / "shards"), "queries": str(tmp_path / "shards")}
    said = {"network": str(folder), "adapter": str(tmp_path / "lora.safetensors"), "parameters": "adapter"}
    # A loss that looks its timesteps up, and so can't be called without numbers.
    snr = {"class_path": "DenoisingObjective", "init_args": {"scheduler": str(folder), "snr_gamma": 5.0}}
    config = {
        "model": {"class_path": "UnlearningModule", "init_args": {**said, "objective": snr}},
        "data": {"class_path": "AttributionDataModule", "init_args": data},
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(config))
    page = checked(capsys, "--config", tmp_path / "lora.yaml")
    assert "adapter: 4 layers" in line(page, "weights")
    assert "memory unknown" not in page


def saved_adapter(network: nn.Module, path: Path) -> None:
    """A LoRA of two layers, as kohya writes it."""
    layers = [name for name, _ in network.named_modules() if name.endswith("attn2.to_k")][:2]
    assert len(layers) == 2
    state = {}
    for name in layers:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        key = f"lora_unet_{name.replace('.', '_')}"
        state[f"{key}.lora_down.weight"] = torch.ones(2, layer.in_features)
        state[f"{key}.lora_up.weight"] = torch.ones(layer.out_features, 2)
        state[f"{key}.alpha"] = torch.tensor(2.0)
    safetensors.torch.save_file(state, path)
