"""What a network's own config says, and what in it a family can't follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_unlearn.errors import InputError

OWN_OBJECTIVE = "give an objective of your own (a subclass of Objective)"


def setting(network: nn.Module, name: str) -> Any:
    """What a network's config says of one of its settings.

    Args:
        network: One of diffusers, or of a class that derives from one.
        name: Of the setting.

    Returns:
        Its value, ``None`` where the config says nothing.
    """
    config = getattr(network, "config", None)
    return config.get(name) if isinstance(config, Mapping) else None


def refuse_settings(network: nn.Module, plain: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Refuse a network that takes more than its family gives it.

    Args:
        network: With a config.
        plain: See :attr:`Family.plain`.

    Raises:
        InputError: If its config says so.
    """
    for key, (values, what) in plain.items():
        value = setting(network, key)
        if value not in values:
            raise InputError(
                f"This {type(network).__name__} takes {what} (its config has {key} {value!r}), which samples don't "
                f"hold; {OWN_OBJECTIVE}."
            )
