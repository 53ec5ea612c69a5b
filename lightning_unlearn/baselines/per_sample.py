"""Gradients of an output function at single samples, averaged over views, by hooks on an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_unlearn.baselines.base import Subject
from lightning_unlearn.baselines.sample_gradients import Gradients
from lightning_unlearn.baselines.sketch import Sketch
from lightning_unlearn.diffusion.families.noted import noted_predictions
from lightning_unlearn.draws.views import View
from lightning_unlearn.errors import InputError
from lightning_unlearn.unlearning.scoring import cast_view
from lightning_unlearn.weights.capture import CapturedLayer, GradientCapture, Use, by_layer
from lightning_unlearn.weights.differing import what_differs
from lightning_unlearn.weights.growth import GradientGrowth
from lightning_unlearn.weights.parameters import layer_parameters
from lightning_unlearn.weights.precision import ExactFloat32
from lightning_unlearn.weights.projection import Projection

Output = Literal["loss", "square", "mean"]

# Of each view: the loss as the objective has it, and the mean square and sum of what the network predicts. The sum is
# brought to a mean once it is a gradient: the one at the last layer's output is then 1 everywhere, and its sums are
# exact; sums of a thousand times 1/768 are all rounded in one direction, and would seem to be another layer's.
OUTPUTS: dict[Output, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda losses, predictions: losses,
    "square": lambda losses, predictions: predictions.square().flatten(1).mean(1),
    "mean": lambda losses, predictions: predictions.flatten(1).sum(1),
}
# In place of the length of a gradient that is zero.
TINY = torch.finfo(torch.float32).tiny


def mean_gradients(
    subject: Subject, keys: Sequence[str], views: Iterable[View], output: Output, *, per_timestep: bool = False
) -> Gradients:
    """Mean gradients over given views.

    Args:
        subject: The model.
        keys: ``B`` keys.
        views: Views whose rows count in ``keys``.
        output: Of which output function.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.

    Returns:
        Of the ``B`` samples.

    Raises:
        InputError: If a gradient is not finite, rows of the layers are not samples, or what was captured of a layer is
            not its gradient.
    """
    return mean_gradients_of(subject, keys, views, [output], per_timestep=per_timestep)[output]


def mean_gradients_of(
    subject: Subject,
    keys: Sequence[str],
    views: Iterable[View],
    outputs: Sequence[Output],
    *,
    per_timestep: bool = False,
    shares: Sequence[Sequence[float]] | None = None,
) -> dict[Output, Gradients]:
    """Mean gradients of several output functions over given views: one forward pass a view, one backward pass each.

    Args:
        subject: The model.
        keys: ``B`` keys.
        views: Views whose rows count in ``keys``.
        outputs: Of which output functions; each once.
        per_timestep: Whether each view's gradient is brought to length 1 before the mean.
        shares: Of each sample, those of its captions in training; ``None`` if all are alike.

    Returns:
        Output function to the gradients of the ``B`` samples.

    Raises:
        InputError: If a gradient is not finite, rows of the layers are not samples, or what was captured of a layer is
            not its gradient.
    """
    parameters = layer_parameters(subject.layers)
    sizes = {name: weight.numel() for name, weight in parameters.items()}
    if subject.projection is not None:
        sizes = subject.projection.sizes
    # The chosen weights may be an adapter's, wider than the base that sees the views.
    first, some = next(subject.loss.network.parameters()), next(iter(parameters.values()))
    device = first.device
    wide = torch.promote_types(some.dtype, torch.float32)
    sums = {
        output: {name: torch.zeros(len(keys), numbers, device=device, dtype=wide) for name, numbers in sizes.items()}
        for output in outputs
    }
    errors, mean_losses, counts = (torch.zeros(len(keys), dtype=torch.float64) for _ in range(3))
    with (
        ExactFloat32(),
        _differentiable(subject),
        _predictions(subject) as seen,
        GradientCapture(subject.layers) as capture,
    ):
        for view in views:
            view = cast_view(view, device, subject.loss.dtype)
            losses = subject.loss(view.batch, view.timesteps, view.noise)
            predictions = seen[-1].to(losses.dtype)
            rows, counted = view.rows.to(device), _counted(view, shares)
            for number, output in enumerate(outputs, 1):
                values = OUTPUTS[output](losses, predictions)
                # So that hooks see what passes; the sum of a batch's gradients is only for comparison.
                own = torch.autograd.grad(
                    values.sum(), list(parameters.values()), allow_unused=True, retain_graph=number < len(outputs)
                )
                uses = capture.take_uses()
                _refuse_what_differs(subject, uses, dict(zip(parameters, own, strict=True)))
                found = _flat(by_layer(uses), parameters, len(view.rows), subject.projection)
                if output == "mean":
                    count = predictions[0].numel()
                    found = ((name, gradient / count) for name, gradient in found)
                if per_timestep:
                    whole = _added_up(found)
                    norms = torch.stack([gradient.square().sum(1) for gradient in whole.values()]).sum(0).sqrt()
                    found = ((name, gradient / norms.clamp(min=TINY)[:, None]) for name, gradient in whole.items())
                for name, gradient in found:
                    sums[output][name].index_add_(0, rows, _weighted(gradient, counted))
            for total, measured in ((errors, losses.detach().sqrt()), (mean_losses, losses.detach())):
                total.index_add_(0, view.rows.cpu(), _weighted(measured.cpu().double(), counted))
            counts.index_add_(0, view.rows.cpu(), counted)
            seen.clear()
    return {output: _means(keys, totals, (errors, mean_losses), counts) for output, totals in sums.items()}


def _counted(view: View, shares: Sequence[Sequence[float]] | None) -> Tensor:
    """``(b,)`` float64: what a view counts in the mean of each of its samples."""
    if shares is None:
        return torch.ones(len(view.rows), dtype=torch.float64)
    return torch.tensor([shares[row][view.caption] for row in view.rows.tolist()], dtype=torch.float64)


def _weighted(values: Tensor, counted: Tensor) -> Tensor:
    """Rows multiplied; one that counts nothing is 0, even where it is no number."""
    factors = counted.to(values).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(factors > 0, factors * values, 0.0)


def _means(
    keys: Sequence[str], sums: Mapping[str, Tensor], measured: tuple[Tensor, Tensor], counts: Tensor
) -> Gradients:
    """Sums over views, divided by their number; refused where they are not finite."""
    means = {name: (total / counts.to(total)[:, None]).cpu() for name, total in sums.items()}
    finite = torch.stack([mean.isfinite().all(1) for mean in means.values()]).all(0)
    if not finite.all():
        bad = next(key for key, fine in zip(keys, finite.tolist(), strict=True) if not fine)
        raise InputError(f"The gradient of {bad!r} is not finite; check the sample and the model.")
    return Gradients(means, *(total / counts for total in measured))


def _refuse_what_differs(subject: Subject, uses: Mapping[str, list[Use]], own: Mapping[str, Tensor | None]) -> None:
    """Hold what was captured, summed over rows, against the parameters' own gradients."""
    growth = GradientGrowth(subject.layers)
    sums = {name: growth.summed(name, found) for name, found in uses.items()}
    grown = {
        (name, kind): growth.grown(name, kind, gradient)
        for name in subject.layers
        for kind in ("weight", "bias")
        if (gradient := own.get(f"{name}.{kind}")) is not None
    }
    ratios, names = growth.differences(sums, grown)
    for (name, kind), ratio in zip(names, ratios.tolist(), strict=True):
        if ratio > 1:
            raise InputError(what_differs(name, kind, subject.layers[name], sums.get(name), grown.get((name, kind))))


def _flat(
    captured: Mapping[str, CapturedLayer],
    parameters: Mapping[str, Tensor],
    rows: int,
    projection: Projection | Sketch | None,
) -> Iterator[tuple[str, Tensor]]:
    # Name and (b, numbers) of each parameter's gradients, or what is left of them: one after the other, since each may
    # be large; without layers that no gradient reached.
    for name, layer in captured.items():
        if len(layer) != rows:
            raise InputError(
                f"Layer {name} sees {len(layer)} rows for {rows} samples, so a row is not a sample; leave it out by "
                "patterns."
            )
        if isinstance(projection, Projection):
            yield from projection.of(name, layer).items()
            continue
        yield from _named(f"{name}.weight", layer.weight_gradients().flatten(1), projection)
        if f"{name}.bias" in parameters:
            yield from _named(f"{name}.bias", layer.bias_gradients(), projection)


def _named(name: str, gradients: Tensor, sketch: Sketch | None) -> Iterator[tuple[str, Tensor]]:
    yield (name, gradients) if sketch is None else ("sketch", sketch(name, gradients))


def _added_up(found: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Of a sketch there comes a part for each parameter."""
    whole: dict[str, Tensor] = {}
    for name, gradient in found:
        whole[name] = whole[name] + gradient if name in whole else gradient
    return whole


@contextmanager
def _differentiable(subject: Subject) -> Iterator[None]:
    """While it lasts, the chosen weights require gradients: none would arrive at layers that are fed by text."""
    parameters = list(layer_parameters(subject.layers).values())
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


@contextmanager
def _predictions(subject: Subject) -> Iterator[list[Tensor]]:
    """While it lasts, what the network predicts is noted; the objective, whatever it is, calls the network itself."""
    # A family notes after the network's own output what of it is the prediction: the last word of a call.
    with noted_predictions() as seen:

        def note(network: Any, arguments: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if isinstance(first, Tensor):
                seen.append(first)

        handle = subject.loss.network.register_forward_hook(note)
        try:
            yield seen
        finally:
            handle.remove()
