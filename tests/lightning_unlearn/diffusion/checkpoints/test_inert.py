"""Checkpoints that hold what ``weights_only`` refuses: their weights are read, and nothing else happens."""

from __future__ import annotations

import builtins
import contextlib
import enum
import functools
import os
import subprocess
import sys
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_forms import assert_weights, load_into, load_toy, toy_moved
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf

from lightning_unlearn.diffusion.checkpoints import read_checkpoint
from lightning_unlearn.errors import InputError


class Kind(enum.Enum):
    ONE = 1


@dataclass
class Settings:
    path: Path
    kind: Kind = Kind.ONE


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Subject(LightningModule):
    def __init__(self, **anything: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.unet = torch.nn.Linear(2, 2)


HYPER_PARAMETERS: dict[str, Any] = {
    "omegaconf": OmegaConf.create({"a": {"b": [1, 2.0, None, "text"]}}),
    "path": Path("somewhere"),
    "partial": functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.99)),
    "numpy scalar": np.float64(3),
    "numpy array": np.arange(3),
    "enum": Kind.ONE,
    "dataclass": Settings(Path("a")),
    "slots": Slotted(),
    "class": torch.optim.SGD,
    "method": Path.touch,
    "bound method": Path("a").touch,
    "size": torch.Size([1]),
    "list of them": [Path("a"), {"b": OmegaConf.create([1])}],
    "key": {Path("a"): Kind.ONE},
}


@pytest.mark.parametrize("what", HYPER_PARAMETERS)
def test_hyper_parameters_of_any_class_are_passed_over(tmp_path: Path, what: str) -> None:
    content = {
        "state_dict": {f"unet.{n}": v for n, v in toy_moved(1).items()},
        "hyper_parameters": HYPER_PARAMETERS[what],
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert_weights(load_toy(tmp_path / "a.ckpt"), toy_moved(1))


def test_a_checkpoint_of_lightning_with_all_of_them(tmp_path: Path) -> None:
    module = Subject(**{name.replace(" ", "_"): value for name, value in HYPER_PARAMETERS.items()})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    with pytest.raises(InputError, match="without running code"):
        read_checkpoint(str(tmp_path / "a.ckpt"))
    assert_weights(load_into(tmp_path / "a.ckpt", network=torch.nn.Linear(2, 2))[0], module.unet.state_dict())


def test_what_can_not_be_passed_over_says_how_to_convert(tmp_path: Path) -> None:
    # A container of another class is filled item by item, which PyTorch's unpickler does for its own alone.
    torch.save({"state_dict": toy_moved(1), "hyper_parameters": deque([1])}, tmp_path / "a.ckpt")
    with pytest.raises(
        InputError, match=r"torch\.save\(torch\.load\(path, weights_only=False\)\['state_dict'\], new\)"
    ):
        load_toy(tmp_path / "a.ckpt")


class Evil:
    """Calls something when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


class State:
    def __setstate__(self, state: Any) -> None:
        Path(state).touch()

    def __getstate__(self) -> Any:
        return self.path

    path = ""


def evils(made: Path) -> list[Any]:
    state = State()
    state.path = str(made)
    return [
        Evil(Path.touch, made),
        Evil(os.system, f"touch {made}"),
        Evil(subprocess.call, ["touch", str(made)]),
        Evil(builtins.eval, f"open({str(made)!r}, 'w')"),
        Evil(builtins.exec, f"open({str(made)!r}, 'w')"),
        Evil(builtins.open, str(made), "w"),
        Evil(functools.partial(Path.touch, made)),
        Evil(made.touch),
        state,
    ]


@pytest.mark.parametrize("number", range(len(evils(Path()))))
@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict", "key"])
def test_nothing_that_a_file_names_is_called_or_imported(tmp_path: Path, number: int, where: str) -> None:
    made, evil = tmp_path / "made", evils(tmp_path / "made")[number]
    content: dict[Any, Any] = {"state_dict": {**toy_moved(1), **({"evil": evil} if where == "state_dict" else {})}}
    if where != "state_dict":
        content |= {evil: 1} if where == "key" else {"hyper_parameters": evil}
    torch.save(content, tmp_path / "a.ckpt")
    # PyTorch refuses some modules by name, whatever they stand for.
    with contextlib.suppress(InputError):
        assert_weights(load_toy(tmp_path / "a.ckpt"), toy_moved(1))
    assert not made.exists()
    with contextlib.suppress(Exception):
        torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert made.exists()  # it would have


def test_a_module_that_a_file_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_stranger.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'made')!r}).touch()\nclass Settings: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import module_of_a_stranger  # type: ignore[import-not-found]

    torch.save({"state_dict": toy_moved(1), "hyper_parameters": module_of_a_stranger.Settings()}, tmp_path / "a.ckpt")
    (tmp_path / "made").unlink()
    del sys.modules["module_of_a_stranger"]
    assert_weights(load_toy(tmp_path / "a.ckpt"), toy_moved(1))
    assert "module_of_a_stranger" not in sys.modules
    assert not (tmp_path / "made").exists()


def test_a_placeholder_is_no_weight(tmp_path: Path) -> None:
    state = OrderedDict(toy_moved(1))
    state["conv_in.weight"] = Path("a")  # type: ignore[assignment]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"lacks 1 of the network's .* \(e\.g\. conv_in\.weight\)"):
        load_toy(tmp_path / "a.pt")


def test_placeholders_are_forgotten_afterwards(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": toy_moved(1), "hyper_parameters": Settings(Path("a"))}, tmp_path / "a.ckpt")
    load_toy(tmp_path / "a.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
