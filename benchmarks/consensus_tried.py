"""What asking several methods together could do otherwise, tried on all benches alike.

    python benchmarks/consensus_tried.py
    python benchmarks/consensus_tried.py --json > benchmarks/consensus_tried.json   # what the results page shows

Each trial is made of kept scores: other parts, another rule or size of the step, ridges by the kernel's leave-one-out
error (self_adjusted.py), parts brought to ranks, parts weighed by how far they agree with the others. A trial's mean
linear datamodelling score on the choosing halves of all benches but one says whether it would have been taken for that
one, where it is reported on the other half, as the difference from what `Consensus` asks. A trial that lacks scores on
some bench is left out. Met, if no trial that was chosen so is ahead of what `Consensus` asks beyond noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from common import parser, show
from method_settings import CONSENSUS_DEFAULT, CONSENSUS_PARTS, DEFAULT_OF
from score_files import read_trials
from torch import Tensor
from transfer import Asked, all_benches, ask, is_ready

from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.evaluation.judging import scores_of
from lightning_unlearn.metrics.ranks import normal_scores
from lightning_unlearn.scores.agreement import standardised

Part = tuple[str, str]
Parts = Mapping[Part, Tensor]
DAS, D_TRAK, UNLEARNED = CONSENSUS_PARTS[CONSENSUS_DEFAULT]
ALL = ", all weights"


def equal(parts: Parts) -> Tensor:
    """Their standardised mean."""
    return combined({str(part): scores for part, scores in parts.items()}, {str(part): 1.0 for part in parts})


def by_rank(parts: Parts) -> Tensor:
    """The mean of their normal scores: only the order of a part counts."""
    return torch.stack([normal_scores(scores) for scores in parts.values()]).mean(0)


def agreeing(parts: Parts) -> Tensor:
    """Their mean, each weighed a query by its correlation with the mean of the others; at least a tenth."""
    standard = [standardised(scores) for scores in parts.values()]
    found = torch.zeros_like(standard[0])
    for place, part in enumerate(standard):
        others = standardised(torch.stack([*standard[:place], *standard[place + 1 :]]).mean(0))
        found += (part * others).mean(0).clamp(min=0.1) * part
    return found


@dataclass(frozen=True)
class Trial:
    """Several methods asked together in some way.

    Attributes:
        name: What it changes.
        parts: Which scores.
        mean: How they become one.
        own_ridges: Whether DAS and D-TRAK take the ridge of the least leave-one-out error in place of theirs.
    """

    name: str
    parts: tuple[Part, ...] = (DAS, D_TRAK, UNLEARNED)
    mean: Callable[[Parts], Tensor] = equal
    own_ridges: bool = False


def unlearned(size: str, rule: str = "difference", weights: str = ALL, of: str = DEFAULT_OF) -> Part:
    """Scores by unlearning."""
    return of, f"{size}, {rule}{weights}"


def kernels(das: str, d_trak: str, weights: str = ALL) -> tuple[Part, Part]:
    """Scores by DAS and D-TRAK with some ridges."""
    return ("das", f"ridge {das}{weights}"), ("d_trak", f"ridge {d_trak}{weights}")


INFLUENCE = ("influence_ekfac", f"damping 0.001{ALL}")
AS_IT_IS = "as `Consensus` asks them"
TRIALS = (
    Trial(AS_IT_IS),
    Trial("no unlearning", (DAS, D_TRAK)),
    Trial("no DAS", (D_TRAK, UNLEARNED)),
    Trial("no D-TRAK", (DAS, UNLEARNED)),
    Trial("unlearning alone", (UNLEARNED,)),
    Trial("DAS alone", (DAS,)),
    Trial("D-TRAK alone", (D_TRAK,)),
    *(
        Trial(f"step: {size}", (DAS, D_TRAK, unlearned(size, of=of)))
        for size, of in (
            ("rise 10%", "trials"),
            ("rise 100%", DEFAULT_OF),
            ("halfway", DEFAULT_OF),
            *((f"linear {share}%", "trials") for share in (90, 70, 50)),
        )
    ),
    Trial("rule: ratio", (DAS, D_TRAK, unlearned("rise 30%", "ratio"))),
    Trial("rule: ratio of summed losses", (DAS, D_TRAK, unlearned("rise 30%", "ratio of sums", of="trials"))),
    Trial(
        "unlearning on each second view",
        (DAS, D_TRAK, unlearned("rise 30%", "difference, each second view", of="trials")),
    ),
    Trial("both rules, half each", (DAS, DAS, D_TRAK, D_TRAK, UNLEARNED, unlearned("rise 30%", "ratio"))),
    Trial("keys and values of the text alone", (*kernels("0.001", "0.01", ""), unlearned("rise 30%", weights=""))),
    Trial("all weights and keys and values of the text", (DAS, D_TRAK, UNLEARNED, *kernels("0.001", "0.01", ""))),
    Trial("ridges by leave-one-out error", own_ridges=True),
    Trial("ridge of both 0.001", (*kernels("0.001", "0.001"), UNLEARNED)),
    Trial("ridge of both 0.01", (*kernels("0.01", "0.01"), UNLEARNED)),
    Trial("ridge of both 0.1", (*kernels("0.1", "0.1"), UNLEARNED)),
    Trial("ridge of DAS 0.01, of D-TRAK 0.1", (*kernels("0.01", "0.1"), UNLEARNED)),
    Trial("influence (EKFAC) as a fourth", (DAS, D_TRAK, UNLEARNED, INFLUENCE)),
    Trial("influence (EKFAC) in the place of unlearning", (DAS, D_TRAK, INFLUENCE)),
    Trial("TRAK as a fourth", (DAS, D_TRAK, UNLEARNED, ("trak", f"ridge 0.1{ALL}"))),
    Trial("DAS twice", (DAS, DAS, D_TRAK, UNLEARNED)),
    Trial("parts by rank", mean=by_rank),
    Trial("parts weighed by how they agree", mean=agreeing),
)


def own_ridges(here: Asked) -> dict[str, float]:
    """Method and selection of weights to the ridge of the least leave-one-out error."""
    path = here.bench.folder / "self_adjusted.json"
    return {row["method"]: row["own"] for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def scores(trial: Trial, here: Asked) -> Tensor | None:
    """What a trial says on a bench, ``(N, Q)``, or nothing where a part has no scores."""
    tables = read_trials(here.bench)
    kept = {name: scores_of(table, here.bench.plan().keys, here.choosing.order) for name, table in tables.items()}
    there: Mapping[str, Mapping[str, Tensor]] = {**here.scores, "trials": kept}
    own = own_ridges(here) if trial.own_ridges else {}
    found: dict[tuple[str, str, int], Tensor] = {}
    for number, (method, setting) in enumerate(trial.parts):
        if trial.own_ridges and method in ("das", "d_trak"):
            if method + ALL not in own:
                return None
            setting = f"ridge {own[method + ALL]:g}{ALL}"
        if setting not in there.get(method, {}):
            return None
        found[method, setting, number] = there[method][setting]
    return trial.mean({(method, f"{setting} {number}"): values for (method, setting, number), values in found.items()})


def main() -> None:
    """Try, and print."""
    arguments = parser(__doc__).parse_args()
    asked = [ask(bench) for bench in all_benches() if is_ready(bench)]
    found = {trial.name: [scores(trial, here) for here in asked] for trial in TRIALS}
    whole = {name: [one for one in of if one is not None] for name, of in found.items()}
    whole = {name: of for name, of in whole.items() if len(of) == len(asked)}
    chosen = {
        name: [here.choosing.mean(one) for here, one in zip(asked, of, strict=True)] for name, of in whole.items()
    }
    names = [here.bench.name for here in asked]
    rows: list[dict[str, Any]] = []
    for name, of in whole.items():
        reported = [here.reporting.mean(one) for here, one in zip(asked, of, strict=True)]
        apart = [here.reporting.compared(one, asis) for here, one, asis in zip(asked, of, whole[AS_IT_IS], strict=True)]
        rows.append(
            {
                "trial": name,
                "chosen_on": [round(value, 4) for value in chosen[name]],
                "reported_on": [round(value, 4) for value in reported],
                "less_as_it_is": [[round(one.low, 4), round(one.high, 4)] for one in apart],
            }
        )
    lines = ["trial: " + ", ".join(names)]
    lines += [
        f"{row['trial']:50s} "
        + "  ".join(
            f"{a:.3f} {b:.3f} {c}"
            for a, b, c in zip(row["chosen_on"], row["reported_on"], row["less_as_it_is"], strict=True)
        )
        for row in rows
    ]
    taken, ahead = {}, []
    for place, name in enumerate(names):
        others = {trial: [*values[:place], *values[place + 1 :]] for trial, values in chosen.items()}
        best = max(others, key=lambda trial: sum(others[trial]))
        (row,) = (row for row in rows if row["trial"] == best)
        low, high = row["less_as_it_is"][place]
        gain = row["reported_on"][place] - rows[0]["reported_on"][place]
        taken[name] = {"trial": best, "gain": [round(gain, 4), low, high]}
        ahead.append(low)
        lines.append(f"for {name} the others take {best!r}: {taken[name]['gain']} from it as it is")
    missing = [trial.name for trial in TRIALS if trial.name not in whole]
    lines += [f"not scored everywhere: {', '.join(missing)}"] * bool(missing)
    details = {"benches": names, "rows": rows, "taken": taken, "missing": missing}
    worst = max(ahead)
    bar = "no trial chosen on the other benches is ahead of Consensus beyond noise"
    show("consensus_tried", worst, bar, worst <= 0, lines, details, arguments.json)


if __name__ == "__main__":
    main()
