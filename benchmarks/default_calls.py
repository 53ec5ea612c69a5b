"""How often the default of `attribute` calls the sample model, and how often unlearning by itself does.

    python benchmarks/default_calls.py --work runs/default_calls

Attributes the shipped queries twice and counts what passes through the network, a view each: forward passes, backward
passes, and which of them are the search of the step. Unlearning by itself, halfway to the data's loss over all views,
was the default of 0.1.0. Takes six minutes on one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import CONFIGS, parser, show
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_unlearn.command_line.cli import main as command
from lightning_unlearn.unlearning.fixed_draws import FixedDraws

QUERIES = 8
METHODS = {"default": "auto", "0.1.0": "unlearning"}
SEARCH_SHARE = 0.1


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """While it lasts, views that pass through the network are counted, forwards and backwards."""
    from diffusers import UNet2DConditionModel

    counts: Counter[str] = Counter()
    searching = [0]

    def back(gradient: Tensor) -> None:
        counts["backward"] += len(gradient)

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            sample: Tensor = output[0]
            counts["search" if searching[0] else "forward"] += len(sample)
            if sample.requires_grad and torch.is_grad_enabled():
                sample.register_hook(back)

    def watched(measure: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
        searching[0] += 1
        try:
            return measure(*arguments, **named)
        finally:
            searching[0] -= 1

    names = ("target_losses", "other_losses")
    measures = {name: getattr(FixedDraws, name) for name in names}
    handle = register_module_forward_hook(note)
    for name, measure in measures.items():
        # A function, so that it is bound as a method.
        setattr(FixedDraws, name, lambda *given, measure=measure, **named: watched(measure, *given, **named))
    try:
        yield counts
    finally:
        handle.remove()
        for name, measure in measures.items():
            setattr(FixedDraws, name, measure)


def main() -> None:
    """Count, and print."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument("--work", type=Path, default=Path("runs/default_calls"))
    arguments_parser.add_argument("options", nargs="*", help="more options of `lightning-unlearn attribute`, after --")
    arguments = arguments_parser.parse_args()
    found: dict[str, Counter[str]] = {}
    for name, method in METHODS.items():
        options = ["--config", str(CONFIGS / "sample.yaml"), "--output", str(arguments.work / name)]
        with counted() as counts:
            if command(
                [
                    "attribute",
                    *options,
                    "--method",
                    method,
                    "--trainer.enable_progress_bar",
                    "false",
                    *arguments.options,
                ]
            ):
                raise SystemExit(1)
        found[name] = counts
    totals = {name: counts.total() for name, counts in found.items()}
    searched = found["default"]["search"] / totals["default"]
    lines = [
        f"{name}: {totals[name] / QUERIES:,.0f} calls a query, {counts['forward'] / QUERIES:,.0f} forwards, "
        f"{counts['backward'] / QUERIES:,.0f} backwards, {counts['search'] / QUERIES:,.0f} in the search of the step"
        for name, counts in found.items()
    ]
    lines.append(f"{searched:.1%} of the default's calls are the search of the step; at most {SEARCH_SHARE:.0%}")
    share = totals["default"] / totals["0.1.0"]
    met = share <= 1 and searched <= SEARCH_SHARE
    show(
        "calls",
        share,
        "at most 1 of those of 0.1.0",
        met,
        lines,
        {name: dict(c) for name, c in found.items()},
        arguments.json,
    )


if __name__ == "__main__":
    main()
