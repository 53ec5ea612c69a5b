"""The plots of the results page: what methods foretell, and what removing the images that they name does."""

from __future__ import annotations

import matplotlib
from judged import OURS, Page
from matplotlib.figure import Figure
from method_settings import plain

from lightning_unlearn.evaluation.results import Removal


def plot(page: Page) -> None:
    """Both plots of a bench."""
    rows = page.rows[::-1]
    names = [plain(row.method) for row in rows]
    colours = ["#c2410c" if row.method == OURS else "#475569" for row in rows]
    figure = Figure(figsize=(7.5, 0.36 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        for value, offset, style in ((row.raw, 0.12, "o"), (row.by_rank, -0.16, "D")):
            axes.plot([value.low, value.high], [place + offset] * 2, color=colour, linewidth=1.4)
            face = colour if style == "o" else "white"
            axes.plot(value.mean, place + offset, style, color=colour, markersize=5, markerfacecolor=face)
    if page.ceiling is not None:
        axes.axvspan(page.ceiling.low, page.ceiling.high, color="#0f766e", alpha=0.12)
        axes.axvline(page.ceiling.mean, color="#0f766e", linewidth=1, label="noise ceiling")
        axes.legend(loc="lower right", frameon=False)
    axes.axvline(0, color="#94a3b8", linewidth=0.8)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlabel("LDS: as it is (●), by ranks only (◇); 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(page.bench.folder / "lds.png", dpi=130)
    _plot_removals(page)


def _plot_removals(page: Page) -> None:
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.add_subplot()
    samples = page.facts["samples"]
    shown = [row for row in page.rows if any(isinstance(found, Removal) for found in row.removals.values())]
    colours = matplotlib.colormaps["tab10"].colors
    for place, row in enumerate(shown):
        done = {size: found.changes["loss"] for size, found in row.removals.items() if isinstance(found, Removal)}
        # Beside each other, so that no interval hides another.
        shares = [100 * size / samples * 1.022 ** (place - len(shown) / 2) for size in done]
        means = [value.mean * 1e3 for value in done.values()]
        reach = [
            [(value.mean - value.low) * 1e3 for value in done.values()],
            [(value.high - value.mean) * 1e3 for value in done.values()],
        ]
        width, colour = (2.4, "#c2410c") if row.method == OURS else (1.0, colours[place % len(colours)])
        axes.errorbar(
            shares,
            means,
            reach,
            fmt="o-" if place < len(colours) else "s--",  # a colour stands for two methods, but not a line
            markersize=4,
            linewidth=width,
            elinewidth=0.9,
            color=colour,
            label=plain(row.method),
        )
    axes.set_xscale("log")
    ticks = [100 * size / samples for size in page.rows[0].removals]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    if page.random:
        shares = [100 * size / samples for size in page.random]
        values = [found["loss"] for found in page.random.values()]
        lows, highs = [value.low * 1e3 for value in values], [value.high * 1e3 for value in values]
        axes.fill_between(shares, lows, highs, color="#94a3b8", alpha=0.35, label="random removal, mean and 95 %")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.set_xlabel("removed, % of the training images")
    axes.set_ylabel("change of the query's loss, × 10⁻³")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(page.bench.folder / "removal.png", dpi=130)
