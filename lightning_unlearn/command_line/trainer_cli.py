"""LightningCLI as the commands that run a Trainer use it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch.multiprocessing.spawn import ProcessRaisedException
from typing_extensions import override

# Imported so that their classes can be named in a config without a path.
from lightning_unlearn import callbacks, datamodules, training  # noqa: F401
from lightning_unlearn.baselines import Baseline
from lightning_unlearn.command_line.scoring_words import say_of_weights
from lightning_unlearn.command_line.signals import current_stop
from lightning_unlearn.command_line.usage import OneSentence
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.diffusion.checkpoints import read_checkpoint
from lightning_unlearn.diffusion.objective import Objective
from lightning_unlearn.errors import InputError
from lightning_unlearn.strategies import Strategy
from lightning_unlearn.unlearning.guards import check_processes
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.delta_files import read_deltas


class _TakesSignalsBack(Callback):
    """Lets a signal end a command's own run at once: Lightning has just put itself before it."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (stop := current_stop()) is not None:
            stop.take_back()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)


class _Parser(OneSentence, LightningArgumentParser):
    """LightningCLI's parser, with one sentence for wrong options."""

    bases: ClassVar[Mapping[str, type]] = {
        "data": LightningDataModule,
        "method": Baseline,
        "objective": Objective,
        "strategy": Strategy,
    }


class TrainerCLI(LightningCLI):
    """A LightningCLI over any LightningModule and datamodule, those of this package by their short names.

    Args:
        command: Name of the command.
        arguments: Its options.
        description: What it does, for ``--help``.
        options: Adds options of its own to a parser.
        run: Whether the command is a Trainer's method of that name, which is run.
        **trainer_defaults: Defaults of the Trainer.
    """

    def __init__(
        self,
        command: str,
        arguments: list[str],
        description: str,
        options: Callable[[LightningArgumentParser], None] | None = None,
        *,
        run: bool = False,
        **trainer_defaults: Any,
    ) -> None:
        self.command = command
        self.options = options
        settings = {"parser_mode": "omegaconf", "description": description}
        prog = "lightning-unlearn" if run else f"lightning-unlearn {command}"
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The settings are in run.json and the checkpoint; a config.yaml would only refuse to be overwritten.
            save_config_callback=None,
            trainer_defaults=trainer_defaults,
            parser_class=_Parser,
            parser_kwargs={"prog": prog, **settings, command: settings},
            auto_configure_optimizers=False,
            args=[command, *arguments] if run else arguments,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one command, since parsers of others would be built for nothing.

        Returns:
            Its arguments that are no options.
        """
        return {self.command: LightningCLI.subcommands().get(self.command, set())}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the command's own options.

        Args:
            parser: The parser.
        """
        if self.options is not None:
            self.options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; Lightning warns whoever passes arguments on, as ``main`` does.

        Args:
            parser: The parser.
            args: Arguments.

        Raises:
            InputError: If the seed is none that NumPy takes.
        """
        self.config = parser.parse_args(args)
        seed = (self.config.get(self.command) or self.config).get("seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be from 0 to {2**32 - 1}, but is {seed}; choose another.")

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning 2.6 lets settings that a checkpoint stored override the command line (its issue 20801)."""

    def instantiate_classes(self) -> None:
        """Make Trainer, model and data.

        Raises:
            InputError: If one of them can't be made of its settings.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            reason = _innermost(error)
            raise InputError(reason) from error
        # The bar that counts samples in the place of Lightning's own, if there is one.
        if isinstance(self.model, UnlearningModule):
            theirs: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            for place, callback in enumerate(theirs):
                if isinstance(callback, ProgressBar):
                    theirs[place] = callbacks.ScoringProgress()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer.

        Args:
            **kwargs: Lightning's.

        Returns:
            It; the unlearning knows how many epochs it takes and when it logs, so that nobody need be warned.
        """
        if isinstance(self.model, UnlearningModule):
            settings = self._get(self.config_init, "trainer")
            for name, value in (("max_epochs", self.model.strategy.steps), ("log_every_n_steps", 1)):
                if settings[name] is None:
                    kwargs[name] = value
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        if (stop := current_stop()) is not None:
            trainer.callbacks.append(_TakesSignalsBack())  # type: ignore[attr-defined]
            launcher = trainer.strategy.launcher
            stop.tell_others(launcher.kill if launcher is not None else lambda number: None)
        return trainer

    def before_fit(self) -> None:
        """Look at the checkpoint and the processes before Lightning does, and leave a user's training to it."""
        self._check_checkpoint()
        if isinstance(self.model, UnlearningModule):
            check_processes(self.trainer)
            say_of_weights(self.model)
        elif (stop := current_stop()) is not None:
            stop.leave_to_lightning()

    def before_predict(self) -> None:
        """Look at the checkpoint before Lightning does, and that scores don't get lost.

        Raises:
            InputError: If no callback would keep them.
        """
        self._check_checkpoint()
        theirs: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        kept = any(
            type(callback).on_predict_batch_end is not Callback.on_predict_batch_end
            for callback in theirs
            if not isinstance(callback, ProgressBar)
        )
        if isinstance(self.model, UnlearningModule) and not kept:
            raise InputError(
                "Nothing would keep the scores; add --trainer.callbacks+=ScoreWriter --trainer.callbacks.folder=FOLDER."
            )

    def _check_checkpoint(self) -> None:
        path = self.config[self.command].get("ckpt_path")
        if path in ("best", "last", "hpc") and isinstance(self.model, UnlearningModule):
            raise InputError(f"ckpt_path {path!r} names no file; give that of a checkpoint which fit has left.")
        if path is None or path in ("best", "last", "hpc") or "://" in str(path):
            return
        if not Path(path).exists():
            raise InputError(f"There is no checkpoint at {path}; check ckpt_path, or the folder you run from.")
        if Path(path).is_file():
            if isinstance(self.model, UnlearningModule):
                read_deltas(str(path), finished=self.command != "fit")
            else:
                read_checkpoint(str(path))


def attribution_parts(cli: TrainerCLI) -> tuple[UnlearningModule, AttributionDataModule, Trainer]:
    """What the config of an attribution holds.

    Args:
        cli: After its classes are made.

    Returns:
        Model, data and Trainer.

    Raises:
        InputError: If it is the config of something else.
    """
    if not isinstance(cli.model, UnlearningModule) or not isinstance(cli.datamodule, AttributionDataModule):
        raise InputError(
            "This command takes an UnlearningModule as model and an AttributionDataModule as data, "
            f"not {type(cli.model).__name__} and {type(cli.datamodule).__name__}; start from configs/sample.yaml."
        )
    return cli.model, cli.datamodule, cli.trainer


def _innermost(error: Exception) -> str:
    """What a person can do something about, out of the errors that jsonargparse wrapped around it."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, InputError):
        cause = cause.__cause__
    if isinstance(cause, InputError):
        return str(cause)
    # The class whose constructor did not like its arguments.
    frames = (frame for frame, _ in walk_tb(cause.__traceback__) if frame.f_code.co_name == "__init__")
    made = next((type(frame.f_locals["self"]).__name__ for frame in frames if "self" in frame.f_locals), "A class")
    reason = " ".join(str(cause).split())[:400]
    return f"{made} can't be made of its settings ({type(cause).__name__}: {reason}); correct them in the config."


@contextmanager
def one_sentence() -> Iterator[None]:
    """While it lasts, errors of the libraries below that a person can do something about become one sentence.

    Yields:
        Nothing.

    Raises:
        InputError: In their place.
        ProcessRaisedException: What another process raised, if nobody has a sentence for it.
    """
    try:
        yield
    except MisconfigurationException as error:
        raise InputError(f"{' '.join(str(error).split()).rstrip('.!')}.") from error
    except ModuleNotFoundError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"A setting needs a package that is missing ({reason}); install it or change that.") from error
    except ProcessRaisedException as error:
        # A process of a strategy that forks or spawns hands over what it said as text.
        found = re.search(rf"{re.escape(InputError.__module__)}\.InputError: (.+)", str(error))
        if found is None:
            raise
        raise InputError(found[1]) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            "The device has too little memory; use a smaller batch_size and draw_batch_size, or fewer queries."
        ) from error
