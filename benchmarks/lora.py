"""Do methods find the pictures that an adapter was trained on? The ground truth is known by construction.

    python benchmarks/lora.py     # 20 adapters on the digits' model, all methods; what is finished is kept

Each adapter is a LoRA of rank 4 on the attention, which PEFT puts on the bench's model and trains on three exemplars of
a concept beside training pictures, and which is then read from its file as a user's would be. The model generates
pictures for the exemplars' neutral caption, and each method ranks all training pictures and the exemplars of all
concepts for them, as in customised.py. Methods that work with weights are asked with the adapter's (`parameters:
adapter`) and, the adapter merged, with all of the layers that it is on; `Undone` switches the adapter off, and is asked
without a query. Every method is tried under all of its settings; lora_page.py chooses one on every second concept and
reports it on the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benches import Bench
from common import PLAIN, quiet
from customised import TOP, candidates_for, nearest
from lightning.pytorch import Trainer
from method_settings import BASELINE_SETTINGS, DAMPING, newton
from methods import config, fit_and_predict
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_unlearn.baselines import Subject, Undone
from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.callbacks import FisherAccumulator
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.conditions import first_captions
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules import TrainingDataModule
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.fingerprints import generator_for, seed_of
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.metrics import exemplar_retrieval
from lightning_unlearn.scores import rules
from lightning_unlearn.training import FisherPass
from lightning_unlearn.unlearning.module import UnlearningModule

RANK, STEPS, BATCH, RATE = 4, 120, 32, 5e-3
QUERIES = 2  # pictures of each model
FISHER_PASSES = 2
VIEWS = 5  # timesteps on which a picture is looked at
LAYERS = r".*\.attn[12]\.(to_[qkv]|to_out\.0)"  # of the LoRA, and what is asked of the merged model
SELECTIONS = {"adapter": {"parameters": "adapter"}, "merged": {"parameters": "attention", "merge": True}}
UNLEARNED_BY = ("rise 30%", "rise 300%", "halfway")
WITH_WEIGHTS = ("d_trak", "das", "influence_ekfac")
UNLEARNING = "unlearning_ekfac"
# As Consensus asks them.
ASKED = {
    "das": ("das", "ridge 0.001"),
    "d_trak": ("d_trak", "ridge 0.01"),
    "unlearning": (UNLEARNING, "rise 30%, difference"),
}


def train_adapter(bench: Bench, exemplars: list[Sample], name: str, path: Path) -> tuple[float, float]:
    """Train a LoRA with PEFT on exemplars, half of each batch, and training pictures.

    Args:
        bench: Whose model it is put on.
        exemplars: With one neutral caption.
        name: Of the concept.
        path: Where it goes, as PEFT writes it.

    Returns:
        Mean loss of the exemplars in the first and in the last tenth of the steps.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    module, _ = config(bench)
    network, objective, samples = module.network, module.objective, bench.samples("shards")
    network.requires_grad_(False)
    torch.manual_seed(seed_of("lora", name))
    settings = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS)
    inject_adapter_in_model(settings, network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        generator = generator_for("lora", name, step)
        chosen = [
            part[place]
            for part in (exemplars, samples)
            for place in torch.randint(len(part), (BATCH // 2,), generator=generator).tolist()
        ]
        batch = collate_samples(name, chosen)
        views = batch.views(torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.long), batch.latents)
        timesteps = torch.randint(objective.num_timesteps, (BATCH,), generator=generator)
        loss = objective(network, views, timesteps, torch.randn(batch.latents.shape, generator=generator))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss[: BATCH // 2].detach().mean()))
    weights = get_peft_model_state_dict(network)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "peft_type": "LORA"}))
    tenth = STEPS // 10
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def generated(bench: Bench, network: nn.Module, objective: Any, exemplar: Sample) -> list[Sample]:
    """What the model with its adapter makes of the neutral caption."""
    steps = bench.settings["sampling_steps"]
    conditions = first_captions([exemplar.conditions] * QUERIES)
    pictures = generate(network, objective, conditions, exemplar.latent.shape, range(QUERIES), steps).clamp(-1, 1)
    return [
        replace(
            exemplar,
            key=f"query-{seed:02d}",
            latent=picture.clone(),
            metadata={"captions": exemplar.captions, **how_generated(objective, seed, steps), "clipped": True},
        )
        for seed, picture in enumerate(pictures)
    ]


def take_fisher(module: UnlearningModule, parameters: str, folder: Path) -> str:
    """The EKFAC Fisher of chosen weights by passes over all candidates."""
    path = str(folder / f"{parameters}.safetensors")
    accumulator = FisherAccumulator("network", parameters, "ekfac", path, eigenvalue_epoch=FISHER_PASSES // 2)
    trainer = Trainer(**{**PLAIN, "devices": 1, "max_epochs": FISHER_PASSES, "callbacks": [accumulator]})
    data = TrainingDataModule(str(folder / "candidates"), batch_size=65, every_sample=True)
    trainer.fit(FisherPass(module.network, module.objective, parameters), data)
    return path


def scores_with(
    bench: Bench, adapter: Path, selection: str, folder: Path, candidates: list[Sample], queries: list[Sample]
) -> dict[str, dict[str, Tensor]]:
    """Scores of all methods that work with weights, by method and setting."""
    settings: dict[str, Any] = {**SELECTIONS[selection], "adapter": str(adapter)}
    settings["views.timesteps"] = VIEWS
    module, _ = config(bench, **settings)
    fisher = take_fisher(module, settings["parameters"], folder)
    found: dict[str, dict[str, Tensor]] = {UNLEARNING: {}}
    for size in UNLEARNED_BY:
        module, data = config(bench, **settings, fisher=fisher, damping=DAMPING["ekfac"])
        module.strategy = newton(size)
        data.shard_patterns, data.query_patterns = str(folder / "candidates"), str(folder / "queries")
        predicted = fit_and_predict(module, data)
        for rule in rules.RULES:
            parts = [rules.score(rule, part.base, part.unlearned) for part in predicted]
            found[UNLEARNING][f"{size}, {rule}"] = torch.cat(parts)
    subject = Subject(
        loss=module.loss.eval(),
        layers=module.layers,
        views=module.views,
        queries=queries,
        fisher=load_fisher(fisher),
        batches=lambda: [
            collate_samples("candidates", candidates[at : at + 64]) for at in range(0, len(candidates), 64)
        ],
        keep=True,
    )
    for method in WITH_WEIGHTS:
        found[method] = {setting: rival.scores(subject) for setting, rival in BASELINE_SETTINGS[method].items()}
    asked = {name: found[method][setting] for name, (method, setting) in ASKED.items()}
    found["consensus_default"] = {"DAS + D-TRAK + unlearning 30%": combined(asked, dict.fromkeys(asked, 1.0))}
    if selection == "adapter":
        for rule in ("difference", "ratio"):
            column = Undone(rule=rule).scores(subject)
            found.setdefault("undone", {})[rule] = column.expand(-1, len(queries)).clone()
        for name in ("pixel_similarity", "random"):
            found[name] = {setting: rival.scores(subject) for setting, rival in BASELINE_SETTINGS[name].items()}
    return found


def judge(bench: Bench, concept: str, concepts: dict[str, list[Sample]]) -> dict[str, Any]:
    """Train an adapter and see where each method ranks its exemplars."""
    exemplars = concepts[concept]
    candidates = candidates_for(bench.samples("shards"), concepts)
    own = {sample.key for sample in exemplars}
    relevant = torch.tensor([[sample.key in own] for sample in candidates]).expand(-1, QUERIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, after = train_adapter(bench, exemplars, concept, folder / "adapter")
        module, _ = config(bench, parameters="adapter", adapter=str(folder / "adapter"))
        queries = generated(bench, module.network, module.objective, exemplars[0])
        for part, chosen in (("candidates", candidates), ("queries", queries)):
            fields = [encode_sample(s.key, s.latent.numpy(), s.text.numpy(), s.metadata) for s in chosen]
            write_shards(fields, folder / part)
        found: dict[str, Any] = {
            "loss_before": before,
            "loss_after": after,
            "exemplar_nearest": sum(nearest(picture, candidates) in own for picture in queries) / QUERIES,
            "tried": {},
        }
        for selection in SELECTIONS:
            scores = scores_with(bench, folder / "adapter", selection, folder, candidates, queries)
            found["tried"][selection] = {
                method: {
                    setting: {
                        measure: round(float(value.mean()), 6)
                        for measure, value in exemplar_retrieval(values, relevant, TOP).items()
                    }
                    for setting, values in by_setting.items()
                }
                for method, by_setting in scores.items()
            }
    return found


def main() -> None:
    """Judge the concepts that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=int, default=0, help="which share of the adapters this process makes")
    parser.add_argument("--count", type=int, default=1, help="in how many shares they are dealt")
    arguments = parser.parse_args()
    bench = Bench("digits")
    quiet()
    torch.set_num_threads(1)
    concepts: dict[str, list[Sample]] = {}
    for sample in bench.samples("exemplars"):
        concepts.setdefault(sample.metadata["concept"], []).append(sample)
    (bench.folder / "lora").mkdir(exist_ok=True)
    for concept in sorted(concepts)[arguments.index :: arguments.count]:
        path = bench.folder / "lora" / f"{concept}.json"
        if not path.is_file():
            found = judge(bench, concept, concepts)
            write_atomically(path, json.dumps(found).encode() + b"\n")
            print(concept, found["loss_before"], found["loss_after"], found["exemplar_nearest"], flush=True)


if __name__ == "__main__":
    main()
