"""What a bench is: its folder, its settings, its samples and queries, and the models that it needs."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_unlearn.command_line.retraining_cli import RetrainingCLI
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.evaluation import Run
from lightning_unlearn.evaluation.plan import Design, Plan, plan

BENCHES = Path(__file__).resolve().parent
FISHER_FILES = {"diagonal": "fisher.safetensors", "ekfac": "ekfac.safetensors"}
# Of targets drawn from the model, in place of the data's.
TRUE_FISHER_FILES = {"ekfac_true": "sweep/ekfac-true.safetensors"}
T = TypeVar("T")
CHOSEN = "text_kv"  # the weights that are unlearned, as in each attribute.yaml


@dataclass(frozen=True)
class Bench:
    """One bench's folder and its settings (``bench.yaml``)."""

    name: str

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return BENCHES / self.name

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What its ``bench.yaml`` says."""
        settings: dict[str, Any] = yaml.safe_load((self.folder / "bench.yaml").read_text())
        return settings

    @functools.cached_property
    def design(self) -> Design:
        """How many models of each kind."""
        return Design(**self.settings["design"])

    def samples(self, part: str) -> list[Sample]:
        """The samples in ``shards`` or ``queries``, in the order of the shards."""
        shards = sorted(list_shards(str(self.folder / part)), key=lambda shard: shard.url)
        return [sample for shard in shards for sample in read_samples(shard)]

    def cli(self) -> RetrainingCLI:
        """The training config."""
        os.chdir(BENCHES.parent)  # configs name folders from the root of the repository
        arguments = ["--config", str(self.folder / "train.yaml")]
        return RetrainingCLI("evaluate", arguments, "Bench")

    def plan(self, tables: Any = None) -> Plan:
        """The models it needs; samples are removed for the queries that report."""
        keys = [sample.key for sample in self.samples("shards")]
        reporting, choosing = self.queries
        return plan(self.design, keys, [*reporting, *choosing], tables or {})

    @property
    def queries(self) -> tuple[list[str], list[str]]:
        """The queries that report, and those that choose settings."""
        return self._parted([query.key for query in self.samples("queries")], "queries")

    def subsets(self, plan: Plan) -> tuple[list[Run], list[Run]]:
        """The subset models that report, and those that choose settings; no other model ever chooses."""
        return self._parted(plan.subsets, "subsets")

    def _parted(self, all_of_them: Sequence[T], name: str) -> tuple[list[T], list[T]]:
        ranges = self.settings["choosing"][name]
        chooses = {place for start, end in ranges for place in range(start, end)}
        parts: tuple[list[T], list[T]] = ([], [])
        for place, one in enumerate(all_of_them):
            parts[place in chooses].append(one)
        return parts


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a script that works on one bench: its name."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("bench", choices=[path.parent.name for path in sorted(BENCHES.glob("*/bench.yaml"))])
    return made


def measuring(bench: Bench) -> dict[str, Any]:
    """How models are measured."""
    return {"decoder": bench.settings.get("decoder")}
