"""The command line. Nothing heavy is imported before a command needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import lightning_unlearn
from lightning_unlearn.command_line.signals import PARENT, Stopped, started_by_another, stoppable
from lightning_unlearn.errors import InputError

HELP = """\
usage: lightning-unlearn COMMAND [--config FILE] [--print_config] [options]

Which training images made this picture possible?

commands:
  ask         a model and the folder of its training pictures to a page that answers, in one command: start here
  attribute   score all training images for queries, by unlearning or another --method, and write a report
  fit         unlearn queries (or train a model): Lightning's fit
  predict     score training images under the deltas of a checkpoint: Lightning's predict
  fisher      take the Fisher of a trained model, by passes over its training shards
  index       keep of each training image what new queries need, so that they cost no pass over the data
  evaluate    train again without the images that methods name, and see whether the model can still make the picture
  race        choose the samples that a race of several `predict`s goes on with, or write its table
  check       say what a config describes, what each stage will take, and what is missing; it loads no weights
  report      write the report of a finished run again
  serve       a page in the browser that answers out of an index: a prompt or a picture, and its sources
  prepare     images and captions, or ready latents and embeddings, to shards

`lightning-unlearn COMMAND --help` lists a command's options. Ready configs: {configs}.
"""
# Each command is the function of its name in the module `NAME_command`, which is imported only then.
COMMANDS = (
    "ask",
    "attribute",
    "fit",
    "predict",
    "fisher",
    "index",
    "evaluate",
    "race",
    "check",
    "report",
    "serve",
    "prepare",
)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: The command and its options; those of the process by default.

    Returns:
        The process's exit status: 0, or 1 after one sentence on what is wrong; 130 or 143 if a signal ended it.
    """
    if args is None and os.getcwd() not in sys.path:
        # As with `python -m`: a user's own classes, named in a config, lie where they work.
        sys.path.append(os.getcwd())
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(configs=", ".join(sorted(path.name for path in _configs_folder().glob("*.yaml")))), end="")
        return 0
    if arguments[0] == "--version":
        print(f"lightning-unlearn {lightning_unlearn.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(
            f"lightning-unlearn: there is no command {arguments[0]!r}; choose one of {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 1
    try:
        return _until_stopped(arguments, program=args is None)
    except (KeyboardInterrupt, Stopped) as error:  # while signals are being taken, or given back
        print("lightning-unlearn: stopped.", file=sys.stderr)
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)


def _until_stopped(arguments: list[str], *, program: bool) -> int:
    """Run a command until it ends, or a signal ends it; the exit status."""
    with stoppable(program=program) as stop:
        try:
            with _environment():
                _run(arguments[0], _find_configs(arguments[1:]))
        except InputError as error:
            if stop.signal is None:
                print(f"{_rank()}lightning-unlearn: {error}", file=sys.stderr)
                return 1
        except KeyboardInterrupt:  # from a library that takes the signal itself
            stop.signal = stop.signal or signal.SIGINT
        except BaseException:  # whatever a signal brought about on the way out
            if stop.signal is None:
                raise
        else:
            if stop.signal is None:  # else what the signal raised got lost, and the command went on to its end
                return 0
        stop.say()
        return stop.status


@contextmanager
def _environment() -> Iterator[None]:
    """Variables that a command, and the processes that it starts, run with."""
    wanted = {
        # Checkpoints are read without pickle, by Lightning too.
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "LIGHTNING_UNLEARN_SAMPLE": str(_sample_folder()),
    }
    added = wanted.keys() - os.environ.keys()
    os.environ |= {name: wanted[name] for name in added}
    before = os.environ.get(PARENT)
    if not started_by_another():  # else the first of them stays the parent of all
        os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if before is None:
            os.environ.pop(PARENT, None)
        else:
            os.environ[PARENT] = before


def _run(command: str, arguments: list[str]) -> None:
    module = import_module(f"lightning_unlearn.command_line.{command}_command")
    getattr(module, command)(arguments)


def _rank() -> str:
    """Which process speaks, for all but the first."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _configs_folder() -> Path:
    """Where the ready configs lie, in a checkout and in an installed package."""
    import lightning_unlearn.configs

    return Path(str(lightning_unlearn.configs.__file__)).parent


def _sample_folder() -> Path:
    """Where the sample data lies; found without importing the datamodules, which takes seconds."""
    from importlib.util import find_spec

    spec = find_spec("lightning_unlearn.datamodules")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "sample"


def _find_configs(arguments: list[str]) -> list[str]:
    """Let ``--config sample.yaml`` name a ready config wherever one is."""
    found = list(arguments)
    for place, word in enumerate(found):
        name = word.removeprefix("--config=") if word.startswith("--config=") else None
        if place and found[place - 1] in ("--config", "-c"):
            name = word
        ready = _configs_folder() / name.removeprefix("configs/") if name is not None else None
        if name is not None and ready is not None and not Path(name).exists() and ready.is_file():
            found[place] = word.removesuffix(name) + str(ready)
    return found
