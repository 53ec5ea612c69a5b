"""Do methods find the pictures that a model was customised with? The ground truth is known by construction.

    python benchmarks/customised.py digits     # 20 customised models, all methods; what is finished is kept

Each model is the bench's, fine-tuned on three exemplars of a concept (see lightning_unlearn.evaluation.customised); it
generates pictures, and each method, under the setting that the bench chose for it, ranks all training pictures and the
exemplars of all concepts for them. All of them carry one neutral caption, so that the new token gives nothing away.

Those settings were chosen by other evidence, on a model that was not customised. So some methods are tried under all of
their settings here, too; results.py chooses one on every second concept and reports it on the others. One of them is
customising undone: the losses of all candidates under the model as it was before, against those under the customised
model, in the place of a query's unlearning. It needs no query, and says the same of all pictures of a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from base_model import fisher_file
from benches import BENCHES, CHOSEN, Bench
from common import PLAIN
from judged import chosen_settings
from lightning.pytorch import Trainer
from method_settings import (
    BASELINE_SETTINGS,
    DAMPING,
    DEFAULT,
    DEFAULT_OF,
    METHODS,
    UNDONE,
    UNLEARNING,
    WITH_FISHER,
    newton,
)
from methods import config, fisher_source, fit_and_predict

from lightning_unlearn.baselines import Subject
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.evaluation.customised import Customising, customise, undone
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.metrics import exemplar_retrieval
from lightning_unlearn.scores import rules
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.unlearning.scoring import measure_losses

TOP = (1, 3, 10)
# Which methods are tried under which settings of their own here.
TRIED: dict[str, list[str]] = {
    "unlearning_ekfac": [
        f"{size}, {rule}"
        for size in ("rise 100%", "rise 300%", "rise 600%", "rise 1200%", "halfway")
        for rule in rules.RULES
    ],
    UNDONE: list(rules.RULES),
    **{method: list(BASELINE_SETTINGS[method]) for method in ("pixel_similarity", "d_trak")},
}


def candidates_for(samples: list[Sample], concepts: dict[str, list[Sample]]) -> list[Sample]:
    """All pictures that a method may name, with the exemplars' neutral caption.

    All concepts' exemplars are among them: were there only one's, they could be told by being unlike the training
    pictures, whatever the query.
    """
    exemplars = [sample for concept in concepts.values() for sample in concept]
    neutral = exemplars[0]
    training = [replace(s, conditions=neutral.conditions, metadata={"captions": neutral.captions}) for s in samples]
    return sorted([*training, *exemplars], key=lambda sample: sample.key)


def nearest(picture: Sample, candidates: list[Sample]) -> str:
    """The candidate that a generated picture looks most like, by pixels."""
    distances = torch.stack([(sample.latent - picture.latent).square().mean() for sample in candidates])
    return candidates[int(distances.argmin())].key


def unlearn(bench: Bench, fisher: str, size: str, weights: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Scores of unlearning by a size of the step, by rule; by Lightning's fit and predict."""
    module, data = config(bench, fisher=fisher_source(bench, fisher), damping=DAMPING[fisher])
    module.network.load_state_dict(weights)
    module.strategy = newton(size)
    data.shard_patterns, data.query_patterns = str(folder / "candidates"), str(folder / "queries")
    predicted = fit_and_predict(module, data)
    return {
        rule: torch.cat([rules.score(rule, found.base, found.unlearned) for found in predicted]) for rule in rules.RULES
    }


def undo(module: UnlearningModule, before: dict[str, torch.Tensor], subject: Subject) -> dict[str, torch.Tensor]:
    """Scores of customising undone, by rule: the delta leads back to the weights before, the same for all queries."""
    deltas = undone(module.network, module.layers, before)
    with torch.inference_mode():
        losses = torch.cat(
            [measure_losses(subject.loss, deltas, subject.views, batch, module.device) for batch in subject.batches()],
            1,
        )
    return {
        rule: rules.score(rule, losses[0], losses[1:]).expand(-1, len(subject.queries)).clone() for rule in rules.RULES
    }


def judge(
    bench: Bench,
    concept: str,
    concepts: dict[str, list[Sample]],
    settings: dict[str, str],
    tried: dict[str, list[str]],
) -> dict[str, Any]:
    """Customise a model and see where each method ranks the exemplars, by its setting and by those that are tried."""
    exemplars = concepts[concept]
    module, _ = config(bench)
    assert isinstance(module.objective, DenoisingObjective)
    samples = bench.samples("shards")
    before = {name: weight.clone() for name, weight in module.network.state_dict().items()}
    trainer = Trainer(**{**PLAIN, "devices": 1})
    how = Customising(sampling_steps=bench.settings["sampling_steps"], **bench.settings["customising"])
    made = customise(module.network, module.objective, exemplars, samples, trainer, how, concept)
    candidates = candidates_for(samples, concepts)
    keys = [sample.key for sample in candidates]
    own = {sample.key for sample in exemplars}
    found: dict[str, Any] = {
        "loss_before": made.loss_before,
        "loss_after": made.loss_after,
        "exemplar_nearest": sum(nearest(picture, candidates) in own for picture in made.queries) / len(made.queries),
        "methods": {},
        "tried": {},
    }
    for layer in module.layers.values():
        layer.requires_grad_(False)
    subject = Subject(
        loss=module.loss.eval(),
        layers=module.layers,
        views=module.views,
        queries=made.queries,
        batches=lambda: [collate_samples("candidates", candidates[at : at + 64]) for at in range(0, len(keys), 64)],
        fisher=load_fisher(fisher_file(bench, "diagonal")),
        keep=True,
    )
    ekfac = replace(subject, fisher=load_fisher(fisher_file(bench, "ekfac")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, chosen in (("candidates", candidates), ("queries", made.queries)):
            fields = [encode_sample(s.key, s.latent.numpy(), s.text.numpy(), s.metadata) for s in chosen]
            write_shards(fields, folder / part)
        known: dict[tuple[str, str], torch.Tensor] = {}  # the defaults may be what was chosen, too

        def scores_of(method: str, setting: str) -> torch.Tensor:
            kind = DEFAULT_OF if method == DEFAULT else method
            if (kind, setting) not in known:
                if kind == UNDONE:
                    known.update({(kind, rule): scores for rule, scores in undo(module, before, subject).items()})
                elif kind in UNLEARNING:
                    size = setting.split(",")[0]
                    by_rule = unlearn(bench, UNLEARNING[kind], size, made.weights, folder)
                    known.update({(kind, f"{size}, {rule}"): scores for rule, scores in by_rule.items()})
                else:
                    of = ekfac if WITH_FISHER.get(method) == "ekfac" else subject
                    known[kind, setting] = BASELINE_SETTINGS[method][setting].scores(of)
            return known[kind, setting]

        def measured(scores: torch.Tensor) -> dict[str, float]:
            relevant = torch.tensor([[key in own] for key in keys]).expand(-1, scores.shape[1])
            values = exemplar_retrieval(scores, relevant, TOP)
            return {name: round(float(value.mean()), 6) for name, value in values.items()}

        for method, setting in settings.items():
            found["methods"][method] = measured(scores_of(method, setting))
        for method, chosen_from in tried.items():
            found["tried"][method] = {}
            for setting in chosen_from:
                found["tried"][method][setting] = measured(scores_of(method, setting))
    return found


def main() -> None:
    """Judge the concepts that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=[path.parent.parent.name for path in BENCHES.glob("*/exemplars/*.json")])
    parser.add_argument("--index", type=int, default=0, help="which share of the models this process makes")
    parser.add_argument("--count", type=int, default=1, help="in how many shares they are dealt")
    arguments = parser.parse_args()
    bench = Bench(arguments.bench)
    torch.set_num_threads(1)
    # The defaults with another rule are among what is tried.
    settings = {
        name: setting for name, setting in chosen_settings(bench, CHOSEN).items() if name in (DEFAULT, *METHODS)
    }
    concepts: dict[str, list[Sample]] = {}
    for sample in bench.samples("exemplars"):
        concepts.setdefault(sample.metadata["concept"], []).append(sample)
    (bench.folder / "customised").mkdir(exist_ok=True)
    for concept in sorted(concepts)[arguments.index :: arguments.count]:
        path = bench.folder / "customised" / f"{concept}.json"
        known = json.loads(path.read_text()) if path.is_file() else {"settings": {}, "methods": {}}
        tried = known.get("tried", {})
        left = {method: [n for n in names if n not in tried.get(method, {})] for method, names in TRIED.items()}
        untried = {method: names for method, names in left.items() if names}
        # A method that came in later, or was chosen another setting since.
        missing = {method: setting for method, setting in settings.items() if known["settings"].get(method) != setting}
        if missing or untried:
            with quiet(steps=True):
                found = judge(bench, concept, concepts, missing, untried)
            found["methods"] = {**known["methods"], **found["methods"]}
            found["tried"] = tried | {name: tried.get(name, {}) | more for name, more in found["tried"].items()}
            write_atomically(path, json.dumps({"settings": settings, **found}).encode() + b"\n")
            print(concept, found["exemplar_nearest"], found["methods"], found["tried"], flush=True)


if __name__ == "__main__":
    main()
