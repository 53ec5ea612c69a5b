"""Alpha: beside the weights, in PEFT's settings, or nowhere, which means the rank; never guessed where it was lost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_unlearn.diffusion.adapters.adapter_file import AdapterFile
from lightning_unlearn.errors import InputError

# Settings of PEFT under which a layer computes something else, though its tensors look the same.
_OTHERWISE = (
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "arrow_config",
    "fan_in_fan_out",
)
# With these PEFT has changed the base weights, unless it turned the adapter back when it saved it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Scales:
    """The alphas of a file.

    Args:
        file: The adapter as it was saved.
        alphas: Layer name in the file to what lies beside its weights, if anything does.

    Raises:
        InputError: If PEFT's settings are of another kind, or alphas were lost.
    """

    def __init__(self, file: AdapterFile, alphas: Mapping[str, Tensor | None]) -> None:
        self._file = file
        self._config = file.config
        self._alphas = alphas
        self._check_config()
        lost = [name for name, alpha in alphas.items() if alpha is None]
        if 0 < len(lost) < len(alphas):
            raise InputError(
                f"{file.path} has an alpha for {len(alphas) - len(lost)} layers and none for {len(lost)} "
                f"(e.g. {lost[0]}); without it the scale is not known: save the adapter again, with all of them."
            )
        if lost and not self._config and _number(file.header.get("ss_network_alpha")) is not None:
            raise InputError(
                f"{file.path} says in its header that alpha is {file.header['ss_network_alpha']}, but it has none "
                "beside its weights, as after a conversion that lost it; take the file that was converted."
            )

    def alpha(self, name: str, rank: int, layer: str) -> float:
        """The alpha of a layer.

        Args:
            name: The layer's name in the file.
            rank: Its rank.
            layer: The first of the network's layers that it is.

        Returns:
            Such that its scale is ``alpha / rank``.

        Raises:
            InputError: If it is no positive number, or the file contradicts itself.
        """
        beside = self._alphas[name]
        if beside is not None:
            alpha = self._beside(name, beside)
            self._check_header(name, rank, alpha)
            return alpha
        if not self._config:
            return float(rank)
        said = self._setting("r", "rank_pattern", layer)
        if said is not None and said != rank:
            raise InputError(
                f"{self._file.path}: {name} has rank {rank}, but the adapter's settings say {said:g}; the settings are "
                "of another adapter."
            )
        found = self._setting("lora_alpha", "alpha_pattern", layer)
        if found is None or not (math.isfinite(found) and found > 0):
            raise InputError(
                f"{self._file.path}: the adapter's settings give {name} the alpha {found}; it must be above 0, "
                "set lora_alpha to what it was trained with."
            )
        # Kalajdzievski (arXiv 2312.03732): the scale is alpha / sqrt(r).
        return found * math.sqrt(rank) if self._config.get("use_rslora") else found

    def _beside(self, name: str, tensor: Tensor) -> float:
        if tensor.numel() == 1 and math.isfinite(alpha := float(tensor)) and alpha > 0:
            return alpha
        shown = f"{float(tensor):g}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise InputError(
            f"{self._file.path}: the alpha of {name} is {shown}, which is no number above 0; the file is damaged, "
            "fetch it again."
        )

    def _check_header(self, name: str, rank: int, alpha: float) -> None:
        header = self._file.header
        said, dim = _number(header.get("ss_network_alpha")), _number(header.get("ss_network_dim"))
        # LoCon's convolutions, blocks with a rank of their own and parts put together have other ranks or arguments.
        if said is None or dim != rank or header.get("ss_network_args", "{}") not in {"{}", "None", "null"}:
            return
        if not math.isclose(said, alpha, rel_tol=1e-2):
            raise InputError(
                f"{self._file.path}: {name} has alpha {alpha:g}, but the file's header says that it was trained with "
                f"{said:g}; one of them is wrong: take the file as the trainer wrote it."
            )

    def _setting(self, name: str, patterns: str, layer: str) -> float | None:
        try:
            for pattern, value in (self._config.get(patterns) or {}).items():
                # As PEFT matches them (utils/other.py, get_pattern_key).
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    return _number(value)
        except (re.error, AttributeError):
            raise InputError(
                f"{self._file.path}: {patterns} in the adapter's settings is no map of patterns of layer names to "
                "numbers; save the adapter again."
            ) from None
        return _number(self._config.get(name))

    def _check_config(self) -> None:
        kind = self._config.get("peft_type")
        if kind is not None and str(kind).upper() != "LORA":
            raise InputError(
                f"{self._file.path} is PEFT's {kind}, which is not read here, only LORA is; merge it into the network "
                "with merge_and_unload, and give the merged weights."
            )
        for name in _OTHERWISE:
            if self._config.get(name):
                raise InputError(
                    f"{self._file.path} was trained with PEFT's {name}, which is not read here; merge it into the "
                    "network with merge_and_unload, and give the merged weights."
                )
        start = self._config.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise InputError(
                f"{self._file.path} was started by {start}, which changes the base weights, too; save it with PEFT's "
                "path_initial_model_for_weight_conversion, which turns it into a LoRA of the model before."
            )


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
