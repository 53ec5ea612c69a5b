"""Deltas of all targets, and a network's loss under θ₀ + δ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.weights.delta_terms import DeltaTerms
from lightning_unlearn.weights.precision import autocasts, without_autocast
from lightning_unlearn.weights.widened import WidenedWeights, half_type

# What a checkpoint says of its deltas.
CHECKPOINT_KEY = "unlearning"


class DeltaStore(nn.Module):
    """The deltas of all targets, stacked: one parameter ``(Q, *weight)`` for each chosen weight.

    Args:
        parameters: The chosen weights by name; deltas lie on their devices, in float32 or wider, and start at zero.
        targets: Names of the ``Q`` targets.
    """

    def __init__(self, parameters: Mapping[str, Tensor], targets: Sequence[str]) -> None:
        super().__init__()
        self.targets = list(targets)
        self._names = {name: name.replace(".", "/") for name in parameters}  # a parameter's name must not hold dots
        for name, parameter in parameters.items():
            size, dtype = (len(targets), *parameter.shape), torch.promote_types(parameter.dtype, torch.float32)
            self.register_parameter(self._names[name], nn.Parameter(parameter.new_zeros(size, dtype=dtype)))

    def named(self) -> dict[str, Tensor]:
        """The stacked deltas.

        Returns:
            Parameter name in the network to ``(Q, *parameter)``.
        """
        return {name: self.get_parameter(stored) for name, stored in self._names.items()}


class NetworkLoss(nn.Module):
    """A network with its loss, to be called under other weights.

    Deltas are added to the weights that they change, in float32 or wider: weights that lie in half precision are
    widened layer by layer (:class:`~lightning_unlearn.weights.widened.WidenedWeights`). Under a Trainer's autocast,
    which would round the sum and lose the delta, deltas are terms of their own
    (:class:`~lightning_unlearn.weights.delta_terms.DeltaTerms`); with gradient checkpointing, too, since layers are
    computed again when the other weights are gone.

    Args:
        network: The denoiser; in eval mode if it is checkpointed.
        objective: Its loss.
        layers: The chosen layers, of which there are deltas.
    """

    def __init__(self, network: nn.Module, objective: Objective, layers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.checkpointed = False
        # Not members: they are the network's own.
        self._layers: Mapping[str, nn.Module] = layers or {}
        self._terms = DeltaTerms(self._layers)
        self._under = False  # whether the call is of other weights
        # Looking for tied weights at every call takes about as long as a small network's forward; they don't change.
        self._tied = self._members(remove_duplicate=False) > self._members(remove_duplicate=True)
        self._widened: WidenedWeights | None = None
        self._widen()

    def _members(self, *, remove_duplicate: bool) -> int:
        found = (self.named_parameters, self.named_buffers)
        return sum(1 for members in found for _ in members(remove_duplicate=remove_duplicate))

    def _widen(self) -> None:
        if self._widened is not None:
            self._widened.remove()
        self._widened = None if half_type(self.network) is None else WidenedWeights(self.network)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen()  # it may have cast the weights
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the latents and conditions that it takes; float32 beside weights in half precision."""
        return torch.float32 if self.widens else next(self.network.parameters()).dtype

    @property
    def widens(self) -> bool:
        """Whether weights lie in half precision, and are widened for each call."""
        return self._widened is not None

    @property
    def rounds(self) -> bool:
        """Whether layers are computed in lower precision than deltas need."""
        return autocasts(self.device)

    def forward(self, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view: ``(B,)``; see :meth:`Objective.__call__`."""
        if not self._under:  # what a checkpointed pass left, perhaps one that failed
            self._terms.release()
        return self.objective(self.network, batch, timesteps, noise)

    def target_weights(self, deltas: Mapping[str, Tensor], target: int) -> dict[str, Tensor]:
        """What :meth:`under` takes to give the losses with a target unlearned; the base weights are not touched.

        Args:
            deltas: Parameter name to ``(Q, *parameter)``.
            target: Number of the target.

        Returns:
            Parameter name to ``θ₀ + δ``, or to ``δ`` where that is a term of its own.
        """
        if self.checkpointed or self.rounds:
            return {name: delta[target] for name, delta in deltas.items()}
        own = {name: self.network.get_parameter(name).detach() for name in deltas}
        types = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in own.items()}
        return {name: own[name].to(kind) + deltas[name][target].to(kind) for name, kind in types.items()}

    def under(self, weights: Mapping[str, Tensor], batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The loss of each view under other weights.

        Args:
            weights: As :meth:`target_weights` gives them; empty for the network's own.
            batch: ``B`` latents and texts.
            timesteps: ``(B,)``.
            noise: ``(B, C, H, W)``.

        Returns:
            ``(B,)``.
        """
        if self.checkpointed or self.rounds:
            self._terms.hold(weights)
            self._under = True
            try:
                losses: Tensor = self(batch, timesteps, noise)
            finally:
                self._under = False
                if not (self.checkpointed and torch.is_grad_enabled()):
                    self._terms.release()
            return losses
        named = {f"network.{name}": weight for name, weight in weights.items()}
        losses = functional_call(self, named, (batch, timesteps, noise), tie_weights=self._tied)
        return losses

    def release(self) -> None:
        """Leave the network's layers as they were, after a backward pass that computes them again."""
        self._terms.release()

    @contextmanager
    def exact(self) -> Iterator[None]:
        """While it lasts, the network computes in float32, and is not compiled.

        Yields:
            Nothing.
        """
        compiled, self.network._compiled_call_impl = self.network._compiled_call_impl, None
        try:
            with without_autocast(self.device):
                yield
        finally:
            self.network._compiled_call_impl = compiled


def relative_distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """``‖θ - θ'‖ / ‖θ'‖`` over the weights that both have.

    Args:
        ours: Name to weight.
        theirs: Name to weight.

    Returns:
        The distance, 0 if they share none.
    """
    shared = [name for name in ours if name in theirs]
    difference = sum(
        float((ours[name].detach().cpu().double() - theirs[name].double()).square().sum()) for name in shared
    )
    norm = sum(float(theirs[name].double().square().sum()) for name in shared)
    return float(torch.tensor(difference / norm).sqrt()) if norm else 0.0
