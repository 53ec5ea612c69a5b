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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bench import Bench, bench_parser
from common import PLAIN, quiet
from judged import Half, chosen_tables, evidence
from lightning.pytorch import Trainer
from methods import config, fisher_source
from packed import open_study
from torch import Tensor, nn

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.judging import scores_of as kept_scores
from lightning_unlearn.evaluation.results import Value
from lightning_unlearn.fingerprints import digest
from lightning_unlearn.scores import rules
from lightning_unlearn.strategies import Mirrored, Newton, Penalised, Strategy

TIMESTEPS = 20


@dataclass(frozen=True)
class Unlearned:
    """How queries are unlearned, and on which noise samples are scored."""

    fisher: str = "ekfac"
    parameters: str = "text_kv"
    damping: float = 0.001
    rise: float = 1.0
    steps: int = 1
    noise: Literal["shared", "per_sample"] = "shared"
    draws: int = 128
    rise_draws: int = 64
    strategy: str = "newton"
    toward_data: float | None = None  # in the place of the rise


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


@dataclass(frozen=True)
class Reduced:
    """How the losses become scores: the rule, the part of the schedule, and every how manyth view."""

    rule: str = "ratio"
    start: int = 0
    end: int = TIMESTEPS
    stride: int = 1

    @property
    def views(self) -> slice:
        """The views, among all."""
        return slice(self.start + self.stride // 2, self.end, self.stride)

    @property
    def count(self) -> int:
        """How many views these are."""
        return len(range(TIMESTEPS)[self.views])


# The package's defaults but for the size of the step, which doubles a query's loss here; and the same with all weights.
CENTRE, PLAINLY = Unlearned(), Reduced()
HALFWAY = 0.5
DEFAULTS = replace(CENTRE, toward_data=HALFWAY)
WHOLE, DEFAULTS_WHOLE = (replace(unlearned, parameters="all") for unlearned in (CENTRE, DEFAULTS))
# Factor to the values it takes; the centre's own are left out.
UNLEARNED: dict[str, list[Unlearned]] = {
    "Fisher": [replace(CENTRE, fisher=fisher) for fisher in ("identity", "diagonal", "ekfac_true")],
    "damping": [replace(CENTRE, damping=damping) for damping in (0.0001, 0.1, 1.0)],
    "rise of the query's loss": [replace(CENTRE, rise=rise) for rise in (0.1, 3.0)],
    "share of the way to the data's loss": [replace(CENTRE, toward_data=share) for share in (0.25, HALFWAY, 1.0)],
    "steps": [replace(CENTRE, steps=4)],
    "strategy": [
        replace(CENTRE, strategy="penalised"),
        # Many steps of few fresh draws each, in place of one of many.
        replace(CENTRE, strategy="mirrored", draws=16),
        replace(CENTRE, strategy="mirrored", draws=16, fisher="identity", parameters="feed_forward"),
    ],
    "noise": [replace(CENTRE, noise="per_sample")],
    "draws to unlearn with": [replace(CENTRE, draws=draws, rise_draws=rise) for draws, rise in ((6, 2), (8, 2))],
    "weights": [replace(CENTRE, parameters="attention")],
    # Their rises are among the settings of method_settings.py, too.
    "all weights": [
        WHOLE,
        replace(WHOLE, fisher="identity"),
        replace(WHOLE, damping=1.0),
        replace(WHOLE, steps=4),
        DEFAULTS_WHOLE,
    ],
}
REDUCED: dict[str, list[Reduced]] = {
    "score rule": [replace(PLAINLY, rule="difference")],
    "part of the schedule": [
        *(replace(PLAINLY, start=start, end=start + 5) for start in (0, 5, 10, 15)),
        replace(PLAINLY, start=6),
    ],
    "views": [replace(PLAINLY, stride=stride) for stride in (2, 4, 10, 20)],
}


def variants() -> Iterator[tuple[str, Unlearned, Reduced]]:
    """All rows: the factor, and both halves of the settings; the centre first."""
    yield "centre", CENTRE, PLAINLY
    for factor, changed in UNLEARNED.items():
        yield from ((factor, unlearned, PLAINLY) for unlearned in changed)
    for factor, reductions in REDUCED.items():
        yield from ((factor, CENTRE, reduced) for reduced in reductions)


def changed(unlearned: Unlearned, reduced: Reduced) -> str:
    """What a row changes, in words."""
    if reduced != PLAINLY:
        if (reduced.start, reduced.end) != (PLAINLY.start, PLAINLY.end):
            part = f"{reduced.start / TIMESTEPS:.0%} to {reduced.end / TIMESTEPS:.0%}"
            return f"{part}, {reduced.count} views"
        return f"{reduced.count}" if reduced.stride != 1 else reduced.rule
    names = [name for name, value in asdict(unlearned).items() if value != getattr(CENTRE, name)]
    if unlearned.strategy == "mirrored":  # has no Fisher
        names = [name for name in names if name != "fisher"]
    # A selection of weights, a Fisher, a noise and a strategy say by themselves what they are.
    spoken = ("fisher", "parameters", "noise", "strategy")
    words = ["" if name in spoken else name.replace("_", " ") + " " for name in names]
    return ", ".join(word + str(getattr(unlearned, name)) for word, name in zip(words, names, strict=True))


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
