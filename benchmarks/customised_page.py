"""What the customised models show: a part of the results page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from benches import Bench
from method_settings import DEFAULT, LABELS, METHODS
from shown import difference, shown
from torch import Tensor

from lightning_unlearn.evaluation.results import value_of


def customised(bench: Bench) -> list[str]:
    """The customised models' part of a bench."""
    found = [json.loads(path.read_text()) for path in sorted((bench.folder / "customised").glob("*.json"))]
    if len(found) < 2:
        return []
    names = list(next(iter(found[0]["methods"].values())))
    near = sum(concept["exemplar_nearest"] for concept in found)
    lines = [
        "",
        "### Customised models",
        "",
        f"{len(found)} models, each the bench's fine-tuned on three exemplars of a concept (keys and values of the "
        "attention to the text, and a new token); each generates pictures, and a method is asked for the exemplars "
        "among all training images and the exemplars of all concepts. Recall among the first is at most a third. All "
        "candidates carry one neutral caption, so that text similarity ties them all; ties count as found last. For "
        f"{near / len(found):.0%} of the generated pictures an exemplar is the nearest of all candidates. Settings are "
        "those with `text_kv`, the weights that customising changes.",
        "",
        "| method | setting | "
        + " | ".join(name.replace("_", " ").replace("average precision", "mAP") for name in names)
        + " |",
        "|---|---|" + "---|" * len(names),
    ]
    values = {
        method: {name: torch.tensor([concept["methods"][method][name] for concept in found]) for name in names}
        for method in (DEFAULT, *METHODS)
        if all(method in concept["methods"] for concept in found)
    }
    for method, measures in sorted(values.items(), key=lambda item: -float(item[1][names[-1]].mean())):
        cells = [shown(value_of(value)) for value in measures.values()]
        lines.append(f"| {LABELS[method]} | {found[0]['settings'][method]} | {' | '.join(cells)} |")
    return lines + tuned(found)


def tuned(found: Sequence[dict[str, Any]]) -> list[str]:
    """Customised models with settings that were chosen on them: on every second concept, reported on the others."""
    # By their place among all, so that it does not depend on how many are tried yet which half a concept is in.
    choosing, reporting = ([concept for concept in found[half::2] if concept.get("tried")] for half in (0, 1))
    done = [*choosing, *reporting]
    if min(len(choosing), len(reporting)) < 2:
        return []
    first, second = slice(0, len(choosing)), slice(len(choosing), None)
    tried = sorted(set[str].intersection(*(set(concept["tried"]) for concept in done)))
    waiting = f" **{len(found) - len(done)} of the {len(found)} models are not tried yet.**" * (len(done) < len(found))
    lines = [
        "",
        "Those settings were chosen for the LDS of the model before customising. Chosen instead by the mAP of every "
        f"second concept ({len(choosing)}), and reported on the other half ({len(reporting)}), with the choosing half "
        "beside it; methods that are not in this table were not tried again. Which rises were worth trying, and to "
        "undo customising, was found by looking at concepts of both halves ([README.md](README.md)). Customising "
        "undone takes no query: it gives all pictures of a model the same list, and this question, in which all "
        f"pictures of a model have the same answer, can't tell that from attribution of a picture.{waiting}",
        "",
        "| method | tried | setting | mAP, choosing half | mAP, reporting half | recall@1 | recall@3 | recall@10 | "
        "mAP less pixel similarity's, reporting half |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[str, tuple[str, dict[str, Tensor], int]] = {}
    for method in tried:
        settings: dict[str, list[dict[str, float]]] = {
            setting: [concept["tried"][method][setting] for concept in done] for setting in done[0]["tried"][method]
        }
        usual = done[0]["settings"].get(method)
        if usual is not None:
            settings.setdefault(usual, [concept["methods"][method] for concept in done])
        measured = {
            setting: {
                name: torch.tensor([row[name] for row in rows_of]) for name in next(iter(done[0]["methods"].values()))
            }
            for setting, rows_of in settings.items()
        }
        best = max(measured, key=lambda setting: float(measured[setting]["average_precision"][first].mean()))
        rows[method] = (best, measured[best], len(settings))
    for method, (setting, measures, count) in sorted(
        rows.items(), key=lambda item: -float(item[1][1]["average_precision"][second].mean())
    ):
        cells = [
            shown(value_of(measures["average_precision"][first])),
            shown(value_of(measures["average_precision"][second])),
        ]
        cells += [shown(value_of(value[second])) for name, value in measures.items() if name != "average_precision"]
        less = measures["average_precision"] - rows["pixel_similarity"][1]["average_precision"]
        cells.append("–" if method == "pixel_similarity" else difference(value_of(less[second])))
        lines.append(f"| {LABELS[method]} | {count} | {setting} | {' | '.join(cells)} |")
    return lines
