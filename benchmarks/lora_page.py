"""What the adapters show: a part of the results page."""

from __future__ import annotations

import json
from typing import Any

import torch
from benches import Bench
from method_settings import CONSENSUS_FIXED, LABELS
from shown import difference, shown
from torch import Tensor

from lightning_unlearn.evaluation.results import value_of

MEASURE = "average_precision"
WEIGHTS = {"adapter": "the adapter's", "merged": "`attention`, the adapter merged"}
WITHOUT = ("pixel_similarity", "random")
NAMES = LABELS | {CONSENSUS_FIXED: "**several asked together, as `Consensus` asks them (ours)**"}


def adapters(bench: Bench) -> list[str]:
    """The adapters' part of a bench."""
    found = [json.loads(path.read_text()) for path in sorted((bench.folder / "lora").glob("*.json"))]
    if len(found) < 4:
        return []
    # By their place among all concepts: every second chooses.
    first, second = slice(0, None, 2), slice(1, None, 2)
    rows: dict[tuple[str, str], tuple[str, dict[str, Tensor], int]] = {}
    for selection, methods in found[0]["tried"].items():
        for method, settings in methods.items():
            measured = {setting: _measured(found, selection, method, setting) for setting in settings}
            best = max(measured, key=lambda setting: float(measured[setting][MEASURE][first].mean()))
            rows[selection, method] = (best, measured[best], len(measured))
    names = [name for name in rows["adapter", WITHOUT[0]][1] if name != MEASURE]
    near = sum(concept["exemplar_nearest"] for concept in found) / len(found)
    before, after = (sum(concept[f"loss_{when}"] for concept in found) / len(found) for when in ("before", "after"))
    lines = [
        "",
        "### Adapters",
        "",
        f"By `python benchmarks/lora.py`: {len(found)} LoRAs of rank 4 on the attention of the bench's model, each "
        "trained with PEFT on three exemplars of a concept (digits on their side, all under one neutral caption that "
        "training never saw) beside training pictures, then read from its file as a user's would be. The exemplars' "
        f"loss fell from {before:.3f} to {after:.3f}; for {near:.0%} of the generated pictures an exemplar is the "
        "nearest of all candidates. A method is asked for the exemplars among all training images and the exemplars "
        "of all concepts. Every method's setting is chosen by the mAP of every second concept "
        f"({len(range(len(found))[first])}), and reported on the others ({len(range(len(found))[second])}). "
        "Customising undone is `Undone`, which switches the adapter off. It needs no query: it gives all pictures of "
        "a model one list, so that here, where they all have one answer, it is asked an easier question.",
        "",
        "| method | weights | tried | setting | mAP, choosing half | mAP, reporting half | "
        + " | ".join(name.replace("_", " ") for name in names)
        + " | mAP less pixel similarity's |",
        "|---|---|---|---|---|---|" + "---|" * (len(names) + 1),
    ]
    rival = rows["adapter", "pixel_similarity"][1][MEASURE][second]
    for (selection, method), (setting, measures, count) in sorted(
        rows.items(), key=lambda item: -float(item[1][1][MEASURE][second].mean())
    ):
        cells = [shown(value_of(measures[MEASURE][half])) for half in (first, second)]
        cells += [shown(value_of(measures[name][second])) for name in names]
        less = measures[MEASURE][second] - rival
        cells.append("–" if method == "pixel_similarity" else difference(value_of(less)))
        weights = "none" if method in WITHOUT else WEIGHTS[selection]
        lines.append(f"| {NAMES[method]} | {weights} | {count} | {setting} | {' | '.join(cells)} |")
    return lines


def _measured(found: list[dict[str, Any]], selection: str, method: str, setting: str) -> dict[str, Tensor]:
    """Each measure of all concepts, ``(concepts,)``."""
    of_all = [concept["tried"][selection][method][setting] for concept in found]
    return {name: torch.tensor([row[name] for row in of_all]) for name in of_all[0]}
