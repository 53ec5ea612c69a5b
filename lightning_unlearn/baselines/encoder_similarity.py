"""Similarity under an image encoder that is given, such as CLIP or DINO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_unlearn.baselines.base import Baseline, Subject
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import tensors_digest

CHUNK = 64


class EncoderSimilarity(Baseline):
    """Cosine of an image encoder's codes of a sample's and a query's latents.

    The CLIP, DINO and DINOv2 rows of Wang et al. (arXiv 2406.09408, Table 1), and the CLIP baseline of Zheng et al.
    (arXiv 2311.00500). The encoder sees what the network is trained on: images in [-1, 1] for a pixel-space
    model; for a latent one it decodes them itself.

    Args:
        encoder: Turns ``(B, C, H, W)`` into codes ``(B, D)``; in a config the class of a module with its arguments, or
            the dotted name of a function. It gets latents on the CPU.

    Raises:
        InputError: If the encoder gives something else than codes.
    """

    name: ClassVar[str] = "encoder_similarity"

    def __init__(self, encoder: nn.Module | Callable[[Tensor], Tensor]) -> None:
        self._encoder = encoder.eval() if isinstance(encoder, nn.Module) else encoder

    def scores(self, subject: Subject) -> Tensor:
        """Compare codes; see :meth:`Baseline.scores`.

        Args:
            subject: The model is not looked at.

        Returns:
            ``(N, Q)``.
        """
        latents = [query.latent for query in subject.queries]
        # Pictures of several shapes have codes of one length.
        one_shape = len({latent.shape for latent in latents}) == 1
        stacks = [torch.stack(latents)] if one_shape else [latent[None] for latent in latents]
        queries = torch.cat([self._codes(stack) for stack in stacks])
        samples = [self._codes(batch.latents) for batch in subject.batches() if len(batch)]
        return torch.cat(samples) @ queries.mT

    @torch.no_grad()
    def _codes(self, latents: Tensor) -> Tensor:
        """Codes ``(B, D)`` of length 1."""
        codes = torch.cat([self._encoder(part) for part in torch.split(latents, CHUNK)])
        if codes.ndim != 2 or len(codes) != len(latents):
            raise InputError(
                f"The encoder gives {tuple(codes.shape)} for {len(latents)} images, but must give (images, D); "
                "flatten or pool its output."
            )
        if not codes.isfinite().all():
            raise InputError("The encoder gives NaN or infinity for some images; check it and the samples.")
        return normalize(codes.cpu().double(), dim=1)

    def settings(self) -> dict[str, Any]:
        """The encoder's class, and its weights if it has some; see :meth:`Baseline.settings`.

        Returns:
            JSON-like settings.
        """
        kind = self._encoder if hasattr(self._encoder, "__qualname__") else type(self._encoder)
        weights = tensors_digest(self._encoder.state_dict()) if isinstance(self._encoder, nn.Module) else None
        return {**super().settings(), "encoder": f"{kind.__module__}.{kind.__qualname__}", "weights": weights}
