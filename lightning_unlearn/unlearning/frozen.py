"""A frozen network and the deltas of its targets: what both unlearning and scoring stand on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_unlearn.diffusion.adapters import adapter_scales
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import digest, settings_digest, tensors_digest
from lightning_unlearn.weights.delta_files import read_targets, sealed_targets
from lightning_unlearn.weights.deltas import CHECKPOINT_KEY, DeltaStore, NetworkLoss
from lightning_unlearn.weights.parameters import layer_parameters, select_layers
from lightning_unlearn.weights.precision import ExactFloat32


class _GivesBack(Callback):
    """Tears the module down where a run fails."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back what it had set."""
        pl_module.teardown(str(trainer.state.stage))


class FrozenModule(LightningModule):
    """A LightningModule whose network never changes, and whose parameters are deltas of it.

    The network is in eval mode and left out of checkpoints, which say for which network, Fisher and queries their
    deltas are.

    Args:
        network: The denoiser.
        objective: Its loss.
        parameters: Which weights are unlearned.
    """

    def __init__(self, network: nn.Module, objective: Objective, parameters: str | list[str]) -> None:
        super().__init__()
        if not isinstance(getattr(objective, "num_timesteps", None), int):
            raise InputError(
                f"{type(objective).__name__} has no num_timesteps; set it to the length of the training schedule."
            )
        self.layers = select_layers(network, parameters)
        self.loss = NetworkLoss(network.eval().requires_grad_(False), objective, self.layers)
        self.deltas: DeltaStore | None = None
        # Target to its queries' keys, where targets are sets.
        self.members: dict[str, list[str]] = {}
        # Of the unlearning that the deltas come from: each target's losses, and the settings.
        self.results: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        # Whether the deltas are of a fit that has not ended, or was cut short.
        self.unfinished = False
        self._fingerprints: dict[str, str] = {}
        self._float32 = ExactFloat32()
        # The checkpoint holds only the deltas.
        self.strict_loading = False

    @property
    def network(self) -> nn.Module:
        """The frozen denoiser."""
        return self.loss.network

    @property
    def objective(self) -> Objective:
        """Its loss."""
        return self.loss.objective

    @property
    def targets(self) -> list[str]:
        """Names of the targets whose deltas the module holds."""
        return self.deltas.targets if self.deltas is not None else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen network out and say whose the deltas are, in plain types that load without pickle.

        Args:
            checkpoint: Lightning's.
        """
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("loss.")}
        prints = self.fingerprints()
        about = {
            "targets": list(self.targets),
            "members": self.members,
            "results": self.results,
            "settings": self.settings,
            "fingerprints": {name: prints[name] for name in ("weights", "fisher", "unlearning")},
            "finished": not self.unfinished,
        }
        checkpoint[CHECKPOINT_KEY] = sealed_targets(about, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the deltas of a checkpoint, and refuse those of another model.

        Args:
            checkpoint: Lightning's.

        Raises:
            InputError: If it is of other weights or queries.
        """
        about = read_targets(checkpoint, "The checkpoint")
        if about["fingerprints"]["weights"] != self.weights_fingerprint():
            raise InputError(
                "The deltas in the checkpoint were made for other weights than this network's; unlearn the "
                "queries again."
            )
        if about["settings"].get("objective") != self.objective.settings():
            raise InputError(
                "The deltas in the checkpoint were made with another objective; use that one, or unlearn the queries "
                "again."
            )
        if self.trainer.state.fn == "fit" and about["targets"] != self.targets:
            raise InputError("The checkpoint was made for other queries; unlearn these anew, without ckpt_path.")
        self.load_deltas(checkpoint)

    def load_deltas(self, checkpoint: dict[str, Any]) -> None:
        """Take the deltas of a checkpoint.

        Args:
            checkpoint: As Lightning loads it.

        Raises:
            InputError: If its deltas are of other layers.
        """
        about = read_targets(checkpoint, "The checkpoint")
        store = DeltaStore(layer_parameters(self.layers), about["targets"])
        shapes = {f"deltas.{name}": tuple(value.shape) for name, value in store.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
        if shapes != theirs:
            raise InputError(
                "The deltas in the checkpoint are of other layers than the chosen ones; use the parameters they "
                "were made with."
            )
        # In the type they were made in, so that they and their fingerprint come back as they were.
        store.to(next(iter(checkpoint["state_dict"].values())).dtype)
        store.load_state_dict({name.removeprefix("deltas."): value for name, value in checkpoint["state_dict"].items()})
        self.deltas = store
        self.members = {target: list(keys) for target, keys in about.get("members", {}).items()}
        self.results = {target: dict(result) for target, result in about["results"].items()}
        self.settings = dict(about["settings"])
        self.unfinished = not about["finished"]
        self._fingerprints |= about["fingerprints"]

    def _exact(self) -> None:
        """A delta is some 1e-4 of its weight: float16 would lose it, TF32 drown it, so both are off."""
        for name, parameter in layer_parameters(self.layers).items():
            if parameter.dtype == torch.float16:
                raise InputError(
                    f"{name} is {parameter.dtype}, in which gradients vanish; load the network in float32 or bfloat16 "
                    "and use precision 32-true."
                )
        self._float32.start()

    def teardown(self, stage: str) -> None:
        """Give back the precision of products and the network's layers as they were.

        Args:
            stage: Lightning's.
        """
        self._float32.stop()
        self.loss.release()
        self.network._compiled_call_impl = None

    def _gives_back(self) -> None:
        """See to it that a failing run is torn down, too: Lightning calls ``teardown`` only where none fails."""
        theirs: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, _GivesBack) for callback in theirs):
            theirs.append(_GivesBack())

    def weights_fingerprint(self) -> str:
        """Digest of the network: its weights, and settings that leave no trace in them, such as the number of heads.

        Returns:
            32 hexadecimal characters.
        """
        if "weights" not in self._fingerprints:
            config: Any = getattr(self.network, "config", None)
            form: Any = repr(self.network)
            if isinstance(config, Mapping):
                form = {name: value for name, value in config.items() if not name.startswith("_")}
            scales = adapter_scales(self.network)
            about = [type(self.network).__qualname__, form, *([scales] if scales else [])]
            form = json.dumps(about, sort_keys=True, default=str)
            self._fingerprints["weights"] = digest(form, tensors_digest(self.network.state_dict()))
        return self._fingerprints["weights"]

    def fingerprints(self) -> dict[str, str]:
        """What identifies the deltas.

        Returns:
            Digests of the network's weights and objective, the Fisher, the unlearning's settings and queries, and the
            deltas.
        """
        deltas = self.deltas.named() if self.deltas is not None else {}
        return {
            "weights": self.weights_fingerprint(),
            "objective": settings_digest(self.objective.settings()),
            "fisher": self._fingerprints.get("fisher", "none"),
            "unlearning": self._fingerprints.get("unlearning", "none"),
            "deltas": tensors_digest({name: delta.detach() for name, delta in deltas.items()}),
            "targets": settings_digest({"targets": self.targets}),
        }
