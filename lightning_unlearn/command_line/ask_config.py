"""What ``ask`` decides, as the config of an attribution: ``attribute``, ``fit`` and ``predict`` take it as it is."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf

from lightning_unlearn.command_line.ask_folder import AskFolder
from lightning_unlearn.command_line.ask_request import Request
from lightning_unlearn.diffusion.adapters.custom_diffusion import custom_diffusion_weights
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest

Kind = Literal["model", "adapter", "customised"]

# Settings of a model that its Fisher knows nothing of.
NOT_OF_FISHER = ("fisher", "views", "strategy", "damping", "seed", "rise_draws")


def kind_of(request: Request) -> Kind:
    """What kind of model is asked.

    Args:
        request: What is asked.

    Returns:
        ``"customised"`` for weights of Custom Diffusion, which take the place of the network's own.

    Raises:
        InputError: If the adapter's file can't be read.
    """
    if request.adapter is None:
        return "model"
    return "adapter" if custom_diffusion_weights(str(request.adapter)) is None else "customised"


def method_for(kind: Kind) -> str | None:
    """How samples are scored for a kind of model, where nobody says it.

    Args:
        kind: Of the model.

    Returns:
        A method of ``attribute``; ``None`` for its default.
    """
    # Of customised models, the exemplars are found by unlearning and by what looks like the query, and hardly by the
    # methods that compare gradients (mAP 0.89 and 0.84 against 0.31 and 0.06, benchmarks/RESULTS.md). `Undone` finds
    # them as well, but its one list is of the model, and says nothing of the picture that is asked about.
    return None if kind == "model" else "unlearning"


def config_of_sample(sample: Path, request: Request, queries: Path) -> dict[str, Any]:
    """The config of the sample data with other queries.

    Args:
        sample: The config that ships.
        request: What is asked.
        queries: Shards of the queries.

    Returns:
        The config.
    """
    config: dict[str, Any] = yaml.safe_load(sample.read_text("utf-8"))
    return _with(config, {"data": {"init_args": _data(queries, request)}}, request.settings)


def config_of_request(request: Request, folder: AskFolder, queries: Path, kind: Kind) -> dict[str, Any]:
    """The config of a pipeline, with an adapter or without one.

    Args:
        request: What is asked, of a pipeline.
        folder: Where shards and Fisher lie, or will.
        queries: Shards of the queries.
        kind: Of the model.

    Returns:
        The config; what the request's settings say stands over what is decided here.
    """
    assert request.pipeline is not None
    model: dict[str, Any] = {"network": str(request.pipeline.absolute()), "fisher": str(folder.fisher.absolute())}
    if request.adapter is not None:
        model["adapter"] = str(request.adapter.absolute())
    said = (request.settings.get("model") or {}).get("init_args") or {}
    # The adapter alone was trained; merged, it is no part of its own.
    if kind == "adapter" and not said.get("merge"):
        model["parameters"] = "adapter"
    shards: Any = str(folder.shards.absolute()) if request.images is not None else _local(request.shards)
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_unlearn.UnlearningModule", "init_args": model},
        "data": {
            "class_path": "lightning_unlearn.AttributionDataModule",
            "init_args": {"shards": shards, **_data(queries, request)},
        },
        # Methods that compare samples work in one process.
        "trainer": {"accelerator": "auto", "devices": 1},
    }
    return _with(config, request.settings)


def _data(queries: Path, request: Request) -> dict[str, Any]:
    concept = {} if request.concept is None else {"targets_by": request.concept}
    return {"queries": str(queries.absolute()), **concept}


def _local(shards: Any) -> list[str]:
    return [name if "://" in name else str(Path(name).expanduser().absolute()) for name in shards]


def _with(config: dict[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # Interpolations stay as they are written: they are resolved where the file is read.
        merged = OmegaConf.to_container(OmegaConf.merge(config, *map(dict, others)), resolve=False)
    except Exception as error:  # omegaconf's are of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"The settings don't fit a config ({reason}); correct the file of --settings.") from None
    assert isinstance(merged, dict)
    return {str(name): value for name, value in merged.items()}


def of_fisher(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's settings those that its Fisher, and so everything else, depends on.

    Args:
        config: Of an attribution.

    Returns:
        Settings, without the places of files, which are told by their content.
    """
    model = config["model"].get("init_args") or {}
    return {name: value for name, value in model.items() if name not in (*NOT_OF_FISHER, "network", "adapter")}


def answer_digest(config: Mapping[str, Any], method: str | None) -> str:
    """What tells an answer from others about the same queries.

    Args:
        config: Of the attribution.
        method: How samples are scored.

    Returns:
        Eight letters, whatever the folders are called.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config))
    for part, names in (("model", ("network", "adapter", "fisher")), ("data", ("shards", "queries"))):
        for name in names:
            plain[part]["init_args"].pop(name, None)
    return settings_digest({"method": method, "config": plain})[:8]


def text_of(config: Mapping[str, Any], words: list[str]) -> str:
    """The file that a config is kept in.

    Args:
        config: Of an attribution.
        words: The command that answers with it.

    Returns:
        YAML.
    """
    head = "# What `lightning-unlearn ask` decided. The same answer by its main command:\n#\n"
    command = " ".join(shlex.quote(word) for word in ["lightning-unlearn", *words])
    return f"{head}#     {command}\n#\n{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}"
