"""Which training images made a run's own sample pictures, in the run's own logs."""

from __future__ import annotations

import copy
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_unlearn.baselines import Baseline
from lightning_unlearn.callbacks.answers import Asked, answer
from lightning_unlearn.callbacks.aside import aside, frozen_copy
from lightning_unlearn.callbacks.fisher_accumulator import FisherAccumulator
from lightning_unlearn.callbacks.run_loggers import log_numbers, log_pictures, log_table
from lightning_unlearn.callbacks.sample_prompts import Generate, generated, write_queries
from lightning_unlearn.callbacks.shown_samples import shown
from lightning_unlearn.callbacks.waiting import Waiting
from lightning_unlearn.callbacks.with_fisher import WithFisher
from lightning_unlearn.data.files import reason_of, write_atomically
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.diffusion.contract import Objective
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import Fisher
from lightning_unlearn.scores.table import ScoreTable
from lightning_unlearn.strategies import Strategy
from lightning_unlearn.weights.parameters import find_network, layer_parameters, select_layers

COLUMNS = ("query", "rank", "key", "score", "base_loss", "caption")


class AttributionLogger(WithFisher):
    """Answers, while somebody's network is trained, which training images made the run's own sample pictures.

    It takes the Fisher information out of the training (:class:`FisherAccumulator`), and at the end, or every few
    epochs, unlearns queries of a frozen copy of the network and scores all training samples. The sources go to the
    Trainer's loggers: pictures and numbers to TensorBoard and Weights & Biases, numbers to any other, and to a folder
    of the run ``{folder}/step=S`` a table ``sources.csv`` and all scores, which ``lightning-unlearn report``
    takes.

    No bit of the training changes, nor of its random state, nor of what it logs. With several processes the first one
    answers, and the others wait. Where an answer fails, a warning says why and the training goes on.

    Args:
        data: The training shards, and the queries if these are in shards.
        fisher: Takes the Fisher, and names the network and the weights that are looked at; by default of the training
            from its first step on.
        objective: The loss that the network is trained with; by default the LightningModule's ``objective``.
        prompts: In place of queries in shards: Samples, or whatever ``generate`` makes Samples of.
        generate: Makes queries anew for each answer, of a frozen copy of the network and the prompts (or the queries in
            shards); or a number of steps, by which the package's own sampler generates from the queries' text states
            and seeds. By default queries are taken as they are.
        every_n_epochs: Answer after so many epochs each, too; by default only at the end.
        top: How many sources are shown for each query.
        method: Another method than unlearning, e.g. ``DAS()`` or ``Consensus()``.
        strategy: How far unlearning goes; by default :class:`Newton`'s way.
        views: On which views samples are looked at.
        folder: Where answers are kept, in the logger's folder.
        strict: Whether an answer that fails ends the training.

    Raises:
        InputError: If an argument is out of range, or there is nobody who makes samples of prompts.

    Example::

        from lightning.pytorch import Trainer
        from lightning_unlearn import AttributionDataModule, AttributionLogger, FisherAccumulator

        data = AttributionDataModule("shards", queries="queries")
        asked = AttributionLogger(data, FisherAccumulator(target="unet", start_epoch=8))
        trainer = Trainer(max_epochs=10, callbacks=[asked])
    """

    def __init__(
        self,
        data: LightningDataModule,
        fisher: FisherAccumulator | None = None,
        objective: Objective | None = None,
        prompts: list[Any] | None = None,
        generate: int | Generate | None = None,
        every_n_epochs: int | None = None,
        top: int = 8,
        method: Baseline | None = None,
        strategy: Strategy | None = None,
        views: Views | None = None,
        folder: str = "attribution",
        strict: bool = False,
    ) -> None:
        numbers = [top, *(number for number in (every_n_epochs, generate) if isinstance(number, int))]
        if min(numbers) < 1:
            raise InputError(f"top, every_n_epochs and steps to generate with must be at least 1, not {min(numbers)}.")
        if prompts is not None and not callable(generate):
            others = [one for one in prompts if not isinstance(one, Sample)]
            if others or not prompts:
                raise InputError(
                    f"AttributionLogger can't make a picture of the prompt {str(others[0] if others else '')!r}; give "
                    "generate, a function of the network and the prompts that returns Samples, or name shards of "
                    "queries in data."
                )
        if method is not None and (method.columns is not None or strategy is not None):
            what = "needs no query, so there is nothing to answer" if method.columns is not None else "has no strategy"
            raise InputError(f"{type(method).__name__} {what}; choose another method, or leave the strategy out.")
        super().__init__(
            fisher or FisherAccumulator(),
            takes=method is None or method.needs_fisher or method.rise is not None,
        )
        self.data = data
        self.objective = objective
        self.prompts = prompts
        self.generate = generate
        self.every_n_epochs = every_n_epochs
        self.top = top
        self.method = method
        self.strategy = strategy
        self.views = views
        self.folder = folder
        self.strict = strict
        self._waiting: Waiting | None = None
        self._answered = -1  # after which step

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what no answer could come of, before long work."""
        super().on_train_start(trainer, pl_module)
        with aside():
            self._check(trainer, pl_module)
        self._answered = -1
        self._waiting = Waiting(trainer.world_size)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise InputError(
                f"{type(trainer.strategy).__name__} cuts weights apart, and AttributionLogger needs them whole; leave "
                "it out, and run `lightning-unlearn attribute` after the training."
            )
        select_layers(find_network(pl_module, self.fisher.target), self.fisher.parameters)
        self._objective(pl_module)
        data = copy.copy(self.data)
        data.setup("predict")
        if self.prompts is None and not getattr(data, "queries", None):
            raise InputError(
                "AttributionLogger has no queries; name shards of them in data, or give prompts and generate, a "
                "function of the network and the prompts that returns Samples."
            )

    def _objective(self, pl_module: LightningModule) -> Objective:
        objective = self.objective or getattr(pl_module, "objective", None)
        if not isinstance(objective, Objective):
            raise InputError(
                f"{type(pl_module).__name__} does not say what loss its network is trained with; give "
                "AttributionLogger an objective, e.g. DenoisingObjective(noise_scheduler.config)."
            )
        return objective

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, if it is time."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._answer(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, if these weights were not answered for."""
        super().on_train_end(trainer, pl_module)
        if self._answered != trainer.global_step:
            self._answer(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the other processes go."""
        super().teardown(trainer, pl_module, stage)
        if self._waiting is not None:
            self._waiting.end()
            self._waiting = None

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer on the first process; every one must call it."""
        if trainer.fast_dev_run or self._waiting is None:  # type: ignore[attr-defined]
            return
        self._answered = trainer.global_step
        fisher = self.fisher.usable() if self._takes else None
        if self._takes and fisher is None:
            return  # it is said
        place = _unused(Path(trainer.log_dir or trainer.default_root_dir) / self.folder, trainer.global_step)
        refused: Exception | None = None
        if trainer.is_global_zero:
            try:
                with aside():
                    self._ask(trainer, pl_module, fisher, place)
            except Exception as error:  # whatever it is, it is not worth a training
                refused = error
        if refused is not None and not self.strict:
            why = str(refused) if isinstance(refused, InputError) else reason_of(refused)
            rank_zero_warn(
                f"AttributionLogger has no answer after step {trainer.global_step}, and the training goes on without: "
                f"{why}"
            )
            refused = None
        if self._waiting.failed(refused is not None):
            raise refused or InputError("AttributionLogger had no answer on the first process, which says why.")

    def _ask(self, trainer: Trainer, pl_module: LightningModule, fisher: Fisher | None, place: Path) -> None:
        network = frozen_copy(find_network(pl_module, self.fisher.target))
        objective = self._objective(pl_module)
        objective.check_network(network)
        if fisher is not None:
            # It says of which weights it is, as its file does.
            own = layer_parameters(select_layers(network, self.fisher.parameters))
            fisher.weights = {name: parameter.detach() for name, parameter in own.items()}
        data: Any = copy.copy(self.data)
        data.trainer = None
        data.skip_shards(frozenset())
        made = self._made(network, objective, data)
        if made is not None:
            write_queries(made, place / "queries")
            data.query_patterns, data.query_keys = str(place / "queries"), None
        asked = Asked(self.fisher.parameters, objective, self.method, self.strategy, self.views)
        table = answer(asked, network, fisher, data, place)
        self._log(trainer, table, data, place)
        rank_zero_info(f"AttributionLogger's answer lies in {place}.")

    def _made(self, network: nn.Module, objective: Objective, data: Any) -> Sequence[Sample] | None:
        """The queries, if they are not in shards as they are."""
        if self.generate is None:
            return self.prompts
        prompts = self.prompts
        if prompts is None:
            data.setup("predict")
            prompts = list(data.queries)
        if isinstance(self.generate, int):
            return generated(network, objective, prompts, self.generate)
        return self.generate(network, prompts)

    def _log(self, trainer: Trainer, table: ScoreTable, data: Any, place: Path) -> None:
        tops = {query: table.top(query, self.top) for query in table.queries}
        found = data.find_samples({key for top in tops.values() for key, _ in top})
        queries = {query.key: query for query in data.queries}
        base = dict(zip(table.keys, table.base_losses.tolist(), strict=True))
        rows: list[tuple[Any, ...]] = []
        numbers: dict[str, float] = {}
        for query, top in tops.items():
            pictures = [shown(queries.get(query), query, "query")]
            for rank, (key, score) in enumerate(top, 1):
                pictures.append(shown(found.get(key), f"{rank}. {key}", f"{key} · score {score:.3g}"))
                caption = found[key].captions[0] if key in found else ""
                rows.append((query, rank, key, score, base[key], caption))
            log_pictures(trainer, f"attribution/{query}", pictures)
            about = table.run.get("targets", {}).get(query, {})
            flat = {**about, **{f"sure_{name}": value for name, value in about.get("sure", {}).items()}}
            numbers[f"attribution/{query}/top_score"] = top[0][1]
            numbers |= {f"attribution/{query}/{name}": value for name, value in flat.items() if type(value) is float}
        stream = io.StringIO()
        csv.writer(stream).writerows([COLUMNS, *rows])
        write_atomically(place / "sources.csv", stream.getvalue().encode("utf-8", "replace"))
        log_table(trainer, "attribution/sources", COLUMNS, rows)
        log_numbers(trainer, numbers)


def _unused(folder: Path, step: int) -> Path:
    """A folder that no earlier training answered into."""
    place, number = folder / f"step={step}", 0
    while place.exists():
        number += 1
        place = folder / f"step={step}-v{number}"
    return place
