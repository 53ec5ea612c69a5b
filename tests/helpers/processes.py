"""Real processes for the tests that need them, each a fork of one server that has imported what all of them need.

A fresh interpreter works for some eight seconds until torch, Lightning and diffusers are imported; a fork of the server
starts at once. The server itself has done nothing but import: no state of the tests reaches a process but its arguments
and its environment.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "pytest",
        "diffusers.models.unets.unet_2d_condition",
        "lightning.pytorch.cli",
        "lightning_unlearn.callbacks",
        "lightning_unlearn.datamodules",
        "lightning_unlearn.command_line.attribute_command",
        "lightning_unlearn.command_line.evaluate_command",
        "lightning_unlearn.training",
    ]
)


def free_port() -> int:
    """A port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _script(file: str, arguments: list[str], environment: Mapping[str, str], folder: str, said: str) -> None:
    """Become a script: its words, its environment, the folder that it was started in, and a file for what it says."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = [file, *arguments]
    torch.set_num_threads(1)
    runpy.run_path(file, run_name="__main__")


class Script:
    """A file that runs as a script in a process of its own, and what it says; it ends with the block that it is for."""

    def __init__(self, file: str, *arguments: str | Path, folder: Path | None = None, **environment: str) -> None:
        handle, said = tempfile.mkstemp(prefix="said-")
        os.close(handle)
        self._said = Path(said)
        words = [*map(str, arguments)]
        of_process = (file, words, {**os.environ, **environment}, str(folder or Path.cwd()), said)
        self._process = SERVER.Process(target=_script, args=of_process)
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._said.unlink()

    @property
    def status(self) -> int | None:
        """Its exit status; the signal that ended it, below zero; None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    def said(self) -> str:
        """What it said until now."""
        return self._said.read_text()

    def wait(self, timeout: float) -> int | None:
        """Wait for its end, which must come in time; its exit status."""
        self._process.join(timeout)
        return self.status

    def kill(self) -> int | None:
        """End it at once if it still runs; its exit status."""
        self._process.kill()
        return self.wait(60)


def run_ranks(file: str, *arguments: str | Path, processes: int = 2, nodes: int = 1, folder: Path | None = None) -> str:
    """Run a file as a script in some processes a node, each told its rank as torchrun tells it; what they said.

    The first one that fails ends the others.
    """
    world = nodes * processes
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "tests"}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(processes), "GROUP_WORLD_SIZE": str(nodes)}
    with ExitStack() as stack:
        scripts = []
        for rank in range(world):
            node, local = divmod(rank, processes)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local), "GROUP_RANK": str(node)}
            scripts.append(stack.enter_context(Script(file, *arguments, folder=folder, **shared, **own)))
        deadline = time.monotonic() + 300
        while None in (found := [script.status for script in scripts]) and not any(found):
            assert time.monotonic() < deadline, f"{file} has not ended in time"
            time.sleep(0.05)
        said = "\n".join(script.said() for script in scripts)
        assert found == [0] * world, said[-8000:]
    return said
