"""What all drills share: commands on toys, their undisturbed results, and what a disturbed run may leave and say."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import command_toys
import evaluation_toys
import numpy as np
from processes import Script

import lightning_unlearn.__main__
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.fisher import load_fisher
from lightning_unlearn.scores.files import RUN_FILE, SCORES, read_run, read_scores
from lightning_unlearn.weights.delta_files import read_deltas

PROGRAM = lightning_unlearn.__main__.__file__
QUIET = ["--trainer.enable_progress_bar", "false"]
# What nobody but a library below says.
FOREIGN = ("Traceback", "Exception ignored", "Fatal Python error", "terminate called", "core dumped")


@dataclass
class Report:
    """What a drill has seen.

    Attributes:
        faults: What must not be, a line each.
        counts: How often something was seen.
        slowest: Seconds that the slowest end took.
    """

    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0

    def count(self, what: str) -> None:
        """Note that something was seen once more."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def end(self) -> int:
        """Print a summary; the exit status."""
        print("; ".join(f"{count} {what}" for what, count in sorted(self.counts.items())))
        if self.slowest:
            print(f"The slowest end took {self.slowest:.1f} s.")
        for fault in self.faults:
            print(f"FAULT: {fault}")
        print(f"{len(self.faults)} faults.")
        return 1 if self.faults else 0


@dataclass(frozen=True)
class Job:
    """A command on toys that writes into one folder.

    Attributes:
        words: The command for a folder.
        same: Whether a finished folder holds what an undisturbed one does.
    """

    words: Callable[[Path], list[str]]
    same: Callable[[Path, Path], bool]


def jobs(folder: Path) -> dict[str, Job]:
    """The commands, with toys in a folder."""
    config = command_toys.write_config(folder / "attribution.yaml")
    evaluation_toys.toy_folder(folder)
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", rng.normal(size=(60, 3, 8, 8)).astype("float32"))
    np.save(folder / "text.npy", rng.normal(size=(60, 4, 6)).astype("float32"))
    (folder / "captions.txt").write_text("\n".join(f"caption {number}" for number in range(60)))
    small = {"subsets": 0, "seeds": 2, "k": "[2]", "removal_queries": 1, "random_repeats": 1}
    design = [word for name, value in small.items() for word in (f"--design.{name}", str(value))]
    base = ["--config", config, *QUIET]
    given = ["--latents", "latents.npy", "--text", "text.npy", "--captions", "captions.txt"]
    arrays = [str(folder / word) if "." in word else word for word in given]
    race = ["--race.top", "2", "--race.views", "1", "--race.share", "0.4"]
    studied = [
        *("--config", str(folder / "toy.yaml"), "--queries", str(folder / "queries"), "--draws", "10"),
        *design,
    ]
    return {
        "attribute": Job(lambda out: ["attribute", *base, "--output", str(out)], same_scores),
        "attribute --method": Job(
            lambda out: ["attribute", *base, "--method", "GradientSimilarity", "--output", str(out)], same_scores
        ),
        "attribute --race": Job(lambda out: ["attribute", *base, *race, "--output", str(out)], same_scores),
        "fisher": Job(
            lambda out: ["fisher", *base, "--kind", "ekfac", "--passes", "2", "--output", str(out / "f.safetensors")],
            lambda one, two: load_fisher(one / "f.safetensors").count == load_fisher(two / "f.safetensors").count,
        ),
        "evaluate": Job(lambda out: ["evaluate", *studied, "--study", str(out)], same_study),
        "prepare": Job(
            lambda out: ["prepare", *arrays, "--samples_per_shard", "5", "--output", str(out / "shards")], same_files
        ),
    }


def same_scores(one: Path, two: Path) -> bool:
    """Whether two runs have the very same scores."""
    ours, theirs = read_scores(one), read_scores(two)
    return (
        (ours.keys, ours.queries) == (theirs.keys, theirs.queries)
        and bool((ours.scores == theirs.scores).all())
        and bool((ours.base_losses == theirs.base_losses).all())
        and (one / "report.html").is_file()
    )


def same_study(one: Path, two: Path) -> bool:
    """Whether two studies have the same results."""
    return (one / "results.json").read_bytes() == (two / "results.json").read_bytes()


def same_files(one: Path, two: Path) -> bool:
    """Whether two folders hold the same files."""
    trees: list[dict[str, bytes]] = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (one, two)
    ]
    return trees[0] == trees[1]


def check_files(folder: Path, report: Report, where: str) -> None:
    """See that each file of ours in a folder is whole."""
    checks: list[tuple[Path, Callable[[Path], Any]]] = []
    checks += [(path, lambda path: read_deltas(str(path))) for path in folder.rglob("deltas.ckpt")]
    checks += [(path, load_fisher) for path in folder.rglob("*.safetensors")]
    checks += [(path, lambda path: read_run(path.parent)) for path in folder.rglob(RUN_FILE)]
    for scores in folder.rglob(SCORES):
        if any(scores.glob("*.parquet")):
            checks.append((scores, lambda scores: read_scores(scores.parent, partial=True)))
    for path, check in checks:
        try:
            check(path)
        except Exception as error:
            report.faults.append(f"{where}: {path.relative_to(folder)}: {type(error).__name__}: {error}")


def check_words(said: str, report: Report, where: str) -> None:
    """See that nobody but the command spoke."""
    for word in FOREIGN:
        if word in said:
            report.faults.append(f"{where}: {word} in what it said: {said[-1500:]}")


def finish(words: list[str], folder: Path, report: Report, where: str) -> None:
    """Run a command again, undisturbed, to its end."""
    with Script(PROGRAM, *words, folder=folder) as script:
        status = script.wait(300)
        if status != 0:
            report.faults.append(f"{where}: run again, it ended with {status}: {script.said()[-1500:]}")


def undisturbed(job: Job, out: Path) -> float:
    """Run a command in a process of its own; its seconds."""
    out.mkdir()
    started = time.monotonic()
    with Script(PROGRAM, *job.words(out), folder=out.parent) as script:
        status = script.wait(300)
        assert status == 0, script.said()
    return time.monotonic() - started


def inside(words: list[str]) -> tuple[int, str]:
    """Run a command in this process; its exit status (-1 for an exception) and what it said to standard error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except Exception as error:
            return -1, f"Traceback of {type(error).__name__}: {error}"
    return status, said.getvalue()
