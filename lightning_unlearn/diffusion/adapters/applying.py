"""An adapter on its network: put on through PEFT, checked against the file, merged, or switched off for a while."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import nn

from lightning_unlearn.diffusion.adapters.adapter_file import read_adapter_file
from lightning_unlearn.diffusion.adapters.custom_diffusion import apply_custom_diffusion, custom_diffusion_weights
from lightning_unlearn.diffusion.adapters.kohya_header import TrainingRecord, read_training_record
from lightning_unlearn.diffusion.adapters.layer_names import LayerNames
from lightning_unlearn.diffusion.adapters.low_rank import LowRank
from lightning_unlearn.diffusion.adapters.reading import read_layers
from lightning_unlearn.errors import InputError, some_of

# PEFT's and diffusers' own default, so that layers are called as in a training.
ADAPTER = "default"

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class LoadedAdapter:
    """What was read from an adapter's file.

    Attributes:
        path: The file.
        scales: Layer name to ``alpha / rank``.
        text_encoder_keys: What of the file is for text encoders, and so not in the network.
        training: What the file says of its training, if it says anything.
    """

    path: str
    scales: Mapping[str, float]
    text_encoder_keys: tuple[str, ...]
    training: TrainingRecord | None


def load_adapter(network: nn.Module, path: str, merge: bool = False, base: str | None = None) -> LoadedAdapter:
    """Put a LoRA, LoCon or DoRA on a network, in place; or the weights of Custom Diffusion in the place of its own.

    Args:
        network: The denoiser that it was trained on; frozen, as PEFT leaves it.
        path: A file or folder as diffusers, PEFT, kohya or ai-toolkit writes it.
        merge: Whether its weights are added to the network's, which then is as one without an adapter; otherwise the
            adapter's ``A`` and ``B`` are layers of their own, ``lora_A.default`` and ``lora_B.default``.
        base: The file that the network's weights are of, which is compared with the one that the adapter says it was
            trained on.

    Returns:
        What was read.

    Raises:
        InputError: If PEFT is not installed, the network has an adapter already, or the file can't be taken whole.
    """
    custom = custom_diffusion_weights(path)
    if custom is not None:
        apply_custom_diffusion(network, path, custom)
        return LoadedAdapter(path, {}, (), None)
    if find_spec("peft") is None:
        raise InputError("An adapter needs PEFT; install it with `pip install lightning-unlearn[lora]`.")
    if has_adapter(network):
        raise InputError("The network has an adapter already; merge it, or load a network without one.")
    file = read_adapter_file(path)
    layers, text = read_layers(file, LayerNames(network))
    training = read_training_record(file.path, file.header)
    put_on(network, file.path, layers)
    if merge:
        merge_adapter(network)
    if text:
        warnings.warn(
            f"{file.path} also holds {len(text)} weights of text encoders ({some_of(text)}), which are no part of the "
            "network: text states must be made with them, as `prepare --adapter` does."
        )
    for sentence in training.unfollowed(base) if training else ():
        warnings.warn(f"{file.path}: {sentence}")
    return LoadedAdapter(
        file.path, {name: layer.alpha / layer.rank for name, layer in layers.items()}, tuple(text), training
    )


def has_adapter(network: nn.Module) -> bool:
    """Whether a network has a LoRA on it that is not merged.

    Args:
        network: The denoiser.

    Returns:
        Whether it has.
    """
    return any(hasattr(module, "lora_A") and hasattr(module, "base_layer") for module in network.modules())


def merge_adapter(network: nn.Module) -> None:
    """Add the adapter's weights to the network's and take the adapter off, in place.

    Args:
        network: With an adapter of :func:`load_adapter`.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
    del network.peft_config


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[nn.Module]:
    """The model before its adapter, for as long as the context lasts.

    Args:
        network: With an adapter that is not merged.

    Yields:
        The same network, which now computes what it did without the adapter.

    Raises:
        InputError: If it has none.
    """
    if not has_adapter(network):
        raise InputError("The network has no adapter that could be switched off (a merged one can't be).")
    from peft.tuners.lora import LoraLayer

    layers = [module for module in network.modules() if isinstance(module, LoraLayer)]
    # PEFT's switch also changes what is trained.
    trained = {parameter: parameter.requires_grad for layer in layers for parameter in layer.parameters()}
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield network
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer.enable_adapters(not off)
        for parameter, required in trained.items():
            parameter.requires_grad_(required)


def adapter_scales(network: nn.Module) -> dict[str, float]:
    """What of an adapter leaves no trace in the weights.

    Args:
        network: With or without an adapter.

    Returns:
        Layer name to ``alpha / rank``.
    """
    return {
        f"{name}.{adapter}": float(scale)
        for name, module in network.named_modules()
        if hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), dict)
        for adapter, scale in module.scaling.items()
    }


def put_on(network: nn.Module, path: str, layers: Mapping[str, LowRank]) -> None:
    """Put an adapter on a model through PEFT, and see that PEFT took it as it is.

    Args:
        network: The model, without an adapter.
        path: The adapter's file, for messages.
        layers: Layer name to its adapter.

    Raises:
        InputError: If PEFT can't, or did not.
    """
    _inject(network, path, layers)
    _check(network, path, layers)


def _inject(network: nn.Module, path: str, layers: Mapping[str, LowRank]) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    with_magnitude = [name for name, layer in layers.items() if layer.magnitude is not None]
    if 0 < len(with_magnitude) < len(layers):
        without = next(name for name in layers if name not in with_magnitude)
        raise InputError(
            f"{path} is DoRA in {len(with_magnitude)} layers and LoRA in {len(layers) - len(with_magnitude)} "
            f"(e.g. {without}); that mixture is not read here: merge it with the program that made it."
        )
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    config = LoraConfig(
        r=_usual(ranks),
        lora_alpha=_usual(alphas),  # type: ignore[arg-type]
        target_modules=_any_of(list(layers)),
        rank_pattern=_unusual(ranks),
        alpha_pattern=_unusual(alphas),
        use_dora=bool(with_magnitude),
    )
    state = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = layer.down, layer.up
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
            state[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    # A network without weights, of which only shapes are asked, gets an adapter without weights.
    without_weights = all(parameter.is_meta for parameter in network.parameters())
    try:
        inject_adapter_in_model(config, network, ADAPTER, low_cpu_mem_usage=without_weights)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(
            f"{path}: PEFT can't put the adapter on this network ({reason}); merge it with the program that made it."
        ) from None
    for name in layers:
        # PEFT makes them in the base's dtype, and half precision would round what the file has.
        module = network.get_submodule(name)
        for kept in (
            f"lora_A.{ADAPTER}",
            f"lora_B.{ADAPTER}",
            *([f"lora_magnitude_vector.{ADAPTER}"] * config.use_dora),
        ):
            dtype = next(module.get_submodule(kept).parameters()).dtype
            module.get_submodule(kept).to(torch.promote_types(dtype, torch.float32))
    if not without_weights:
        set_peft_model_state_dict(network, state, ADAPTER)
    network.eval()


def _check(network: nn.Module, path: str, layers: Mapping[str, LowRank]) -> None:
    """PEFT drops what it does not know without an error, so what it holds is compared with the file."""
    for name, layer in layers.items():
        module = network.get_submodule(name)
        down = module.get_submodule(f"lora_A.{ADAPTER}").get_parameter("weight")
        up = module.get_submodule(f"lora_B.{ADAPTER}").get_parameter("weight")
        scaling: dict[str, float] = module.scaling  # type: ignore[assignment]
        if down.is_meta:
            continue
        same = torch.equal(down.cpu(), layer.down.to(down.dtype)) and torch.equal(up.cpu(), layer.up.to(up.dtype))
        if layer.magnitude is not None:
            magnitude = module.get_submodule(f"lora_magnitude_vector.{ADAPTER}").get_parameter("weight")
            same &= torch.equal(magnitude.flatten().cpu(), layer.magnitude.to(magnitude.dtype))
        if not same or abs(scaling[ADAPTER] * layer.rank / layer.alpha - 1) > 1e-6:
            raise InputError(
                f"{path}: PEFT did not take the weights of {name} as they are in the file; install the version of "
                "PEFT that lightning-unlearn was tested with."
            )


def _usual(values: Mapping[str, Number]) -> Number:
    return Counter(values.values()).most_common(1)[0][0]


def _unusual(values: Mapping[str, Number]) -> dict[str, Number]:
    # One pattern a value: PEFT tries every pattern on every layer.
    rest = {value: [name for name in values if values[name] == value] for value in set(values.values())}
    return {f"^{_any_of(names)}": value for value, names in rest.items() if value != _usual(values)}


def _any_of(names: list[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"
