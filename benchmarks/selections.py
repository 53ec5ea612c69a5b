"""Which selection of weights answers best on each bench: what `auto` should mean; a part of the results page.

    python benchmarks/selections.py       # prints it; scores are those that methods.py keeps

Within each selection a method's setting is chosen on the half of the evidence that chooses, and reported on the other,
as everywhere. Several methods asked together have the settings that `Consensus` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benches import CHOSEN, Bench
from judged import Half, evidence
from method_settings import (
    ASKED_TOGETHER,
    CONSENSUS_DEFAULT,
    CONSENSUS_FIXED,
    CONSENSUS_PARTS,
    DEFAULT,
    DEFAULT_OF,
    DEFAULT_SETTINGS,
    ENDS,
    plain,
)
from packed import open_study
from score_files import files, read
from shown import difference, shown
from torch import Tensor

from lightning_unlearn.baselines.consensus import combined
from lightning_unlearn.evaluation.judging import scores_of
from lightning_unlearn.evaluation.results import Value

LEAST_MODELS = 10  # subset models of each half


def scores_by_selection(bench: Bench, order: Sequence[str]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Method to selection of weights to setting to ``(N, Q)``, of what is scored."""
    keys = bench.plan().keys
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for method in ASKED_TOGETHER:
        for selection, path in files(bench, method).items():
            if path.is_file():
                tables = read(bench, method, selection)
                scores = {
                    setting.removesuffix(ENDS[selection]): scores_of(table, keys, order)
                    for setting, table in tables.items()
                }
                found.setdefault(method, {})[selection] = scores
    parts = [(part, setting.removesuffix(ENDS["all"])) for part, setting in CONSENSUS_PARTS[CONSENSUS_DEFAULT]]
    for selection, scores in found.get(DEFAULT_OF, {}).items():
        usual = DEFAULT_SETTINGS[DEFAULT]
        found.setdefault(DEFAULT, {})[selection] = {usual: scores[usual]}
        if all(setting in found.get(part, {}).get(selection, {}) for part, setting in parts):
            asked = {part: found[part][selection][setting] for part, setting in parts}
            together = {CONSENSUS_DEFAULT: combined(asked, dict.fromkeys(asked, 1.0))}
            found.setdefault(CONSENSUS_FIXED, {})[selection] = together
    return found


def rows_of(
    scores: Mapping[str, Mapping[str, Tensor]], choosing: Half, reporting: Half
) -> dict[str, tuple[str, Value, Tensor]]:
    """Each selection of a method: the setting that was chosen, its LDS where it is reported, its scores."""
    found = {}
    for selection, by_setting in scores.items():
        setting = max(by_setting, key=lambda name: choosing.mean(by_setting[name]))
        found[selection] = (setting, reporting.value(by_setting[setting]), by_setting[setting])
    return found


def selections(benches: Sequence[Bench]) -> list[str]:
    """The table of all benches, methods and selections as Markdown; nothing where nothing is scored."""
    lines = []
    for bench in benches:
        if not (bench.folder / "study").is_dir() or not files(bench, DEFAULT_OF)[CHOSEN].is_file():
            continue
        study, halves = open_study(bench), bench.subsets(bench.plan())
        if any(len([run for run in runs if study.is_finished(run)]) < LEAST_MODELS for runs in halves):
            continue
        choosing, reporting = evidence(bench)
        for method, scores in scores_by_selection(bench, choosing.order).items():
            rows = rows_of(scores, choosing, reporting)
            if len(rows) < 2 or "all" not in rows:
                continue
            whole = rows["all"][2]
            for selection, (setting, value, own) in rows.items():
                less = "–"
                if selection != "all":
                    apart = reporting.compared(own, whole)
                    less = difference(Value(value.mean - rows["all"][1].mean, apart.low, apart.high))
                lines.append(
                    f"| {bench.name} | {plain(method)} | `{selection}` | {setting} | {shown(value)} | {less} |"
                )
    if not lines:
        return []
    return [
        "## Which weights",
        "",
        "By `python benchmarks/selections.py`: what the named selections of weights are worth for each method that is "
        "asked, LDS on the reporting half, its setting chosen on the other half within each selection. A "
        "U-Net's `text_kv` are the keys and values of its attention to the text; those of a joint-attention "
        "transformer are of the stream that the text enters by.",
        "",
        "| bench | method | weights | setting | LDS | less that of `all` |",
        "|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def main() -> None:
    """Print the table."""
    from transfer import all_benches

    print("\n".join(selections(all_benches())))


if __name__ == "__main__":
    main()
