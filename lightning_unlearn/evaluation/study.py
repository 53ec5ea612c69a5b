"""A study on disk: what is trained again and how it is measured, and a small file for each finished model."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.data.files import json_with_digest, read_json, write_atomically
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation.measuring import Outcome, outcome_fields
from lightning_unlearn.evaluation.runs import Run
from lightning_unlearn.fingerprints import public_name

STUDY_FILE = "study.json"
MODELS = "models"


@dataclass(frozen=True)
class FinishedRun:
    """A model that was trained and measured.

    Attributes:
        run: Without which samples, with which seed.
        outcomes: Query key to what it made of it.
        seconds: That its training and measuring took.
    """

    run: Run
    outcomes: Mapping[str, Outcome]
    seconds: float


class Study:
    """A folder with ``study.json`` and one file a finished model, written whole or not at all.

    Models of another recipe, other queries or other draws never come into it, so that numbers in it may be compared.

    Args:
        folder: Made if it is not there.
        settings: The recipe, and how models are measured.

    Raises:
        InputError: If the folder is another study's, or can't be written.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        # Settings without a finished model bind nobody: a mistake in them costs no more than putting it right.
        if read_settings(self.folder) is None or not any((self.folder / MODELS).glob("*.json")):
            try:
                (self.folder / MODELS).mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / STUDY_FILE, json_with_digest(self.settings))
            except OSError as error:
                raise InputError(
                    f"The study can't be kept in {self.folder} ({error.strerror}); choose another folder."
                ) from None
        self._refuse_another()

    def _refuse_another(self) -> None:
        """Refuse a folder that is another study's, also where another process has made one meanwhile."""
        theirs = read_settings(self.folder)
        # By way of JSON, in which a tuple is a list.
        differing = differences(json.loads(json.dumps(self.settings)), theirs) if theirs is not None else []
        if differing:
            named = ", ".join(differing[:3]) + (" and more" if len(differing) > 3 else "")
            raise InputError(
                f"The study in {self.folder} was made with another {named}; choose another folder, or remove that one."
            )

    def path(self, run: Run) -> Path:
        """Where a run's numbers are kept.

        Args:
            run: The run.

        Returns:
            Its file.
        """
        return self.folder / MODELS / f"{run.name}.json"

    def is_finished(self, run: Run) -> bool:
        """Whether a run's numbers are there.

        Args:
            run: The run.

        Returns:
            Whether they are.
        """
        return self.path(run).is_file()

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not finished, each once.

        Args:
            runs: Some runs.

        Returns:
            Those left, in their order.
        """
        return [run for run in dict.fromkeys(runs) if not self.is_finished(run)]

    def write(self, run: Run, outcomes: Mapping[str, Outcome], seconds: float, about: Mapping[str, Any]) -> None:
        """Keep a finished run.

        Args:
            run: The run.
            outcomes: Query key to outcome.
            seconds: That its training and measuring took.
            about: More facts: versions, device.

        Raises:
            InputError: If it can't be written, or the folder has become another study's.
        """
        self._refuse_another()
        content = {
            "removed": list(run.removed),
            "seed": run.seed,
            "seconds": round(seconds, 1),
            "about": dict(about),
            "outcomes": {key: outcome_fields(outcome) for key, outcome in outcomes.items()},
        }
        try:
            self.path(run).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path(run), json_with_digest(content))
        except OSError as error:
            raise InputError(
                f"A finished model's numbers can't be written to {self.path(run)} ({error.strerror}); free the disk "
                "and run again: the others are kept."
            ) from None

    def read(self, run: Run) -> FinishedRun:
        """A finished run.

        Args:
            run: The run.

        Returns:
            What was kept of it.

        Raises:
            InputError: If it is not finished, or its file is damaged.
        """
        path = self.path(run)
        if not path.is_file():
            raise InputError(
                f"A model of the study in {self.folder} is not trained yet; run the evaluation to its end."
            )
        content = read_json(path, "is damaged", "remove it and run again")
        try:
            outcomes = {key: Outcome(**fields) for key, fields in content["outcomes"].items()}
            found = Run(tuple(content["removed"]), int(content["seed"]))
            seconds = float(content["seconds"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}); remove it and run again.") from None
        if found != run:
            raise InputError(f"{path} is of another model than its name says; remove it and run again.")
        return FinishedRun(run, outcomes, seconds)

    def losses(self, runs: Sequence[Run], queries: Sequence[str], measure: str = "loss") -> NDArray[np.float64]:
        """A measure of finished runs on queries.

        Args:
            runs: ``M`` runs.
            queries: ``Q`` query keys.
            measure: A field of :class:`~lightning_unlearn.evaluation.measuring.Outcome` that is a number.

        Returns:
            ``(M, Q)``; NaN where it was not measured.

        Raises:
            InputError: If a run was not measured on a query at all.
        """
        rows = []
        for run in runs:
            outcomes = self.read(run).outcomes
            unmeasured = [query for query in queries if query not in outcomes]
            if unmeasured:
                raise InputError(f"{self.path(run)} lacks the query {unmeasured[0]!r}; remove it and run again.")
            values = [getattr(outcomes[query], measure) for query in queries]
            rows.append([np.nan if value is None else float(value) for value in values])
        return np.array(rows, dtype=np.float64).reshape(len(runs), len(queries))

    def typical_seconds(self) -> float | None:
        """How long a model takes.

        Returns:
            The median over finished runs, ``None`` if there is none.
        """
        times = []
        for path in (self.folder / MODELS).glob("*.json"):
            try:
                times.append(float(json.loads(path.read_bytes())["seconds"]))
            except (ValueError, KeyError, TypeError, OSError):
                continue  # read() says what is wrong with it, when it is needed
        return statistics.median(times) if times else None


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Where two settings differ.

    Args:
        ours: JSON-like.
        theirs: JSON-like; what is ``None`` in one may be missing in the other.
        name: What both are called.

    Returns:
        Dotted names, sorted.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}})
        ['a.b']
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        inner = sorted(ours.keys() | theirs.keys())
        parts = [differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key) for key in inner]
        return [found for part in parts for found in part]
    if isinstance(ours, str) and isinstance(theirs, str):
        return [] if public_name(ours) == public_name(theirs) else [name]
    return [] if ours == theirs else [name]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What a study's folder says about itself.

    Args:
        folder: The folder.

    Returns:
        The settings, ``None`` if there is no study.

    Raises:
        InputError: If they can't be read.
    """
    path = folder / STUDY_FILE
    if not path.is_file():
        return None
    settings = read_json(path, "is not the record of a study", "choose another folder")
    return {name: value for name, value in settings.items() if name != "format"}
