"""Which method's answer holds on a bench that nobody tuned it for: chosen on all benches but one, reported on that one.

    python benchmarks/transfer.py       # prints the table that results.py puts first on the page

A method's setting is the one with the highest mean LDS on the choosing halves of the *other* benches; its regret on a
bench is what it lacks to the best tuned method there, whose setting was chosen on that bench's own choosing half. Both
are taken on the bench's reporting half. Several methods asked together are made here of kept scores, as
lightning_unlearn.baselines.Consensus makes them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benches import BENCHES, Bench
from judged import Half, evidence
from method_settings import (
    CONSENSUS,
    CONSENSUS_DEFAULT,
    CONSENSUS_FIXED,
    CONSENSUS_PARTS,
    CONSENSUS_TEXT,
    CONSENSUS_TEXT_PARTS,
    DEFAULT_OF,
    DEFAULT_SETTINGS,
    LABELS,
    METHODS,
    plain,
)
from packed import is_packed, open_study
from score_files import is_scored, read
from shown import difference
from together import together
from torch import Tensor

from lightning_unlearn.evaluation.judging import scores_of
from lightning_unlearn.evaluation.results import Value

NUMBERS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six"}
LEAST_MODELS = 10  # subset models of each half, for a bench to be asked


@dataclass(frozen=True)
class Asked:
    """A bench with all that methods say of it.

    Attributes:
        bench: Which.
        choosing: The half of the evidence that chooses.
        reporting: The half that reports.
        scores: Method to setting to ``(N, Q)``.
        chosen: Method to setting to LDS on the half that chooses.
    """

    bench: Bench
    choosing: Half
    reporting: Half
    scores: Mapping[str, Mapping[str, Tensor]]
    chosen: Mapping[str, Mapping[str, float]]

    @functools.cached_property
    def best(self) -> tuple[str, str]:
        """The best tuned method and its setting, by the half that chooses."""
        pairs = [(method, setting) for method, values in self.chosen.items() for setting in values]
        return max(pairs, key=lambda pair: self.chosen[pair[0]][pair[1]])


@dataclass(frozen=True)
class Row:
    """A method that was chosen elsewhere.

    Attributes:
        method: Its name.
        settings: One a bench, chosen on the others.
        lds: On each bench.
        mean: Of its regrets, what it lacks to the best tuned method of each bench.
        worst: The regret on the bench where it is largest, with its interval.
    """

    method: str
    settings: list[str]
    lds: list[float]
    mean: float
    worst: Value


def is_ready(bench: Bench) -> bool:
    """Whether enough models of a bench are trained, and its samples are scored."""
    if not (is_packed(bench) and is_scored(bench, DEFAULT_OF)):
        return False
    study, halves = open_study(bench), bench.subsets(bench.plan())
    return all(len([run for run in runs if study.is_finished(run)]) >= LEAST_MODELS for runs in halves)


def ask(bench: Bench) -> Asked:
    """All that methods say of a bench."""
    plan = bench.plan()
    choosing, reporting = evidence(bench)
    scores = {
        method: {setting: scores_of(table, plan.keys, choosing.order) for setting, table in read(bench, method).items()}
        for method in METHODS
        if is_scored(bench, method)
    }
    tables = {
        name: together(bench, parts)
        for name, parts in {**CONSENSUS_PARTS, CONSENSUS_TEXT: CONSENSUS_TEXT_PARTS}.items()
    }
    asked = {name: scores_of(table, plan.keys, choosing.order) for name, table in tables.items() if table is not None}
    scores[CONSENSUS_TEXT] = {CONSENSUS_DEFAULT: asked.pop(CONSENSUS_TEXT)}
    scores[CONSENSUS_FIXED] = {CONSENSUS_DEFAULT: asked[CONSENSUS_DEFAULT]}
    scores[CONSENSUS] = asked
    for name, setting in DEFAULT_SETTINGS.items():
        scores[name] = {setting: scores[DEFAULT_OF][setting]}
    chosen = {
        method: {setting: choosing.mean(values) for setting, values in of_method.items()}
        for method, of_method in scores.items()
        if of_method
    }
    return Asked(bench, choosing, reporting, scores, chosen)


def chosen_elsewhere(method: str, others: Sequence[Asked]) -> str:
    """A method's setting with the highest mean LDS on other benches."""
    common = [setting for setting in others[0].chosen[method] if all(setting in one.chosen[method] for one in others)]
    return max(common, key=lambda setting: sum(one.chosen[method][setting] for one in others))


def row_of(method: str, asked: Sequence[Asked]) -> Row:
    """A method, chosen on all benches but one and reported on that one, for each in turn."""
    settings, lds, regrets = [], [], []  # of each bench
    for place, here in enumerate(asked):
        setting = chosen_elsewhere(method, [*asked[:place], *asked[place + 1 :]])
        mine, best = here.scores[method][setting], here.scores[here.best[0]][here.best[1]]
        settings.append(setting)
        lds.append(here.reporting.mean(mine))
        regrets.append(here.reporting.mean(best) - lds[-1])
    worst = max(range(len(asked)), key=regrets.__getitem__)
    here = asked[worst]
    # Of the worst alone: a bootstrap takes some seconds.
    behind = here.reporting.compared(here.scores[here.best[0]][here.best[1]], here.scores[method][settings[worst]])
    return Row(method, settings, lds, sum(regrets) / len(regrets), Value(regrets[worst], behind.low, behind.high))


def transfer(benches: Sequence[Bench]) -> list[str]:
    """The table of all benches, methods and worst cases as Markdown; nothing with fewer than two benches."""
    asked = [ask(bench) for bench in benches if is_ready(bench)]
    if len(asked) < 2:
        return []
    methods = [method for method in asked[0].chosen if all(method in one.chosen for one in asked)]
    rows = sorted((row_of(method, asked) for method in methods), key=lambda row: row.worst.mean)
    names = " | ".join(one.bench.name for one in asked)
    least = rows[0]
    lines = [
        "## On a bench that nobody tuned for",
        "",
        f"{NUMBERS[len(asked)]} small models were each trained again dozens to hundreds of times on half of their "
        "pictures, which shows what a generated picture owes to which of them. **LDS** says how well a method "
        "foretells that: 1 is perfect, 0 is chance. Each method comes with the setting that did best on the *other* "
        "benches, as on a model that nobody tuned for. **Worst regret** is what it lacks, on the bench where it lacks "
        "most, to the best "
        f"method tuned on that very bench; the smallest stands first ({LABELS[least.method].replace('**', '')}).",
        "",
        f"| method | LDS on {names} | worst regret | mean regret | settings, as chosen on the others |",
        "|---|" + "---|" * len(asked) + "---|---|---|",
    ]
    for row in rows:
        settings = "; ".join(dict.fromkeys(row.settings))
        cells = " | ".join(f"{value:.3f}" for value in row.lds)
        lines.append(f"| {LABELS[row.method]} | {cells} | {difference(row.worst)} | {row.mean:+.3f} | {settings} |")
    lines += [
        "",
        "A setting is chosen by the mean LDS on the choosing halves of all benches but one, and everything is reported "
        "on the reporting halves. The best tuned methods, whose settings were chosen on the bench itself: "
        + "; ".join(f"{one.bench.name}: {LABELS[one.best[0]].replace('**', '')}, {one.best[1]}" for one in asked)
        + ". No setting of a row has seen the bench that it is reported on, but digits and emoji were seen by "
        "whoever chose what is tried.",
    ]
    unasked = {method for one in asked for method in one.chosen} - set(methods)
    if unasked:
        names = ", ".join(f"{plain(method)} ({_lacking(method, asked)})" for method in LABELS if method in unasked)
        lines += ["", f"Not in the table, since a bench has no scores of them yet: {names}."]
    missing = [bench.name for bench in benches if bench.name not in [one.bench.name for one in asked]]
    if missing:
        lines += ["", f"Not in the table, since too few of its models are trained yet: {', '.join(missing)}."]
    return [*lines, ""]


def _lacking(method: str, asked: Sequence[Asked]) -> str:
    return ", ".join(one.bench.name for one in asked if method not in one.chosen)


def all_benches() -> list[Bench]:
    """All benches, by their names."""
    return [Bench(path.parent.name) for path in sorted(BENCHES.glob("*/bench.yaml"))]


def main() -> None:
    """Print the table."""
    print("\n".join(transfer(all_benches())))


if __name__ == "__main__":
    main()
