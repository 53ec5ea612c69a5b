"""What the backward passes of a batch left at the chosen layers, and whether it is what it seems."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.capture import GradientCapture, Use
from lightning_unlearn.weights.growth import GradientGrowth
from lightning_unlearn.weights.rounding import Grown, Summed, norms

Taker = Callable[[str, list[Use]], None]


class BatchWatch:
    """Hooks on the chosen layers during a fit, that are listened to in the batches that are to be taken.

    What came to a layer is given away as soon as the layer's gradient is complete, in the middle of the backward pass:
    kept until its end, it would be all the activations that gradient checkpointing saves. Of a layer that is run in a
    pass without gradient, too, it is not known before the end whether more will come.

    Args:
        network: That the layers are in.
        layers: The chosen layers, by name.
        target: Dotted name of the network, for messages.
        take_layer: Takes a layer's uses in a backward pass.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], target: str, take_layer: Taker) -> None:
        self.target = target
        self._network = network
        self._layers = dict(layers)
        self._take_layer = take_layer
        self._sums: dict[str, Summed] = {}  # of the layers that were given away
        self._growth = GradientGrowth(layers, self._give_away_complete)
        self._growth.attach()
        self._capture = GradientCapture(layers, network)
        self._capture.attach()
        self._loss_factor: Tensor | None = None  # the gradient at the loss itself
        self._told: list[float] = []  # factors of the loss that a warning was given of
        self._inside = False  # Lightning's backward pass
        self._foreign = False  # a backward pass that Lightning did not run has left gradients
        self._saw_backward = False  # in this batch
        self._watched = self._saw_gradient = False  # in this fit
        self._listen(False)

    def _listen(self, on: bool) -> None:
        self._capture.enabled = self._growth.enabled = on

    def begin(self, *, take: bool) -> None:
        """A batch begins.

        Args:
            take: Whether its gradients are to be taken.

        Raises:
            InputError: If a layer is another than at the start.
        """
        self._listen(take)
        self._capture.clear()
        self._growth.take()
        self._saw_backward = self._inside = self._foreign = False
        if not take:
            return
        for name, layer in self._layers.items():
            if self._network.get_submodule(name) is not layer:
                raise InputError(
                    f"Layer {name} of {self.target!r} was replaced by another in the middle of training; replace it "
                    "before fit, or leave it out by patterns."
                )
        self._growth.look()

    def before_backward(self, loss: Tensor) -> None:
        """Lightning's backward pass begins; gradients from before are of the training step's own purposes.

        Args:
            loss: From which it goes.
        """
        if not self._capture.enabled:
            return
        self._notice_foreign()
        if self._foreign and self.no_gradients():
            self._foreign = False  # zeroed: they lead nowhere
        self._saw_backward = self._inside = True
        self._capture.forget()
        self._growth.take()
        self._sums = {}
        self._loss_factor = None
        if loss.requires_grad:
            loss.register_hook(self._note_factor)  # type: ignore[no-untyped-call]

    def _note_factor(self, gradient: Tensor) -> None:
        self._loss_factor = gradient.detach()

    def _notice_foreign(self) -> None:
        self._foreign |= self._growth.accumulated and not self._inside

    def _give_away_complete(self, name: str) -> None:
        # Before Lightning's backward pass, gradients are of the training step's own purposes.
        if self._inside and name not in self._sums and self._capture.is_complete(name):
            self._give_away(name, self._capture.take_layer(name))

    def _give_away(self, name: str, uses: list[Use]) -> None:
        with torch.autocast(uses[0].layer.inputs.device.type, enabled=False):
            self._sums[name] = self._growth.summed(name, uses)
            self._take_layer(name, uses)

    def take(self, loss_scale: float) -> bool | None:
        """Give away what is left of a backward pass, and be sure that it is what the layers' parameters got.

        Args:
            loss_scale: What the user says that the loss is multiplied with.

        Returns:
            Whether all gradients that came are finite; nothing if the batch is not to be taken, or no gradient came.

        Raises:
            InputError: If a parameter's gradient grew by something else than what was captured.
        """
        if not self._capture.enabled:
            return None
        self._inside = False
        uses, grown = self._capture.take_uses(), self._growth.take()
        if again := uses.keys() & self._sums.keys():
            raise InputError(
                f"Layer {min(again)} got more gradients after its own was complete, from a second backward pass over "
                "the same forward pass; add the losses up and go back once."
            )
        for name, found in uses.items():
            self._give_away(name, found)
        if not self._sums and not grown:
            return None
        self._saw_gradient = True
        self._refuse_partly_frozen(self._sums)
        ratios, names = self._growth.differences(self._sums, grown)
        device = ratios.device
        factor = self._loss_factor if self._loss_factor is not None else torch.ones((), device=device)
        # What is not finite makes its row's number, and so their sum, not finite. Asked once for all: each answer waits
        # for the device.
        sums = [numbers.sum().to(device) for summed in self._sums.values() for numbers in summed.kinds.values()]
        numbers = torch.stack([factor.sum().to(device, torch.float64), *sums])
        factor_seen, *answers = torch.cat([numbers, ratios.double()]).tolist()
        off = answers[len(sums) :]
        if not all(map(math.isfinite, answers[: len(sums)])) or any(map(math.isnan, off)):
            return False
        for (name, kind), ratio in zip(names, off, strict=True):
            if ratio > 1:
                self._refuse(name, kind, grown.get((name, kind)))
        self._tell_of_factor(factor_seen, loss_scale)
        return True

    def _tell_of_factor(self, seen: float, loss_scale: float) -> None:
        if seen != 1 and loss_scale == 1:
            raise InputError(
                f"The backward pass multiplies the loss by {seen:g}, which can't be told from the loss itself; "
                f"set loss_scale={seen:g} of FisherAccumulator, times any other factor of the loss."
            )
        if seen not in (1, loss_scale, *self._told):
            self._told.append(seen)
            rank_zero_warn(
                f"The backward pass multiplies the loss by {seen:g} itself, and FisherAccumulator undoes "
                f"loss_scale={loss_scale:g}; that must be {seen:g} times any other factor of the loss."
            )

    def _refuse(self, name: str, kind: str, grown: Grown | None) -> None:
        captured, own = norms(self._sums.get(name), grown, kind)
        cause = likely_cause(self._layers[name], name in self._sums)
        raise InputError(
            f"What was captured of layer {name} is not the gradient of its {kind}: summed over the batch it has norm "
            f"{captured:.3g}, but the gradient grew by {own:.3g}. {cause}; "
            "leave the layer out by patterns, or take that away."
        )

    def _refuse_partly_frozen(self, used: Collection[str]) -> None:
        frozen = [
            name
            for name, layer in self._layers.items()
            if not all(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        ]
        if frozen and used:
            raise InputError(
                f"{len(frozen)} of the chosen layers (e.g. {frozen[0]}) are frozen in a backward pass that others "
                f"(e.g. {next(iter(used))}) get gradients from, so they would be of different samples; choose layers "
                "that are trained together."
            )

    def no_gradients(self) -> bool:
        """Whether the gradients of the chosen parameters are zeroed.

        Returns:
            Whether none has one that is not zero.
        """
        gradients = [parameter.grad for layer in self._layers.values() for parameter in layer.parameters(recurse=False)]
        return not any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    def refuse_foreign(self) -> None:
        """Refuse gradients from a backward pass that Lightning did not run, if they are still there.

        Raises:
            InputError: If so.
        """
        if not self._capture.enabled:
            return
        self._notice_foreign()
        if self._foreign and not self.no_gradients():
            raise InputError(
                "loss.backward() in training_step can't be followed; call self.manual_backward(loss) instead."
            )

    def end(self, *, automatic_optimization: bool) -> None:
        """A batch ends; nothing is seen until the next one.

        Args:
            automatic_optimization: Whether Lightning makes the steps. With manual optimization other networks may have
                their turn first.

        Raises:
            InputError: If there was a backward pass that Lightning did not run, or no gradient came.
        """
        self.refuse_foreign()
        if self._capture.enabled and self._saw_backward:
            self._watched = True
            if automatic_optimization:
                self.refuse_silence()
        self._capture.clear()
        self._listen(False)

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
        self._growth.detach()


def likely_cause(layer: nn.Module, captured: bool) -> str:
    """Why a layer's gradient may be another than what is captured.

    Args:
        layer: Linear or Conv2d.
        captured: Whether anything was.

    Returns:
        A sentence without its full stop.
    """
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
