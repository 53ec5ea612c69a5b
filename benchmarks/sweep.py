"""What each setting of unlearning is worth: one changed at a time, judged by the linear datamodelling score.

    python benchmarks/sweep.py digits     # writes digits/sweep.json; what is finished is kept
    python benchmarks/results.py          # puts its table on the page

Each row unlearns and scores anew, under 20 views whose losses are kept, so that rules, views and parts of the schedule
are compared on the same losses. Both halves of the evidence stand side by side (see judged.py): settings are chosen
on one, and reported on the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benches import Bench, bench_parser
from common import PLAIN, quiet
from judged import Half, chosen_tables, evidence
from lightning.pytorch import Trainer
from methods import config, fisher_source
from packed import open_study
from sweep_settings import CENTRE, PLAINLY, TIMESTEPS, WHOLE, Reduced, Unlearned, changed, variants
from torch import Tensor, nn

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.judging import scores_of as kept_scores
from lightning_unlearn.evaluation.results import Value
from lightning_unlearn.fingerprints import digest
from lightning_unlearn.scores import rules
from lightning_unlearn.strategies import Mirrored, Newton, Penalised, Strategy


@dataclass(frozen=True)
class Measured:
    """What one setting of unlearning gives.

    Attributes:
        losses: ``(1 + Q, N, views)``, under θ₀ first.
        keys: ``N`` keys of the samples.
        calls: Network calls that unlearning a query took: one a forward pass of a view, two more for its backward pass.
    """

    losses: Tensor
    keys: list[str]
    calls: float


@functools.cache
def measured(bench: Bench, unlearned: Unlearned) -> Measured | str:
    """Unlearn all queries and score all samples, or the sentence of the error where that fails."""
    folder = bench.folder / "sweep"
    folder.mkdir(exist_ok=True)
    path = _path(bench, unlearned)
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        if isinstance(kept, dict) and kept.pop("of", _made(bench)) != _made(bench):
            raise InputError(f"{path} is of another model or other queries; remove the sweep folder of {bench.name}.")
        return kept if isinstance(kept, str) else Measured(**kept)
    settings = {name: getattr(unlearned, name) for name in ("parameters", "damping", "rise_draws")}
    module, data = config(bench, fisher=fisher_source(bench, unlearned.fisher, unlearned.parameters), **settings)
    module.strategy = strategy(bench, unlearned)
    module.views = Views(timesteps=TIMESTEPS, noise=unlearned.noise)
    data.draws = unlearned.draws
    calls = 0

    def count(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += len(inputs[0]) * (3 if torch.is_grad_enabled() else 1)

    trainer = Trainer(**{**PLAIN, "devices": 1})
    try:
        with module.network.register_forward_pre_hook(count):
            trainer.fit(module, data)
    except InputError as error:
        torch.save(str(error), path)
        return str(error)
    predictions: Any = trainer.predict(module, data)
    keys = [key for prediction in predictions for key in prediction.batch.keys]
    values = torch.cat([torch.cat([found.base[None], found.unlearned]).cpu() for found in predictions], 1)
    # One flip, one caption.
    found = Measured(values[:, :, 0, 0].float(), keys, calls / len(module.targets))
    torch.save({**vars(found), "of": _made(bench)}, path)
    return found


@functools.cache
def _made(bench: Bench) -> str:
    """What losses are of: the model and its queries."""
    files = [bench.folder / "model.safetensors", *sorted((bench.folder / "queries").glob("*.tar"))]
    return digest(*(hashlib.sha256(file.read_bytes()).hexdigest() for file in files))


def strategy(bench: Bench, unlearned: Unlearned) -> Strategy:
    """How the deltas are found; all strategies stop at the same rise of the query's loss."""
    match unlearned.strategy:
        case "newton":
            if unlearned.toward_data is not None:
                return Newton(unlearned.steps, toward_data=unlearned.toward_data)
            return Newton(unlearned.steps, unlearned.rise)
        case "penalised":
            strength = float(bench.settings["penalty_strength"])
            return Penalised(N=strength, steps=60, lr=0.3, target_increase=unlearned.rise)
        case "mirrored":
            # The learning rate is some tenth of the training's, as in the paper.
            return Mirrored(steps=60, lr=3e-4, target_increase=unlearned.rise)
        case other:
            raise ValueError(f"there is no strategy {other!r}")


def is_measured(bench: Bench, unlearned: Unlearned) -> bool:
    """Whether a setting's losses are kept."""
    return _path(bench, unlearned).is_file()


def _path(bench: Bench, unlearned: Unlearned) -> Path:
    # What came in later is not in the name where it is the centre's.
    words = [str(value) for value in asdict(unlearned).values() if value not in (CENTRE.strategy, CENTRE.toward_data)]
    if unlearned.strategy == "penalised":
        words.append(str(bench.settings["penalty_strength"]))
    return bench.folder / "sweep" / ("-".join(words) + ".pt")


def must_be_measured(bench: Bench, unlearned: Unlearned) -> Measured:
    """The same for a setting that can't fail here."""
    found = measured(bench, unlearned)
    assert isinstance(found, Measured), found
    return found


def scores_of(found: Measured, keys: list[str], reduced: Reduced) -> Tensor:
    """Scores ``(N, Q)`` of the samples in an order."""
    views = found.losses[:, [found.keys.index(key) for key in keys]][:, :, None, None, reduced.views].double()
    return rules.score(reduced.rule, views[0], views[1:])


def rounded(value: Value) -> list[float]:
    """A value as it is written."""
    return [round(number, 4) for number in (value.mean, value.low, value.high)]


def judged_row(halves: tuple[Half, Half], scores: Tensor, centre: Tensor | None) -> dict[str, Any]:
    """What both halves say of scores, with the intervals of their difference from the centre's if these are others."""
    row: dict[str, Any] = {}
    for side, half in zip(("chosen_on", "reported_on"), halves, strict=True):
        row[side] = rounded(half.value(scores))
        if centre is not None:
            compared = half.compared(scores, centre)
            row[f"{side}_less_centre"] = [round(compared.low, 4), round(compared.high, 4)]
    return row


def sweep(bench: Bench, *, unlearn: bool) -> list[dict[str, Any]]:
    """All rows, with intervals, and beside each but the centre that of the difference from it.

    Args:
        bench: Which.
        unlearn: Whether settings that are not measured yet are measured now.
    """
    halves, keys = evidence(bench), bench.plan().keys
    centre: Tensor | None = None
    rows = []
    for factor, unlearned, reduced in variants():
        found = measured(bench, unlearned) if unlearn or is_measured(bench, unlearned) else "not measured yet"
        row: dict[str, Any] = {"factor": factor, "value": changed(unlearned, reduced)}
        rows.append(row)
        if isinstance(found, str):
            row["failed"] = found
            continue
        scores = scores_of(found, keys, reduced)
        row |= judged_row(halves, scores, centre)
        centre = scores if centre is None else centre
        print(row, flush=True)
    assert centre is not None
    return rows + combined(bench, halves, centre)


def combined(bench: Bench, halves: tuple[Half, Half], centre: Tensor) -> list[dict[str, Any]]:
    """The mean of D-TRAK's standardised scores and those of unlearning, with its defaults and with all weights."""
    plan = bench.plan()
    setting, tables = chosen_tables(bench, open_study(bench), plan)["d_trak"]
    rival = _standardised(kept_scores(tables[setting], plan.keys, halves[0].order))
    rows = []
    for value, unlearned in (("the centre", CENTRE), ("all weights", WHOLE)):
        scores = _standardised(scores_of(must_be_measured(bench, unlearned), plan.keys, PLAINLY)) + rival
        rows.append({"factor": "mean with D-TRAK", "value": value, **judged_row(halves, scores, centre)})
    return rows


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean(0)) / scores.std(0)


def main() -> None:
    """Write a bench's sweep."""
    arguments = bench_parser(__doc__)
    arguments.add_argument("--kept", action="store_true", help="leave out what is not measured yet")
    options = arguments.parse_args()
    bench = Bench(options.bench)
    quiet()
    torch.set_num_threads(1)
    rows = sweep(bench, unlearn=not options.kept)
    content = json.dumps({"centre": asdict(CENTRE) | asdict(PLAINLY), "rows": rows}, indent=1)
    write_atomically(bench.folder / "sweep.json", content.encode() + b"\n")


if __name__ == "__main__":
    main()
