"""What every Fisher can do."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_unlearn.data.files import reason_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher.files import read_file, write_file
from lightning_unlearn.weights.capture import CapturedLayer
from lightning_unlearn.weights.parameters import LayerSpec

# Of the losses whose gradients are taken: the data's (the empirical Fisher), or drawn from the model (the true one).
Targets = Literal["data", "model"]


class Fisher(ABC):
    """Fisher information of chosen layers, collected from per-sample gradients.

    The state is sums over samples, so merging ranks and runs is addition. A kind that is collected in stages sums in
    the later ones within what the earlier ones gave; that is part of the state, too, and never added.

    Args:
        layers: The layers it covers, by name.

    Attributes:
        kind: The name in files and configs.
        stages: The names of the stages it is collected in, in order; empty if there is but one.
        count: How many samples it was summed over (in this stage).
        targets: Of the losses: ``data``, as in a training, for the empirical Fisher, or ``model``, drawn from the
            model, for the true one (Kunstner et al., arXiv 1905.12558, on how they differ).
        provenance: How it came about, as JSON: objective, steps, EMA or not.
        weights: The chosen weights where it was taken, or empty.
    """

    kind: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layers: Mapping[str, LayerSpec]) -> None:
        self.layers = dict(layers)
        self.count = 0
        self.targets: Targets = "data"
        self.provenance: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all covered parameters by name."""
        return {name: shape for layer in self.layers.values() for name, shape in layer.parameter_shapes.items()}

    @property
    def stage(self) -> str | None:
        """The stage it is in; none if there is but one."""
        return None

    def next_stage(self) -> None:
        """Go on to the next stage, with what the sums of this one gave and no sample.

        Raises:
            InputError: If there is none.
        """
        raise InputError(f"A {self.kind} Fisher has no further stage of collection; finalize it.")

    @abstractmethod
    def update(self, captured: Mapping[str, CapturedLayer]) -> None:
        """Add the samples of one backward pass.

        Args:
            captured: Layer name to per-sample gradients of a *sum* of losses; absent layers had none.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums, and what they are taken within, that make up the state (the very tensors, not copies).

        Returns:
            Name to tensor.
        """

    def is_sum(self, name: str) -> bool:
        """Whether one of :meth:`tensors` is a sum over samples, which adds; others must agree.

        Args:
            name: Its name.

        Returns:
            True, but for kinds that are collected in stages.
        """
        return True

    def empty(self) -> Fisher:
        """A Fisher of the same layers in the same stage that has seen no sample.

        Returns:
            A new one; what is no sum is shared.
        """
        empty = type(self)(self.layers)
        empty.targets = self.targets
        empty.load_tensors(
            {name: torch.zeros_like(tensor) if self.is_sum(name) else tensor for name, tensor in self.tensors().items()}
        )
        return empty

    @abstractmethod
    def finalize(self, damping: float) -> None:
        """Turn sums into what :meth:`precondition` and :meth:`quadratic` need; the sums stay.

        Args:
            damping: Share of each layer's mean Fisher that is added to it.
        """

    @abstractmethod
    def precondition(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Multiply by the inverse of the damped Fisher: ``F⁻¹ g``.

        Args:
            gradients: Parameter name to ``(*, *parameter)``; leading dimensions are kept.

        Returns:
            The same shapes. Layers whose Fisher is all zero give zero.
        """

    @abstractmethod
    def quadratic(self, delta: Mapping[str, Tensor]) -> Tensor:
        """The quadratic form ``δᵀ F δ`` with the damped Fisher.

        Args:
            delta: Parameter name to ``(*, *parameter)``.

        Returns:
            The leading dimensions ``(*,)``.
        """

    def merge(self, other: Fisher) -> None:
        """Add the samples that another Fisher of the same layers has seen.

        Args:
            other: Of the same kind and layers, in the same stage.

        Raises:
            InputError: If kinds, layers, targets or stages differ, or what the sums were taken within.
        """
        if other.kind != self.kind or other.layers != self.layers:
            raise InputError(
                f"A {other.kind} Fisher of {len(other.layers)} layers can't be added to a {self.kind} one of "
                f"{len(self.layers)}: kinds and layers must agree, so make both with the same parameters."
            )
        if other.targets != self.targets:
            raise InputError(
                f"A Fisher with the targets of the {other.targets} can't be added to one with those of the "
                f"{self.targets}: they are estimates of different matrices, so take both with the same targets."
            )
        if other.stage != self.stage:
            raise InputError(
                f"A {self.kind} Fisher that collects {other.stage} can't be added to one that collects {self.stage}; "
                "add them in the same stage."
            )
        theirs = {name: tensor.to(self.tensors()[name].device) for name, tensor in other.tensors().items()}
        for name, tensor in self.tensors().items():
            if not self.is_sum(name) and not torch.equal(tensor, theirs[name]):
                raise InputError(
                    f"These {self.kind} Fishers differ in {name}, so their sums don't add up; go on from the same "
                    "earlier stage in both."
                )
        self.load_tensors(
            {name: tensor + theirs[name] if self.is_sum(name) else tensor for name, tensor in self.tensors().items()}
        )
        self.count += other.count

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Fisher:
        """Move the state; what :meth:`finalize` made is dropped.

        Args:
            device: Where to.
            dtype: And the sums to which type, if given.

        Returns:
            Itself.
        """
        self.load_tensors(
            {name: tensor.to(device, dtype if self.is_sum(name) else None) for name, tensor in self.tensors().items()}
        )
        return self

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the sums and what they are taken within, and with them the stage.

        Args:
            tensors: As :meth:`tensors` gives them.
        """

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: only tensors, numbers and strings, so that it loads with ``weights_only=True``.

        Returns:
            What :meth:`load_state` takes.
        """
        return {
            "kind": self.kind,
            "layers": [layer.to_json() for layer in self.layers.values()],
            "count": self.count,
            "targets": self.targets,
            "tensors": {name: tensor.detach().cpu().clone() for name, tensor in self.tensors().items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that :meth:`state` gave.

        Args:
            state: Of the same kind, layers and targets.

        Raises:
            InputError: If kinds, layers or targets differ.
        """
        layers = {fields["name"]: LayerSpec.from_json(fields) for fields in state["layers"]}
        if state["kind"] != self.kind or layers != self.layers:
            raise InputError(
                "The checkpoint holds a Fisher of other layers; use the parameters it was started with, or start anew."
            )
        targets = state.get("targets", "data")  # checkpoints from before there was a choice have no entry
        if targets != self.targets:
            raise InputError(
                f"The checkpoint holds a Fisher with the targets of the {targets}, not of the {self.targets}; use "
                "those it was started with, or start anew."
            )
        # Copies, since update() adds in place.
        self.load_tensors({name: tensor.clone() for name, tensor in state["tensors"].items()})
        self.count = int(state["count"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: The file; its folder is made.
        """
        about = {
            "kind": self.kind,
            "count": self.count,
            "targets": self.targets,
            "layers": [layer.to_json() for layer in self.layers.values()],
            "provenance": self.provenance,
        }
        if self.stage is not None:
            about["stage"] = self.stage
        tensors = {f"fisher/{name}": tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        tensors |= {f"weights/{name}": weight.detach().cpu().contiguous() for name, weight in self.weights.items()}
        write_file(path, about, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read a file that :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The Fisher, on the CPU.

        Raises:
            InputError: If it is not a Fisher of this kind, or was altered.
        """
        about, tensors = read_file(path)
        if about["kind"] != cls.kind:
            raise InputError(f"{path} holds a {about['kind']} Fisher, not a {cls.kind} one.")
        try:
            fisher = cls({fields["name"]: LayerSpec.from_json(fields) for fields in about["layers"]})
            fisher.load_tensors(_under("fisher/", tensors))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({reason_of(error)}); make it again.") from None
        fisher.weights = _under("weights/", tensors)
        fisher.count = about["count"]
        fisher.targets = about.get("targets", "data")
        fisher.provenance = about["provenance"]
        return fisher


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
