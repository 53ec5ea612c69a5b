"""The unlearning that commands run: deltas in a run's folder, and the scores of what is asked together with others."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_unlearn.baselines import Baseline
from lightning_unlearn.callbacks import ScoreWriter
from lightning_unlearn.command_line.command_parts import make_folder, say
from lightning_unlearn.command_line.scoring_words import Announcer, targets_in_words, wait_for_scores
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.scores.files import read_scores
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.guards import check_processes
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.delta_files import read_deltas

# Of unlearning where it is asked together with others: its own scores, a run like any other.
FOLDER = "unlearning"


def unlearn(
    module: UnlearningModule, data: AttributionDataModule, trainer: Trainer, output: Path, writer: ScoreWriter
) -> Path:
    """Find the deltas of all targets, unless they are found already, and make the Trainer ready to score.

    Args:
        module: What is unlearned, and how.
        data: Names the queries and the shards.
        trainer: Fits; it gets the writer.
        output: The folder of the run.
        writer: Takes the scores that come later.

    Returns:
        The checkpoint with the deltas.

    Raises:
        InputError: If the folder is another run's, or can't be written to.
    """
    check_processes(trainer)
    make_folder(output)
    # Before the progress bar, so that a folder of another run is refused and the step announced before it is drawn.
    trainer.callbacks[:0] = [writer, Announcer(output)]  # type: ignore[attr-defined]
    deltas = output / "deltas.ckpt"
    if not _is_unlearned(deltas, module, data, trainer):
        trainer.fit(module, data)
        _save(trainer, deltas)
    return deltas


def unlearned_for(
    method: Baseline, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer, output: Path
) -> Callable[[], ScoreTable] | None:
    """The unlearning that a method asks together with others: a run of its own, in a folder of the run.

    Its step is the method's, of all that else is the module's.

    Args:
        method: The method.
        module: What is unlearned.
        data: Names the queries and the shards.
        trainer: Fits and predicts.
        output: The folder of the run.

    Returns:
        What runs it and gives its scores, by the rule ``difference``; ``None`` if the method asks for none.

    Raises:
        InputError: If the module has a strategy of its own.
    """
    rise = method.rise
    if rise is None:
        return None
    step_of(method, module)
    return lambda: scored_by(ScoreWriter(str(output / FOLDER), "difference", data.on_bad_sample), module, data, trainer)


def step_of(method: Baseline, module: UnlearningModule) -> None:
    """Give a module the step that a method wants of the unlearning that it asks.

    Args:
        method: With a ``rise``.
        module: What is unlearned.

    Raises:
        InputError: If the module has a strategy of its own.
    """
    if module.strategy.settings() != Newton().settings():
        raise InputError(
            f"{method.name} says itself how far a step goes ({method.rise:.0%}), but the model has a strategy of its "
            "own; leave it out, and set --method.rise, or take --method unlearning."
        )
    module.strategy = Newton(target_increase=method.rise)


def scored_by(
    writer: ScoreWriter, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer
) -> ScoreTable:
    """Unlearn the queries and score the samples, as a run of its own in the writer's folder.

    Args:
        writer: Takes the scores.
        module: What is unlearned.
        data: Names the queries and the shards, and with ``keys`` the samples.
        trainer: Fits and predicts.

    Returns:
        The scores.
    """
    deltas = unlearn(module, data, trainer, writer.folder, writer)
    trainer.predict(module, data, return_predictions=False, ckpt_path=str(deltas))
    wait_for_scores(writer.folder)
    data.skip_shards(frozenset())  # whoever comes now looks at all of them
    return read_scores(writer.folder)


def _save(trainer: Trainer, path: Path) -> None:
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder was removed while the run went on")
        trainer.save_checkpoint(path, weights_only=False)
    except OSError as error:
        raise InputError(
            f"The deltas can't be written to {path} ({error.strerror}); free the disk and run again."
        ) from None
    say(f"Deltas: {path}")


def _is_unlearned(path: Path, module: UnlearningModule, data: AttributionDataModule, trainer: Trainer) -> bool:
    """Whether a checkpoint holds the deltas that this run would make."""
    if not path.exists():
        return False
    if not path.is_file():
        raise InputError(f"{path} is no file, so the deltas can't be kept there; choose another --output.")
    theirs = read_deltas(str(path))["fingerprints"]
    data.trainer = trainer  # so that each process looks at its own shards only
    data.setup("fit")
    ours = {
        "weights": module.weights_fingerprint(),
        "fisher": module.fisher_fingerprint(),
        "unlearning": module.unlearning_fingerprint(data),
    }
    differing = [name for name, value in ours.items() if theirs[name] != value]
    if differing:
        raise InputError(
            f"{path} was made with other {', '.join(differing)} than this run's; "
            "choose another --output, or remove that folder."
        )
    say(f"{targets_in_words(data)} unlearned already, in {path}.")
    return True
