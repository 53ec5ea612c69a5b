"""One command from a model and a folder of pictures to the page that answers; each stage is another command."""

from __future__ import annotations

from typing import Any

from lightning_unlearn.command_line.plain_parser import plain_parser

DESCRIPTION = (
    "From a model and the folder of its training pictures to a report: prepares the pictures, takes the Fisher, "
    "generates what is asked about, scores the training pictures and writes report.html. Stopped, the same command "
    "goes on; another prompt uses again what is there. Nothing is fetched."
)


def ask(arguments: list[str]) -> None:
    """Answer which training pictures made generated ones possible.

    Args:
        arguments: Options.
    """
    given = _parser().parse_args(arguments)

    # Only now, so that --help answers at once.
    from lightning_unlearn.command_line.ask_request import request_of
    from lightning_unlearn.command_line.ask_run import AskRun
    from lightning_unlearn.command_line.quiet import each_warning_once

    request = request_of(given)
    with each_warning_once():
        AskRun(request).run()


Options = tuple[tuple[str, Any, Any, str], ...]

OF_MODEL: Options = (
    ("pipeline", str | None, None, "Folder of the model, as save_pretrained of a diffusers pipeline leaves it."),
    ("adapter", str | None, None, "What was trained on it: a LoRA, LoCon or DoRA, or weights of Custom Diffusion."),
    ("images", str | None, None, "Folder of the training pictures with their captions, as `prepare` takes it."),
    ("like", str | None, None, "Trainer whose rules for such a folder are followed: kohya, ai-toolkit, …"),
    ("size", int | None, None, "Side of the training's pictures in pixels, where neither header nor model says it."),
)
OF_QUESTION: Options = (
    ("prompts", str | None, None, "File of prompts, one a line; or .jsonl or .csv with `prompt` and other fields."),
    ("concept", str | None, None, "Field of the prompts by which pictures are asked about together; or `prompt`."),
    ("steps", int | None, None, "Of the sampler; by default the pipeline's."),
    ("guidance", float | None, None, "Its scale; by default the pipeline's."),
)
OF_ANSWER: Options = (
    ("method", str | None, None, "How pictures are scored; by default what is best for this kind of model."),
    ("passes", int | None, None, "Of the Fisher over the pictures, 2 at least; by default 5 to 20, more for few."),
    ("top", int, 12, "How many pictures the report shows for each query."),
    ("prepare", dict | None, None, "Other options of `prepare`: --prepare.bucket_longest 2048."),
    ("settings", str | None, None, "YAML with what the config should say in another way, e.g. the objective."),
    ("output", str, "answer", "Folder of the answer, of what was prepared for it, and of those that follow."),
)
SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}


def _parser() -> Any:
    parser = plain_parser("ask", DESCRIPTION)

    def add(options: Options) -> None:
        for name, kind, default, told in options:
            parser.add_argument(f"--{name}", type=kind, default=default, help=told)

    add(OF_MODEL)
    parser.add_argument("--shards", type=str, help="Prepared shards in the place of --images.", **SEVERAL)
    parser.add_argument("--sample", action="store_true", help="Ask the sample model that ships with the package.")
    parser.add_argument("--prompt", type=str, help="Its picture is generated and asked about; or several.", **SEVERAL)
    parser.add_argument("--query", type=str, help="Pictures to ask about, each with its --prompt.", **SEVERAL)
    parser.add_argument(
        "--seed", type=int, help="Of what is generated, by default 0; each prompt with each.", **SEVERAL
    )
    add(OF_QUESTION)
    add(OF_ANSWER)
    return parser
