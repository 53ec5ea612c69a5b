"""What is said where what was captured of a layer is not what its gradient grew by."""

from __future__ import annotations

from torch import nn

from lightning_unlearn.weights.rounding import Grown, Summed


def what_differs(name: str, kind: str, layer: nn.Module, captured: Summed | None, grown: Grown | None) -> str:
    """The sentence of the refusal, with the two norms as the random vectors tell them.

    Args:
        name: The layer's.
        kind: ``weight`` or ``bias``.
        layer: Linear or Conv2d.
        captured: What was captured of it, if anything was.
        grown: What the parameter's gradient grew by, if it did.

    Returns:
        It.
    """
    values = [captured.kinds[kind][0] if captured is not None else None, grown.probes if grown is not None else None]
    summed, own = (0.0 if value is None else float(value.square().mean().sqrt()) for value in values)
    return (
        f"What was captured of layer {name} is not the gradient of its {kind}: summed over the batch it has norm "
        f"{summed:.3g}, but the gradient grew by {own:.3g}. {_likely_cause(layer, captured is not None)}; leave the "
        "layer out by patterns, or take that away."
    )


def _likely_cause(layer: nn.Module, captured: bool) -> str:
    """Why a layer's gradient may be another than what is captured: a sentence without its full stop."""
    if not captured:
        return (
            "The layer is never called itself: its weight is used by a function (as in nn.MultiheadAttention), or its "
            "block was compiled before training"
        )
    if "forward" in vars(layer):
        return "Its forward was replaced by another function"
    if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return f"It is a {type(layer).__name__}, whose forward does something else with the weight"
    return (
        "Its weight is used elsewhere too (tied to another layer, or by a function), a hook changes its output, or the "
        "loss holds a gradient of the network (double backward)"
    )
