"""Which backward passes of a training are taken, and whether any gradient came."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.capture import CapturedLayer, GradientCapture


class BatchWatch:
    """Hooks on the chosen layers during a fit, that are listened to in the batches that are to be taken.

    Args:
        layers: The chosen layers, by name.
        target: Dotted name of the network, for messages.
    """

    def __init__(self, layers: Mapping[str, nn.Module], target: str) -> None:
        self.target = target
        self._capture = GradientCapture(layers)
        self._capture.enabled = False
        self._capture.attach()
        self._saw_backward = False  # in this batch
        self._watched = self._saw_gradient = False  # in this fit

    def begin(self, *, take: bool) -> None:
        """A batch begins.

        Args:
            take: Whether its gradients are to be taken.
        """
        self._capture.enabled = take
        self._capture.clear()
        self._saw_backward = False

    def before_backward(self) -> None:
        """Lightning's backward pass begins; gradients from before are of the training step's own purposes."""
        self._saw_backward = True
        self._capture.clear()

    def take(self) -> dict[str, CapturedLayer]:
        """What a backward pass left.

        Returns:
            Layer name to captured gradients; nothing if the batch is not to be taken, or no gradient came.
        """
        if not self._capture.enabled:
            return {}
        captured = self._capture.take()
        self._saw_gradient |= bool(captured)
        return captured

    def end(self, *, automatic_optimization: bool) -> None:
        """A batch ends; nothing is seen until the next one.

        Args:
            automatic_optimization: Whether Lightning makes the steps. With manual optimization other networks may have
                their turn first.

        Raises:
            InputError: If there was a backward pass that Lightning did not run, or no gradient came.
        """
        if self._capture.pending and not self._saw_backward:
            raise InputError(
                "loss.backward() in training_step can't be followed; call self.manual_backward(loss) instead."
            )
        if self._capture.enabled and self._saw_backward:
            self._watched = True
            if automatic_optimization:
                self.refuse_silence()
        self._capture.enabled = False

    def refuse_silence(self) -> None:
        """Refuse to go on if batches were watched and no gradient came.

        Raises:
            InputError: If so.
        """
        if self._watched and not self._saw_gradient:
            raise InputError(
                f"No gradient reached any chosen layer of {self.target!r} in the batches that were to be taken; "
                "use the network in the loss, and don't compile it."
            )

    def detach(self) -> None:
        """Take the hooks off."""
        self._capture.detach()
