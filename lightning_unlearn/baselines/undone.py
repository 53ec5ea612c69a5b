"""Fine-tuning undone: what an adapter, or a fine-tuning as a whole, learned from each image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.diffusion.adapters import adapter_off, has_adapter
from lightning_unlearn.diffusion.loading import load_weights
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.rules import RULES, score
from lightning_unlearn.unlearning.scoring import measure_losses
from lightning_unlearn.weights.deltas import DeltaStore


class Undone(Baseline):
    r"""The loss of the model before minus the loss of the model as it is: :math:`τ(z) = L(z, θ_{before}) - L(z, θ)`.

    An adapter that is switched off is the model before. The scores are of the model, not of a picture that it made, so
    no query is needed and there is one column. An image whose loss fell by the fine-tuning is one that it learned,
    or one much like those.

    Args:
        before: The weights before, where there is no adapter to switch off (it was merged, or everything was trained):
            a file or folder as :func:`~lightning_unlearn.diffusion.loading.load_weights` takes it.
        prefix: What stands before the network's names in it.
        rule: Whether the loss's rise counts as it is, or relative to the loss.
    """

    name: ClassVar[str] = "undone"
    columns: ClassVar[Sequence[str] | None] = ("adapter",)

    def __init__(
        self, before: str | None = None, prefix: str = "", rule: Literal["difference", "ratio"] = "difference"
    ) -> None:
        if rule not in RULES:
            raise InputError(f"There is no score rule {rule!r}; choose one of {', '.join(RULES)}.")
        self.before = before
        self.prefix = prefix
        self.rule = rule

    def scores(self, subject: Subject) -> Tensor:
        """See :meth:`Baseline.scores`.

        Args:
            subject: With an adapter on its network, unless there are weights of the model before.

        Returns:
            ``(N, 1)``.

        Raises:
            InputError: If nothing can be undone, or nothing changes by it.
        """
        after = self._losses(subject)
        with self._undone(subject.loss.network):
            before = self._losses(subject)
        parts = [
            score(self.rule, now, then[None], "mean", shares)
            for (now, shares), (then, _) in zip(after, before, strict=True)
        ]
        found = torch.cat(parts) if parts else torch.zeros(0, 1, dtype=torch.float64)
        if len(found) and not found.any():
            raise InputError(
                "No sample's loss is another in the model before, so that these are the same weights; name those of "
                "before the fine-tuning."
            )
        return found

    def _losses(self, subject: Subject) -> list[tuple[Tensor, list[list[float]] | None]]:
        """Of each batch its losses ``(B, flips, captions, draws)``, and the shares of its samples' captions."""
        device = next(subject.loss.network.parameters()).device
        nothing = DeltaStore({}, [])
        with torch.no_grad():
            return [
                (
                    measure_losses(subject.loss, nothing, subject.views, batch, device)[0],
                    batch.caption_weights,
                )
                for batch in subject.batches()
            ]

    def _undone(self, network: nn.Module) -> AbstractContextManager[None]:
        if self.before is not None:
            if has_adapter(network):
                raise InputError("The network has an adapter, which is switched off; leave `before` out, or merge it.")
            return _weights_of(network, self.before, self.prefix)
        if not has_adapter(network):
            raise InputError(
                "There is no adapter to switch off; give one as `adapter`, not merged, or name the weights `before` "
                "the fine-tuning."
            )
        return _off(network)


@contextmanager
def _off(network: nn.Module) -> Iterator[None]:
    with adapter_off(network):
        yield


@contextmanager
def _weights_of(network: nn.Module, path: str, prefix: str) -> Iterator[None]:
    """Other weights in a network for as long as the context lasts."""
    now = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    try:
        load_weights(network, path, prefix)
        yield
    finally:
        network.load_state_dict(now)
