"""What an unlearning did to each target and to everything else, and what of it is out of the range of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_unlearn.errors import InputError, some_of
from lightning_unlearn.scores.step_reasons import WORDS
from lightning_unlearn.strategies import Problem, Strategy
from lightning_unlearn.strategies.step_range import squared_lengths


def outcomes(problem: Problem, strategy: Strategy) -> dict[str, dict[str, Any]]:
    """What each target's delta changed; every rank must call it.

    Args:
        problem: After a step.
        strategy: That took it.

    Returns:
        Target to its ``loss_before``, ``loss_after`` and ``rise`` (relative); its ``length``, that of its delta in
        lengths of the weights, unless they are all zero; with a Fisher ``penalty``, ½ δᵀFδ; where a slope is known
        ``linear``, the rise by the last step as a share of the first-order one; where samples are drawn
        ``others_before`` and ``others_after``, their mean loss; where a size was searched ``evaluations``, how often
        the loss was measured for it; and ``out_of_range``, short names of what leaves the range of a step or ended it
        there (:mod:`~lightning_unlearn.scores.step_reasons`).

    Raises:
        InputError: If a loss is beyond all numbers.
    """
    numbers = _measured(problem, strategy)
    found: dict[str, dict[str, Any]] = {}
    for number, target in enumerate(problem.targets):
        result: dict[str, Any] = {name: float(values[number]) for name, values in numbers.items()}
        if not abs(result["loss_after"]) < float("inf"):
            raise InputError(
                f"The loss of {target!r} is {result['loss_after']} after unlearning; choose a smaller step or a "
                "larger N, and check the model and the Fisher."
            )
        left = strategy.step_range.left_by(result)
        limited = strategy.limited.get(target)
        result["out_of_range"] = [*left, *([limited] if limited and limited not in left else [])]
        found[target] = result
    return found


def _measured(problem: Problem, strategy: Strategy) -> dict[str, Tensor]:
    """Each ``(Q,)``."""
    facts, before = strategy.facts, problem.losses(None, None)
    after = before * (1 + facts["rise"]) if "rise" in facts else problem.losses(problem.deltas, None)
    rise = after / before - 1
    found = {"loss_before": before, "loss_after": after, "rise": rise}
    if problem.weights_length > 0:
        found["length"] = squared_lengths(problem.deltas).sqrt() / problem.weights_length
    if problem.given_fisher is not None:
        found["penalty"] = 0.5 * problem.given_fisher.quadratic(problem.deltas)
    if "first_order" in facts and bool((before > 0).all()):
        found["linear"] = (rise - facts["risen_before"]) / (facts["first_order"] - facts["risen_before"])
    if problem.others is not None:
        found["others_before"] = problem.others(None, None)
        known = facts.get("others_after")
        found["others_after"] = problem.others(problem.deltas, None) if known is None else known
    if "evaluations" in facts:
        found["evaluations"] = facts["evaluations"]
    return found


def tell_of_range(found: Mapping[str, Mapping[str, Any]], strategy: Strategy) -> None:
    """Warn of targets whose deltas are out of range, by what is.

    Args:
        found: As :func:`outcomes` gives it.
        strategy: With the range.
    """
    for reason, words in WORDS.items():
        out = {target: result for target, result in found.items() if reason in result["out_of_range"]}
        if out and any(strategy.limited.get(target) is None for target in out):
            said = some_of([f"{target!r}: {_how_far(result)}" for target, result in out.items()])
            rank_zero_warn(
                f"The steps of {len(out)} of {len(found)} targets leave the range in which they mean something, since "
                f"{words} ({said}); choose a smaller step, or look at their scores with doubt."
            )


def _how_far(result: Mapping[str, Any]) -> str:
    said = [f"rise {result['rise']:.3g}"]
    if "length" in result:
        said.append(f"delta {result['length']:.3g} times as long as the weights")
    if "linear" in result:
        said.append(f"{result['linear']:.3g} of the first-order rise")
    if "others_after" in result:
        said.append(f"everything else {result['others_after'] / result['others_before'] - 1:+.3g}")
    return ", ".join(said)
