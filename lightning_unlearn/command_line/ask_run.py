"""The stages of ``ask``, one after the other; whatever is done already is left as it is."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_unlearn.command_line.ask_config import (
    Kind,
    config_of_request,
    config_of_sample,
    kind_of,
    method_for,
    of_fisher,
    text_of,
)
from lightning_unlearn.command_line.ask_costs import batches_that_fit, device_here, forecast, memory_of
from lightning_unlearn.command_line.ask_folder import AskFolder, facts_of, known_inputs
from lightning_unlearn.command_line.ask_queries import (
    PICTURES,
    SHARDS,
    Maker,
    given_picture,
    is_prepared,
    make_pictures,
    name_of,
    pictures_left,
    query_words,
    training_words,
)
from lightning_unlearn.command_line.ask_request import Question, Request
from lightning_unlearn.command_line.check_plan import Plan, plan_of, plan_of_model
from lightning_unlearn.command_line.command_parts import BARE, check_top, many, say
from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.data.shards import MANIFEST
from lightning_unlearn.datamodules.sources import list_shards, read_manifest, with_facts
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.preparation.layouts.files import files_in, is_picture_name

STAGES = 5


class AskRun:
    """A question on its way to its answer.

    Args:
        request: What is asked.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = AskFolder(request.output)
        self.kind: Kind = "model"
        self.states: Any = None  # of the sample model's prompts

    @property
    def sample(self) -> Path | None:
        """Where the sample data lies, if it is asked."""
        return None if self.request.pipeline is not None else Path(os.environ["LIGHTNING_UNLEARN_SAMPLE"])

    def run(self) -> None:
        """Answer.

        Raises:
            InputError: If something is missing or wrong; before long work, as far as it shows there.
        """
        request, folder = self.request, self.folder
        self._check()
        method = request.method or method_for(self.kind)
        queries = folder.queries(name_of(request.questions, self._how()))
        config = self._config(queries / SHARDS)
        self._check_config(config, queries)
        folder.claim(self._inputs(config))
        self._prepare()
        self._make_queries(queries, config)
        answer = folder.answer(f"{queries.name}-{settings_digest({'method': method, 'config': config})[:8]}")
        config = self._sized(config, answer, method)
        asked = [] if method is None else ["--method", method]
        words = ["--config", str(folder.config), *asked, "--output", str(answer)]
        write_atomically(folder.config, text_of(config, ["attribute", *words]).encode())
        self._fisher(config, method)
        self._answer([*words, "--top", str(request.top)], answer, method)

    # ------------------------------------------------------------------ before long work

    def _check(self) -> None:
        """Look at whatever was named, and at nothing long."""
        from lightning_unlearn.preparation.choices import choose

        request = self.request
        check_top(request.top)
        _check_method(request.method)
        choose(request.prepare.get("like"))
        if request.pipeline is not None:
            # Not before, since it takes seconds to import.
            from lightning_unlearn.preparation.generating import check_pipeline

            check_pipeline(request.pipeline)
        if request.images is not None:
            _check_images(request.images)
        self.kind = kind_of(request)
        generated = any(question.picture is None for question in request.questions)
        if generated and "text_encoder" in request.prepare:
            raise InputError(
                "With a text encoder of its own no picture can be generated here; generate it, and give it as --query "
                "with its --prompt."
            )

    def _how(self) -> dict[str, Any]:
        """What the queries depend on besides prompts, seeds and what the folder is made of."""
        request = self.request
        return {"steps": request.steps, "guidance": request.guidance, "size": request.size}

    def _config(self, queries: Path) -> dict[str, Any]:
        if self.sample is not None:
            import lightning_unlearn.configs

            ready = Path(str(lightning_unlearn.configs.__file__)).with_name("sample.yaml")
            return config_of_sample(ready, self.request, queries)
        return config_of_request(self.request, self.folder, queries, self.kind)

    def _check_config(self, config: dict[str, Any], queries: Path) -> None:
        """Refuse a model that can't be asked, before its pictures are prepared."""
        if self.sample is not None:
            from lightning_unlearn.command_line.ask_sample import say_states, text_states

            if not is_prepared(queries):
                self.states, said = text_states(self.request.questions, self.sample / "shards")
                say_states(self.request.questions, said)
            return
        parsed = _parsed(text_of(config, []))
        plan = plan_of_model(parsed.model, parsed.data)
        # The Fisher's own header is looked at where it is needed.
        if plan.missing:
            asked = "objective" in plan.missing[0].lower() or "density" in plan.missing[0]
            raise InputError(plan.missing[0] + (" Say it in a file, as --settings FILE." if asked else ""))

    def _inputs(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What shards, Fisher and answers are made of."""
        request, known = self.request, known_inputs(self.folder.path)
        if self.sample is not None:
            return {"model": "the sample model", "settings": of_fisher(config)}
        assert request.pipeline is not None

        def facts(what: str, root: Path, names: list[str]) -> dict[str, Any]:
            before = known.get(what)
            return facts_of(root, names, before if isinstance(before, dict) else {})

        found: dict[str, Any] = {
            "model": "a pipeline",
            "pipeline": facts("pipeline", request.pipeline, _pipeline_files(request.pipeline)),
            "adapter": None,
            "images": None,
            "shards": None,
            "options_of_prepare": dict(request.prepare),
            "settings": of_fisher(config),
            "passes": request.passes,
        }
        if request.adapter is not None:
            inside = request.adapter.is_dir()
            root = request.adapter if inside else request.adapter.parent
            names = [*files_in(request.adapter)] if inside else [request.adapter.name]
            found["adapter"] = facts("adapter", root, names)
        if request.images is not None:
            found["images"] = facts("images", request.images, [*files_in(request.images)])
        else:
            shards = with_facts(list_shards(list(request.shards)))
            found["shards"] = settings_digest({"shards": sorted([shard.url, shard.version] for shard in shards)})
        return found

    # ------------------------------------------------------------------ stages

    def _prepare(self) -> None:
        request, shards = self.request, self.folder.shards
        if request.images is None:
            where = "those of the sample" if self.sample is not None else ", ".join(request.shards)
            _say_stage(1, f"Training pictures: {where}, prepared already.")
            return
        if (shards / MANIFEST).is_file():
            _say_stage(1, f"Training pictures: prepared already, in {shards}.")
            return
        count = sum(map(is_picture_name, files_in(request.images)))
        _say_stage(
            1, f"Training pictures: {many(count, 'picture')} of {request.images} go through the model's encoders …"
        )
        _command("prepare", training_words(request, shards))

    def _make_queries(self, queries: Path, config: dict[str, Any]) -> None:
        questions = self.request.questions
        if is_prepared(queries):
            _say_stage(2, f"Queries: {many(len(questions), 'picture')} there already, in {queries / PICTURES}.")
            return
        left = pictures_left(queries, questions)
        given = questions[0].picture is not None
        done = f", {len(questions) - len(left)} of them there already" if len(left) < len(questions) else ""
        what = "taken as given" if given else "generated"
        _say_stage(2, f"Queries: {many(len(questions), 'picture')} {what}{done} …")
        make_pictures(queries, questions, lambda: given_picture if given else self._maker(config))
        gc.collect()
        if self.sample is not None:
            from lightning_unlearn.command_line.ask_sample import sample_words

            _command("prepare", sample_words(queries, questions, self.states))
            return
        place = self.folder.shards if self.request.images is not None else Path(self.request.shards[0])
        _command("prepare", query_words(self.request, queries, read_manifest(place) if place.is_dir() else {}))

    def _maker(self, config: dict[str, Any]) -> Maker:
        request = self.request
        if self.sample is not None:
            from lightning_unlearn.command_line.ask_sample import sample_maker

            states = {question.key: self.states[row] for row, question in enumerate(request.questions)}
            return sample_maker(config, states, request.steps)
        from lightning_unlearn.diffusion.loading import load_network
        from lightning_unlearn.preparation.adapter_options import options_of_adapter
        from lightning_unlearn.preparation.generating import PictureMaker

        assert request.pipeline is not None
        model, size = config["model"]["init_args"], request.size
        adapter = None if request.adapter is None else str(request.adapter)
        if adapter is not None and self.kind == "adapter":
            size = options_of_adapter(adapter, size, flips=False)[0]
        network = load_network(model["network"], model.get("weights"), model.get("prefix", ""), model.get("averaged"))
        tokens = tuple(request.prepare["token"].split(",")) if "token" in request.prepare else ()
        maker = PictureMaker(
            request.pipeline, network, adapter, tokens, size, request.steps, request.guidance, device_here()
        )
        named = {} if request.adapter is None else {"adapter": request.adapter.name}

        def make(question: Question) -> Any:
            assert question.seed is not None
            picture = maker.make(question.prompt, question.seed)
            return picture, {"kind": "generated", "seed": question.seed, **maker.facts, **named}

        return make

    def _sized(self, config: dict[str, Any], answer: Path, method: str | None) -> dict[str, Any]:
        """The config with batches that fit this machine, once it is known what a sample looks like; say what comes."""
        parsed = _parsed(text_of(config, []))
        plan = plan_of(parsed.model, parsed.data)
        if plan.missing:
            raise InputError(plan.missing[0])
        device = device_here()
        chosen = config["data"]["init_args"]
        fit = dict(zip(("batch_size", "draw_batch_size"), batches_that_fit(plan, memory_of(device)), strict=True))
        for name, size in fit.items():
            if size < getattr(plan, name) and name not in chosen:
                chosen[name] = size
                setattr(plan, name, size)
        if not (answer / "report.html").is_file():
            say("What is left will take:")
            for line in self._forecast(plan, method, device):
                say(line)
        return config

    def _forecast(self, plan: Plan, method: str | None, device: torch.device) -> list[str]:
        return forecast(plan, self.request.passes, method, self.folder.path, device)

    def _fisher(self, config: dict[str, Any], method: str | None) -> None:
        place = (config["model"]["init_args"] or {}).get("fisher")
        if not _asks_fisher(method):
            _say_stage(3, f"Fisher: {method} needs none.")
        elif self.sample is not None:
            _say_stage(3, "Fisher: that of the sample, there already.")
        elif place != str(self.folder.fisher.absolute()):
            _say_stage(3, f"Fisher: {place}, as the settings say.")
        elif self.folder.fisher.is_file():
            _say_stage(3, f"Fisher: there already, in {self.folder.fisher}.")
        else:
            _say_stage(3, "Fisher: how firmly the training pictures hold each weight …")
            words = ["--config", str(self.folder.config), "--passes", str(self.request.passes)]
            _command("fisher", [*words, "--output", str(self.folder.fisher)])

    def _answer(self, words: list[str], answer: Path, method: str | None) -> None:
        _say_stage(4, f"Scores: by {method or 'the default of attribute'}, into {answer} …")
        _command("attribute", words)
        report = answer / "report.html"
        write_atomically(self.folder.report, report.read_bytes())
        _say_stage(5, f"Answer: open {self.folder.report} in a browser. What was decided: {self.folder.config}")


def _say_stage(number: int, what: str) -> None:
    say(f"[{number}/{STAGES}] {what}")


def _command(name: str, words: list[str]) -> None:
    """Another command's own function; what it holds is let go of."""
    from importlib import import_module

    getattr(import_module(f"lightning_unlearn.command_line.{name}_command"), name)(words)
    gc.collect()


def _parsed(text: str) -> Any:
    """A config as the commands parse it, of which nothing is made."""
    import tempfile

    from lightning_unlearn.command_line.check_command import CheckCLI
    from lightning_unlearn.command_line.quiet import quiet
    from lightning_unlearn.command_line.trainer_cli import one_sentence

    with tempfile.TemporaryDirectory(prefix="ask-") as place, quiet(steps=True), one_sentence():
        path = Path(place) / "ask.yaml"
        path.write_text(text, "utf-8")
        return CheckCLI("attribute", ["--config", str(path)], "", **BARE).config


def _asks_fisher(method: str | None) -> bool:
    from lightning_unlearn.baselines import BASELINES

    kind = next((kind for kind in BASELINES.values() if kind.__name__ == method), None)
    # Those of a person's own may ask for one.
    return kind is None or kind.needs_fisher or kind.__name__ == "Consensus"


def _check_method(method: str | None) -> None:
    from lightning_unlearn.baselines import BASELINES

    known = ["unlearning", *sorted(kind.__name__ for kind in BASELINES.values())]
    if method is not None and "." not in method and method not in known:
        raise InputError(f"There is no method {method!r}; take {', '.join(known)}.")


def _check_images(images: Path) -> None:
    from lightning_unlearn.preparation.layouts import layout_of

    if not images.is_dir():
        what = "is a file" if images.is_file() else "is not there"
        raise InputError(
            f"{images} {what}; give the folder of the training pictures (tables and tars become shards by `prepare`, "
            "which --shards takes)."
        )
    if layout_of(str(images)) == "folder" and not any(map(is_picture_name, files_in(images))):
        raise InputError(f"{images} holds no picture; give the folder of the training pictures.")


def _pipeline_files(folder: Path) -> list[str]:
    """The files of a pipeline's parts; beside them people keep whole checkpoints, which nobody reads here."""
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    inside = [f"{part}/{name}" for part in parts for name in files_in(folder / part)]
    return [*(["model_index.json"] if (folder / "model_index.json").is_file() else []), *inside]
