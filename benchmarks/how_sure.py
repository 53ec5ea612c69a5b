"""Whether the printed words on how sure an answer is foretell how good it is, query by query, over all benches.

    python benchmarks/how_sure.py
    python benchmarks/how_sure.py --json > benchmarks/how_sure.json   # what the results page shows

For each query of a bench: what lightning_unlearn.scores.agreement says of DAS, D-TRAK and unlearning asked together,
and the linear datamodelling score of their mean. LDS is compared within a bench, as a difference from the bench's mean,
so that no bench speaks for another; the correlation is Spearman's over all queries, with a 95 % bootstrap interval
over queries. Then the mean LDS of the queries under each of the words. Met, if those called "not sure" lie below
those called "methods agree" beyond noise.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from benches import Bench
from common import parser, show
from judged import evidence
from method_settings import CONSENSUS_DEFAULT, CONSENSUS_PARTS
from score_files import read
from torch import Tensor
from transfer import all_benches, is_ready

from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.evaluation.judging import scores_of
from lightning_unlearn.metrics.ranks import rank_correlation
from lightning_unlearn.scores.agreement import AGREE, UNSURE, Agreement, agreements

TIMES = 2000
MEASURES = ("first_ten", "rank_correlation", "correlation", "caption_share")


@dataclass(frozen=True)
class Query:
    """A query of a bench.

    Attributes:
        bench: Whose.
        sure: What methods say together.
        lds: Of their mean.
        above: The same less the bench's mean.
    """

    bench: str
    sure: Agreement
    lds: float
    above: float


def queries_of(bench: Bench) -> list[Query]:
    """All queries of a bench, of both halves."""
    halves, keys = evidence(bench), bench.plan().keys
    order = halves[0].order
    asked = CONSENSUS_PARTS[CONSENSUS_DEFAULT]
    parts = {method: scores_of(read(bench, method, "all")[setting], keys, order) for method, setting in asked}
    scores = combined(parts, dict.fromkeys(parts, 1.0))
    captions = {sample.key: sample.captions[0] for sample in bench.samples("shards")}
    found = agreements(parts, scores, [captions[key] for key in keys])
    lds = {query: half.mean_of(scores, query) for half in halves for query in half.queries}
    mean = sum(lds.values()) / len(lds)
    return [Query(bench.name, found[order.index(query)], value, value - mean) for query, value in lds.items()]


def drawn(count: int) -> Tensor:
    """``(TIMES, count)`` rows drawn with replacement."""
    return torch.randint(count, (TIMES, count), generator=torch.Generator().manual_seed(0))


def ends(values: Tensor) -> list[float]:
    """The middle 95 %."""
    return [round(float(value), 3) for value in values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype))]


def foretells(queries: list[Query], measure: str) -> dict[str, object] | None:
    """The correlation of one measure with LDS, where it is known."""
    known = [query for query in queries if getattr(query.sure, measure) is not None]
    if len(known) < 3:
        return None
    values = torch.tensor([float(getattr(query.sure, measure)) for query in known], dtype=torch.float64)
    above = torch.tensor([query.above for query in known], dtype=torch.float64)
    rows = drawn(len(known))
    found = float(rank_correlation(values, above))
    return {"correlation": round(found, 3), "interval": ends(rank_correlation(values[rows], above[rows]))}


def by_bench(queries: list[Query]) -> dict[str, dict[str, tuple[int, float]]]:
    """Bench to words to how many of its queries are called so, and their mean LDS."""
    found: dict[str, dict[str, list[float]]] = {}
    for query in queries:
        found.setdefault(query.bench, {}).setdefault(query.sure.words, []).append(query.lds)
    return {
        bench: {words: (len(some), round(sum(some) / len(some), 3)) for words, some in under.items()}
        for bench, under in found.items()
    }


def main() -> None:
    """Measure, and print."""
    arguments = parser(__doc__).parse_args()
    queries = [query for bench in all_benches() if is_ready(bench) for query in queries_of(bench)]
    lines, details = [], {}
    for measure in MEASURES:
        details[measure] = foretells(queries, measure)
        lines.append(f"{measure} and LDS, within benches: {details[measure]}")
    under: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        under[query.sure.words].append(query)
    for words, some in under.items():
        lds = torch.tensor([query.lds for query in some], dtype=torch.float64)
        interval = ends(lds[drawn(len(some))].mean(1))
        details[words] = {"queries": len(some), "lds": round(float(lds.mean()), 3), "interval": interval}
        lines.append(f"“{words}”: {len(some)} queries, mean LDS {float(lds.mean()):.3f} {interval}")
    details["benches"] = by_bench(queries)
    lines.append(f"by bench, queries and mean LDS: {details['benches']}")
    gap, met = float("nan"), False
    if under[AGREE] and under[UNSURE]:
        sure, unsure = (torch.tensor([q.lds for q in under[words]], dtype=torch.float64) for words in (AGREE, UNSURE))
        apart = sure[drawn(len(sure))].mean(1) - unsure[drawn(len(unsure))].mean(1)
        gap, met = float(sure.mean() - unsure.mean()), ends(apart)[0] > 0
        lines.append(f"“{AGREE}” less “{UNSURE}”: {gap:+.3f} {ends(apart)}")
    show("how_sure", gap, "“not sure” below “methods agree” beyond noise", met, lines, details, arguments.json)


if __name__ == "__main__":
    main()
