"""Per-sample gradients of chosen layers out of one ordinary backward pass, by hooks on inputs and output gradients.

A sample's gradient of a Linear weight is ``Σ_t g_t a_tᵀ`` over its positions ``t``, with the layer's input
``a (B, T, i)`` and the gradient ``g (B, T, o)`` at its output; a Conv2d is the same over its patches. The mean gradient
that a training step leaves in ``.grad`` can't give this: ``(mean g)² ≠ mean g²``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.kept_inputs import KeptInputs
from lightning_unlearn.weights.outermost_calls import OutermostCalls
from lightning_unlearn.weights.positions import positions_of


@dataclass(frozen=True)
class CapturedLayer:
    """What one backward pass tells of one layer.

    Attributes:
        inputs: ``a``, ``(B, T, i)``; for Conv2d ``i`` runs over input channels and kernel positions.
        output_gradients: ``g``, ``(B, T, o)``.
    """

    inputs: Tensor
    output_gradients: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def scaled(self, factors: Tensor | float) -> CapturedLayer:
        """The same with each sample's gradient multiplied.

        Args:
            factors: A number, or ``(B,)``.

        Returns:
            A layer whose gradients are scaled.
        """
        if isinstance(factors, Tensor):
            factors = factors.to(self.output_gradients)[:, None, None]
        return CapturedLayer(self.inputs, self.output_gradients * factors)

    def weight_gradients(self) -> Tensor:
        """Each sample's gradient of the weight, Conv2d kernels flattened.

        Returns:
            ``(B, o, i)``.
        """
        return torch.bmm(self.output_gradients.mT, self.inputs)

    def bias_gradients(self) -> Tensor:
        """Each sample's gradient of the bias.

        Returns:
            ``(B, o)``.
        """
        return self.output_gradients.sum(1)


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass, with the gradient that came back to it.

    Attributes:
        order: Its number among all uses of the chosen layers since the last :meth:`GradientCapture.clear`.
        call: The number of the outermost call that it was part of, of the network or of a part of it.
        layer: What was captured.
        dtype: The type that the layer worked in.
    """

    order: int
    call: int
    layer: CapturedLayer
    dtype: torch.dtype


class GradientCapture:
    """Watches layers during backward passes; use as a context manager, or call :meth:`attach` and :meth:`detach`.

    Nothing of the computation is changed. Forward passes without gradient, and uses of a layer whose weight takes none,
    are not seen. A layer that is used several times in one forward pass gives the sum of its uses (positions are put
    one after the other). When gradient checkpointing runs a layer again, only the run through which the gradient flows
    counts, since capture happens on gradients, and inputs are kept as autograd keeps them: what checkpointing frees is
    free.

    Args:
        layers: Layer name to Linear or Conv2d; the batch is the first dimension of their inputs.
        network: Where the layers are, so that uses in one call of it are told from those in several; without it every
            use is a call of its own.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with GradientCapture({"layer": layer}) as capture:
        ...     layer(torch.ones(4, 3)).sum().backward()
        >>> gradients = capture.take()["layer"].weight_gradients()
        >>> assert torch.equal(gradients.sum(0), layer.weight.grad) and gradients.shape == (4, 2, 3)
    """

    def __init__(self, layers: Mapping[str, nn.Module], network: nn.Module | None = None) -> None:
        self.layers = dict(layers)
        self.enabled = True
        self._calls = OutermostCalls(network, self.layers)
        self._handles: list[RemovableHandle] = []
        self._captured: dict[str, list[tuple[int, int, Tensor, Tensor]]] = {}
        self._changed: str | None = None  # a layer whose input was changed in place
        self._order = 0
        self._uses: dict[str, int] = {}  # in forward passes, without what checkpointing runs again
        self._inputs = KeptInputs()

    def attach(self) -> None:
        """Put the hooks on the layers."""
        self._handles.extend(self._calls.attach())
        for name, layer in self.layers.items():
            # Before hooks of others, which may change the output.
            hook = self._forward_hook(name)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))

    @property
    def pending(self) -> bool:
        """Whether gradients were captured that nobody took."""
        return bool(self._captured)

    def forget(self) -> None:
        """Forget what was captured, in the middle of a step whose forward pass is done."""
        self._captured, self._changed = {}, None
        self._inputs.clear()

    def clear(self) -> None:
        """Forget what was captured, and number uses and calls anew."""
        self.forget()
        self._order = 0
        self._uses.clear()
        self._calls.clear()

    def detach(self) -> None:
        """Take the hooks off and forget what was captured."""
        self.__exit__()
        self.clear()

    def __enter__(self) -> GradientCapture:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        # What was captured stays for take(); only the hooks go.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _forward_hook(self, name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> None:
            if not self.enabled or not isinstance(output, Tensor):
                return
            if torch._C._current_graph_task_id() == -1:  # not during backward
                self._uses[name] = self._uses.get(name, 0) + 1
            call = self._calls.of_a_use(name, differentiable=output.requires_grad)
            if not output.requires_grad:
                return
            if not any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
                return  # a pass through weights that have no turn: nobody's gradient
            inputs_of_this_use = self._inputs.keep(arguments[0] if arguments else keywords["input"], output)
            order = self._order
            self._order += 1

            def on_gradient(gradient: Tensor) -> None:
                try:
                    inputs = inputs_of_this_use()
                except RuntimeError as error:
                    if "inplace" not in str(error):
                        raise
                    self._changed = name
                    return
                self._captured.setdefault(name, []).append((order, call, inputs, gradient.detach()))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def is_complete(self, name: str) -> bool:
        """Whether gradients came to as many uses of a layer as forward passes had: then no more will come.

        Args:
            name: The layer's.

        Returns:
            Whether that is so. A use that no loss needs leaves it false to the end.
        """
        return 0 < self._uses.get(name, 0) <= len(self._captured.get(name, ()))

    def take_layer(self, name: str) -> list[Use]:
        """What was captured of one layer since the last call, which is forgotten.

        Args:
            name: The layer's.

        Returns:
            Its uses, as :meth:`take_uses` gives them.
        """
        return self._as_uses(name, self._captured.pop(name, []))

    def take_uses(self) -> dict[str, list[Use]]:
        """What was captured since the last call, use by use, and start anew.

        Returns:
            Layer name to its uses in the order of the forward pass, float32 or wider; layers that no gradient reached
            are left out.

        Raises:
            InputError: If a layer's input was changed in place after its use.
        """
        captured, self._captured = self._captured, {}
        changed, self._changed = self._changed, None
        if changed is not None:
            raise InputError(
                f"The input of layer {changed} was changed in place after its use, so its gradient can't be captured; "
                "change a copy instead, or leave the layer out by patterns."
            )
        return {name: self._as_uses(name, uses) for name, uses in captured.items()}

    def _as_uses(self, name: str, captured: list[tuple[int, int, Tensor, Tensor]]) -> list[Use]:
        return [
            Use(order, call, CapturedLayer(*positions_of(self.layers[name], inputs, gradients)), gradients.dtype)
            for order, call, inputs, gradients in sorted(captured, key=lambda use: use[0])
        ]

    def take(self) -> dict[str, CapturedLayer]:
        """What was captured since the last call, and start anew.

        Returns:
            Layer name to what was captured, float32 or wider; layers that no gradient reached are left out.

        Raises:
            InputError: If layers saw different numbers of rows, so that rows can't be samples.
        """
        return by_layer(self.take_uses())


def by_layer(uses: Mapping[str, list[Use]]) -> dict[str, CapturedLayer]:
    """Uses joined layer by layer.

    Args:
        uses: As :meth:`GradientCapture.take_uses` gives them.

    Returns:
        Layer name to what was captured.

    Raises:
        InputError: If layers saw different numbers of rows, so that rows can't be samples.
    """
    taken = {name: _join(name, [use.layer for use in found]) for name, found in uses.items()}
    rows = {len(layer) for layer in taken.values()}
    if len(rows) > 1:
        example = {len(layer): name for name, layer in taken.items()}
        raise InputError(
            "Layers see different numbers of rows in one batch ("
            + ", ".join(f"{name}: {count}" for count, name in sorted(example.items()))
            + "), so a row is not a sample; choose other layers by patterns."
        )
    return taken


def _join(name: str, uses: list[CapturedLayer]) -> CapturedLayer:
    if len(uses) == 1:
        return uses[0]
    if len({len(use) for use in uses}) > 1:
        raise InputError(
            f"Layer {name} was used on different numbers of rows in one backward pass, so a row is not a sample; "
            "leave it out by patterns."
        )
    return in_positions(uses)


def in_positions(uses: list[CapturedLayer]) -> CapturedLayer:
    """Uses of a layer on the same rows as one, whose positions follow one another.

    Args:
        uses: Of ``B`` rows each.

    Returns:
        Of ``B`` rows.
    """
    if len(uses) == 1:
        return uses[0]
    return CapturedLayer(
        torch.cat([use.inputs for use in uses], 1), torch.cat([use.output_gradients for use in uses], 1)
    )
