"""What methods know beyond the caption: the linear datamodelling score of scores less their caption's mean.

    python benchmarks/within_caption.py
    python benchmarks/within_caption.py --json > benchmarks/within_caption.json   # what the results page shows

On each bench that has several pictures a caption, for each method with the setting that was chosen on the other
benches: its score as it is, and after each caption's mean was taken from the scores of its pictures, so that only what
tells them apart is left (text similarity has nothing then). The best method is the one whose setting has the highest
such score on the bench's own choosing half. Everything is reported on the other half. Then, on all benches, whether
text and pixel similarity, tuned on the bench itself, are beaten beyond noise. Met, if what `Consensus` asks reaches
nine tenths of the best method's within captions, but for noise, and beats both on each bench.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import parser, show
from method_settings import CONSENSUS_FIXED, LABELS
from torch import Tensor
from transfer import Asked, all_benches, ask, chosen_elsewhere, is_ready

SHARE = 0.9
SURFACES = ("text_similarity", "pixel_similarity")


def less_captions(scores: Tensor, captions: Sequence[str]) -> Tensor:
    """Scores ``(N, Q)`` less the mean of those with the same caption; 0 for a picture alone with its caption."""
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    of = torch.tensor([numbers[caption] for caption in captions])
    sums = torch.zeros(len(numbers), scores.shape[1], dtype=scores.dtype).index_add_(0, of, scores)
    means = sums / torch.bincount(of)[:, None]
    return scores - means[of]


def captions_of(here: Asked) -> list[str]:
    """The first caption of each sample, in the plan's order."""
    of = {sample.key: sample.captions[0] for sample in here.bench.samples("shards")}
    return [of[key] for key in here.bench.plan().keys]


def within(here: Asked, others: Sequence[Asked]) -> dict[str, Any] | None:
    """All methods on one bench, or nothing where no two pictures have the same caption."""
    captions = captions_of(here)
    if len(set(captions)) == len(captions):
        return None
    left = {
        method: {setting: less_captions(scores, captions) for setting, scores in settings.items()}
        for method, settings in here.scores.items()
    }
    pairs = [(method, setting) for method, settings in left.items() for setting in settings]
    best = max(pairs, key=lambda pair: here.choosing.mean(left[pair[0]][pair[1]]))
    rows = []
    for method in left:
        if not all(method in one.chosen for one in others):
            continue
        setting = chosen_elsewhere(method, others)
        value = here.reporting.value(left[method][setting])
        rows.append(
            {
                "method": method,
                "setting": setting,
                "lds": round(here.reporting.mean(here.scores[method][setting]), 4),
                "within": [round(number, 4) for number in (value.mean, value.low, value.high)],
            }
        )
    rows.sort(key=lambda row: -row["within"][0])
    (fixed,) = left[CONSENSUS_FIXED].values()
    behind = here.reporting.compared(fixed, left[best[0]][best[1]], SHARE)
    return {
        "rows": rows,
        "best": list(best),
        "best_within": round(here.reporting.mean(left[best[0]][best[1]]), 4),
        "ours": round(here.reporting.mean(fixed), 4),
        "ours_less_share_of_best": [round(behind.low, 4), round(behind.high, 4)],
    }


def above_surfaces(here: Asked) -> dict[str, list[float]]:
    """What our answer's score is above those of text and of pixels, with intervals."""
    (fixed,) = here.scores[CONSENSUS_FIXED].values()
    found = {}
    for method in SURFACES:
        setting = max(here.chosen[method], key=here.chosen[method].__getitem__)
        scores = here.scores[method][setting]
        apart = here.reporting.compared(fixed, scores)
        mean = here.reporting.mean(fixed) - here.reporting.mean(scores)
        found[method] = [round(number, 4) for number in (mean, apart.low, apart.high)]
    return found


def main() -> None:
    """Measure, and print."""
    arguments = parser(__doc__).parse_args()
    asked = [ask(bench) for bench in all_benches() if is_ready(bench)]
    lines: list[str] = []
    details: dict[str, Any] = {"within": {}, "above": {}}
    shares, met = [], True
    for place, here in enumerate(asked):
        name = here.bench.name
        details["above"][name] = above_surfaces(here)
        met &= all(values[1] > 0 for values in details["above"][name].values())
        lines.append(f"{name}: ours less text and pixels: {details['above'][name]}")
        found = within(here, [*asked[:place], *asked[place + 1 :]])
        if found is None:
            continue
        details["within"][name] = found
        shares.append(found["ours"] / found["best_within"])
        met &= found["ours_less_share_of_best"][1] >= 0
        for row in found["rows"]:
            lines.append(
                f"  {row['within'][0]:.3f} (as it is {row['lds']:.3f})  {LABELS[row['method']]}, {row['setting']}"
            )
        lines.append(
            f"  ours {found['ours']:.3f}, the best {found['best_within']:.3f} ({', '.join(found['best'])}); ours less "
            f"{SHARE:g} of it {found['ours_less_share_of_best']}"
        )
    bar = f"at least {SHARE:g} of the best method's within captions, and above text and pixels beyond noise"
    show("within_caption", min(shares, default=float("nan")), bar, met and bool(shares), lines, details, arguments.json)


if __name__ == "__main__":
    main()
