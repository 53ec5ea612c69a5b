"""The stages of ``ask``, one after the other; whatever is done already is left as it is."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

import lightning_unlearn.configs
from lightning_unlearn.command_line.ask_checks import check_request, inputs_of, pictures_in
from lightning_unlearn.command_line.ask_config import (
    Kind,
    answer_digest,
    config_of_request,
    config_of_sample,
    method_for,
    text_of,
)
from lightning_unlearn.command_line.ask_costs import (
    USUAL_STEPS,
    VIEWS_A_STEP,
    Machine,
    about,
    batches_that_fit,
    encoding_flops,
    forecast,
    needs_fisher,
)
from lightning_unlearn.command_line.ask_folder import AskFolder, known_inputs
from lightning_unlearn.command_line.ask_pictures import pipeline_maker, size_of
from lightning_unlearn.command_line.ask_queries import (
    PICTURES,
    SHARDS,
    Gallery,
    Maker,
    given_picture,
    is_prepared,
    name_of,
    query_words,
    training_words,
)
from lightning_unlearn.command_line.ask_request import Request
from lightning_unlearn.command_line.ask_sample import sample_maker, sample_words, say_states, text_states
from lightning_unlearn.command_line.check_command import CheckCLI
from lightning_unlearn.command_line.check_costs import calls_memory
from lightning_unlearn.command_line.check_plan import Plan, add_shards, plan_of_model
from lightning_unlearn.command_line.command_parts import BARE, many, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import one_sentence
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.datamodules.sources import read_manifest
from lightning_unlearn.errors import InputError

STAGES = 5
BATCHES = ("batch_size", "draw_batch_size")


class AskRun:
    """A question on its way to its answer.

    Args:
        request: What is asked.

    Raises:
        InputError: If something is missing or wrong.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = AskFolder(request.output)
        self.kind: Kind = check_request(request)
        self.method = request.method or method_for(self.kind)
        # What queries depend on besides prompts, seeds and what the folder is made of.
        self.how = {"steps": request.steps, "guidance": request.guidance, "size": request.size}
        self.queries = self.folder.queries(name_of(request.questions, self.how))
        self.config = self._config()
        on_cpu = (self.config.get("trainer") or {}).get("accelerator") == "cpu"
        self.machine = Machine.this(torch.device("cpu") if on_cpu else None)
        self.answer = self.folder.answer(f"{self.queries.name}-{answer_digest(self.config, self.method)}")
        self.states: Any = None  # of the sample model's prompts, and where they are from

    @property
    def sample(self) -> Path | None:
        """Where the sample data lies, if it is asked."""
        return None if self.request.pipeline is not None else Path(os.environ["LIGHTNING_UNLEARN_SAMPLE"])

    def run(self) -> None:
        """Answer.

        Raises:
            InputError: If something is missing or wrong; before long work, as far as it shows there.
        """
        inputs = inputs_of(self.request, self.config, known_inputs(self.folder.path))
        self.folder.refuse_others(inputs)
        plan, data = self._checked_model()
        self.folder.claim(inputs)
        passes = inputs.get("passes", 0)
        self._prepare()
        if not self._know_batches():
            self._look_ahead(plan, data, passes)
        self._make_queries()
        words = ["--config", str(self.folder.config), "--output", str(self.answer)]
        words += [] if self.method is None else ["--method", self.method]
        text = text_of(self.config, ["attribute", *words]).encode()
        self.answer.mkdir(parents=True, exist_ok=True)
        for place in (self.answer / self.folder.config.name, self.folder.config):
            write_atomically(place, text)
        self._take_fisher(passes)
        self._attribute([*words, "--top", str(self.request.top)])

    # ------------------------------------------------------------------ before long work

    def _config(self) -> dict[str, Any]:
        if self.sample is None:
            return config_of_request(self.request, self.folder, self.queries / SHARDS, self.kind)
        ready = Path(str(lightning_unlearn.configs.__file__)).with_name("sample.yaml")
        return config_of_sample(ready, self.request, self.queries / SHARDS)

    def _checked_model(self) -> tuple[Plan, Any]:
        """What ``check`` knows of the model; refused, if it can't be asked, before its pictures are prepared."""
        if self.sample is not None and not is_prepared(self.queries):
            self.states = text_states(self.request.questions, self.sample / "shards")
            say_states(self.request.questions, self.states[1])
        elif self.sample is None:
            _hush()
        parsed = _parsed(self.config)
        plan = plan_of_model(parsed.model, parsed.data)
        if plan.missing:
            asked = "objective" in plan.missing[0].lower() or "density" in plan.missing[0]
            raise InputError(plan.missing[0] + (" Say it in a file, as --settings FILE." if asked else ""))
        return plan, parsed.data

    def _know_batches(self) -> bool:
        """Take what was chosen before for the same answer, which has begun already."""
        record, chosen = self.answer / self.folder.config.name, self.config["data"]["init_args"]
        if not record.is_file():
            return False
        before = yaml.safe_load(record.read_bytes())["data"]["init_args"]
        chosen |= {name: before[name] for name in BATCHES if name in before}
        return True

    def _look_ahead(self, plan: Plan, data: Any, passes: int) -> None:
        """Say what the work will take that is left, and choose batches that fit, once a sample's shape is known."""
        add_shards(plan, data)
        if plan.missing or plan.sample is None:
            raise InputError(plan.missing[0] if plan.missing else "There is no training sample; name other --images.")
        assert plan.network is not None
        assert plan.objective is not None
        questions, concept = self.request.questions, self.request.concept
        plan.queries = len(questions)
        plan.targets = len({str(question.said_of(concept)) for question in questions}) if concept else plan.queries
        memory = calls_memory(plan.network, plan.objective, plan.sample, list(plan.layers))
        chosen = self.config["data"]["init_args"]
        for name, size in zip(BATCHES, batches_that_fit(plan, memory, self.machine), strict=True):
            if size < getattr(plan, name) and name not in chosen:
                chosen[name] = size
                setattr(plan, name, size)
        left = [] if is_prepared(self.queries) else self._gallery().left(questions)
        generated = sum(question.picture is None for question in left)
        evaluations = generated * VIEWS_A_STEP * (self.request.steps or USUAL_STEPS)
        say("What is left will take:")
        for line in forecast(plan, passes, self.method, evaluations, memory, self.folder.path, self.machine):
            say(line)

    def _gallery(self) -> Gallery:
        return Gallery(self.folder.pictures, self.how)

    # ------------------------------------------------------------------ stages

    def _prepare(self) -> None:
        request, shards = self.request, self.folder.shards
        if request.images is None:
            where = "those of the sample" if self.sample is not None else ", ".join(request.shards)
            _say_stage(1, f"Training pictures: {where}, prepared already.")
        elif (shards / MANIFEST).is_file():
            _say_stage(1, f"Training pictures: prepared already, in {shards}.")
        else:
            assert request.pipeline is not None
            count = pictures_in(request.images)
            flops = encoding_flops(request.pipeline, size_of(request, self.kind))
            takes = "" if flops is None else f", {about(self.machine.seconds(count * flops))}"
            _say_stage(1, f"Training pictures: {many(count, 'picture')} of {request.images} to latents{takes} …")
            _command("prepare", [*training_words(request, shards), *self._device()])

    def _device(self) -> list[str]:
        return [] if "device" in self.request.prepare else ["--device", str(self.machine.device)]

    def _make_queries(self) -> None:
        questions, queries = self.request.questions, self.queries
        if is_prepared(queries):
            _say_stage(2, f"Queries: {many(len(questions), 'picture')} there already, in {queries / PICTURES}.")
            return
        gallery = self._gallery()
        left, given = gallery.left(questions), questions[0].picture is not None
        done = f", {len(questions) - len(left)} of them there already" if len(left) < len(questions) else ""
        what = "taken as given" if given else "generated"
        _say_stage(2, f"Queries: {many(len(questions), 'picture')} {what}{done} …")
        gallery.fill(questions, lambda: given_picture if given else self._maker())
        gallery.show(questions, queries)
        gc.collect()
        if self.sample is not None:
            _command("prepare", sample_words(queries, questions, self.states[0]))
            return
        place = self.folder.shards if self.request.images is not None else Path(self.request.shards[0])
        manifest = read_manifest(place) if place.is_dir() else {}
        _command("prepare", [*query_words(self.request, queries, manifest), *self._device()])

    def _maker(self) -> Maker:
        request = self.request
        if self.sample is None:
            return pipeline_maker(request, self.kind, self.config, self.machine.device)
        states, said = self.states
        return sample_maker(self.config, request.questions, states, said, request.steps)

    def _take_fisher(self, passes: int) -> None:
        place, ours = self.config["model"]["init_args"].get("fisher"), self.folder.fisher
        if not needs_fisher(self.method):
            _say_stage(3, f"Fisher: {self.method} needs none.")
        elif self.sample is not None:
            _say_stage(3, "Fisher: that of the sample, there already.")
        elif place != str(ours.absolute()):
            _say_stage(3, f"Fisher: {place}, as the settings say.")
        elif ours.is_file():
            _say_stage(3, f"Fisher: there already, in {ours}.")
        else:
            _say_stage(3, "Fisher: how firmly the training pictures hold each weight …")
            words = ["--config", str(self.folder.config), "--passes", str(passes), "--output", str(ours)]
            _command("fisher", words)

    def _attribute(self, words: list[str]) -> None:
        method = self.method or "attribute's default method"
        _say_stage(4, f"Scores: by {method}, into {self.answer} …")
        _command("attribute", words)
        self._show()
        _say_stage(5, f"Answer: open {self.folder.report} in a browser. What was decided: {self.folder.config}")

    def _show(self) -> None:
        """Put the report where it always lies; what it leads to first."""
        beside = [path for path in sorted(self.answer.glob("*")) if path.stem in ("report", "assertion")]
        for path in sorted(beside, key=lambda path: path.name == self.folder.report.name):
            place = self.folder.path / path.name
            if path.is_dir():
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(path, place)
            else:
                write_atomically(place, path.read_bytes())


def _hush() -> None:
    """Let the libraries that load models draw no bars and give no hints; what is wrong is said by a sentence."""
    from diffusers.utils import logging as of_diffusers

    libraries: list[Any] = [of_diffusers]
    if find_spec("transformers") is not None:
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()


def _say_stage(number: int, what: str) -> None:
    say(f"[{number}/{STAGES}] {what}")


def _command(name: str, words: list[str]) -> None:
    """Another command's own function; what it holds is let go of."""
    getattr(import_module(f"lightning_unlearn.command_line.{name}_command"), name)(words)
    gc.collect()


def _parsed(config: dict[str, Any]) -> Any:
    """A config as the commands parse it, of which nothing is made."""
    with tempfile.TemporaryDirectory(prefix="ask-") as place, quiet(steps=True), one_sentence():
        path = Path(place) / "ask.yaml"
        path.write_text(text_of(config, []), "utf-8")
        return CheckCLI("attribute", ["--config", str(path)], "", None, **BARE).config
