"""Work beside a training that leaves no trace in it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

# Where a module keeps what is called before and after it, and what belongs to that.
HOOKS = {
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


@contextmanager
def aside() -> Iterator[None]:
    """Random states (Python's, NumPy's, torch's), filters of warnings and the Trainer's talk are as before afterwards.

    Yields:
        Nothing.
    """
    talk = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level, raised = talk.level, None
    with isolate_rng(), warnings.catch_warnings(), torch.enable_grad():
        # What a Trainer of ours says of the machine was said by the user's own.
        talk.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=r".*(does not have many workers|LeafSpec|tensorboardX).*")
        try:
            yield
        except BaseException as error:  # past which isolate_rng would restore nothing
            raised = error
        finally:
            talk.setLevel(level)
    if raised is not None:
        raise raised


def frozen_copy(network: nn.Module) -> nn.Module:
    """A network as it is now, to be looked at: nothing that is done to it reaches the one that is trained.

    Hooks of this package, which look on while it trains, stay behind; others belong to the network and go with it.

    Args:
        network: On any device.

    Returns:
        Another, on the same device, in eval mode, without gradients, in float32 or wider.
    """
    known: dict[int, Any] = {}  # what a copy has in the place of something, as copy.deepcopy keeps it
    for module in network.modules():
        for name, more in HOOKS.items():
            ours = {number for number, hook in getattr(module, name).items() if _is_ours(hook)}
            for hooks in (getattr(module, one) for one in (name, *more)):
                if ours & hooks.keys():
                    others = {number: hook for number, hook in hooks.items() if number not in ours}
                    known[id(hooks)] = type(hooks)(copy.deepcopy(others, known))
    made = copy.deepcopy(network, known)
    lower = [one for one in made.parameters() if one.is_floating_point() and one.dtype.itemsize < 4]
    if lower:
        nn.Module.to(made, torch.float32)
    return made.eval().requires_grad_(False)


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("lightning_unlearn.")
