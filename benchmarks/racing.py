"""What a race saves on a bench, and whether it finds the best samples by all views.

    python benchmarks/racing.py digits

Replays races on the losses that the sweep keeps (20 draws of each sample, the package's defaults; sweep.py), with the
package's own rule: each query is raced by itself, once from each of the draws that a race could start with. A call is
one forward pass of one view of a sample under one set of weights; the finished samples' first views are made again.
Takes seconds, and some minutes where the sweep has not been run.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
from benches import BENCHES, Bench
from common import parser, quiet, show
from sweep import must_be_measured
from sweep_settings import DEFAULTS, PLAINLY, TIMESTEPS

from lightning_unlearn.scores.firmness import upper_ends
from lightning_unlearn.scores.racing import Race, contenders, leaders, thresholds
from lightning_unlearn.scores.rules import RULES


def race_once(race: Race, values: torch.Tensor, start: int) -> dict[str, float]:
    """One race of one query: values ``(N, draws)`` of the rule, the first stage's draws from ``start`` on."""
    few = values[:, start :: TIMESTEPS // race.views, None].transpose(1, 2)  # (N, 1, views)
    whole, scores = values.mean(1)[:, None].numpy(), few.mean(2).numpy()
    leading = finished = leaders(race, scores)
    beyond = float("nan")
    if race.judges:
        uppers = upper_ends(few, 1, "mean", race.tail)[:, None].numpy()
        finished = leading | contenders(race, scores, uppers, leading, thresholds(race, whole[leading]))
        beyond = float((whole[finished] > uppers[finished]).mean())
    hits = int(finished[np.argsort(-whole[:, 0])[: race.top]].sum())
    share = float(finished.mean())
    return {
        "finished": share,
        "calls": race.views / TIMESTEPS + share,
        "found": hits / race.top,
        "all": float(hits == race.top),
        "beyond": beyond,
    }


def main() -> None:
    """Replay, and print whether the promise was kept."""
    arguments = parser(__doc__)
    arguments.add_argument("bench", choices=[path.parent.name for path in sorted(BENCHES.glob("*/bench.yaml"))])
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    losses = must_be_measured(Bench(options.bench), DEFAULTS).losses.double()
    values = RULES[PLAINLY.rule](losses[:1], losses[1:])  # (Q, N, draws)
    lines, rows, promised = [], [], []
    for top, views, share in product((3, 10), (2, 4, 5, 10), (None, 0.25)):
        if share is None and views < 4:
            continue
        race = Race(top=top, views=views, share=share)
        races = [race_once(race, query, start) for query in values for start in range(TIMESTEPS // views)]
        means = {name: float(np.mean([found[name] for found in races])) for name in races[0]}
        row: dict[str, Any] = {"top": top, "views": views, "share": share, "races": len(races), **means}
        rows.append(row)
        if share is None:
            promised.append(means["all"])
        lines.append(
            f"the {top} best, {views} of {TIMESTEPS} draws, {'no cap' if share is None else f'cap {share:.0%}'}: "
            f"{means['finished']:.1%} finished, {means['calls']:.0%} of the calls, {means['found']:.1%} found, all of "
            f"them in {means['all']:.1%} of {len(races)} races; {means['beyond']:.2%} beyond their upper ends, allowed "
            f"{race.tail:.2%}"
        )
    show(
        "racing",
        min(promised),
        "all in 95 % of the races without cap",
        min(promised) >= 0.95,
        lines,
        {"rows": rows},
        options.json,
    )


if __name__ == "__main__":
    main()
