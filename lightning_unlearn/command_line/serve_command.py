"""The command that answers in a browser, out of an index."""

from __future__ import annotations

from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.command_line.command_parts import BARE, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.serve_desk import Settings, desk_of
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, attribution_parts, one_sentence
from lightning_unlearn.errors import InputError
from lightning_unlearn.serving import server


def serve(arguments: list[str]) -> None:
    """Serve the page until a signal ends it.

    Args:
        arguments: Options.

    Raises:
        InputError: If the port is none.
    """

    def options(parser: LightningArgumentParser) -> None:
        for name, kind, default, help_text in (
            ("index", str, "index", "Folder of the index, as `lightning-unlearn index` makes it with the same config."),
            ("host", str, "127.0.0.1", "Where the page is; by default this machine alone can open it."),
            ("port", int, 7860, "Of the page; 0 for one that is free."),
            (
                "pipeline",
                str | None,
                None,
                "Folder of the pipeline that encodes prompts and pictures and generates; by default the model's "
                "`network`, if it is one.",
            ),
            ("token", str | None, None, "Files of learned tokens, with commas between them, as for `prepare`."),
            ("steps", int | None, None, "Of the pipeline's sampler; by default its own."),
            ("guidance", float | None, None, "Its scale; by default its own."),
        ):
            parser.add_argument(f"--{name}", type=kind, default=default, help=help_text)

    description = (
        "A page in the browser that answers out of an index: write a prompt or drop a picture, and see its sources. "
        "Nothing leaves this machine."
    )
    with quiet(steps=True), one_sentence():
        server.check_installed()
        cli = TrainerCLI("serve", arguments, description, options, **BARE)
        module, data, trainer = attribution_parts(cli)
        chosen = cli.config
        if not 0 <= chosen.port < 2**16:
            raise InputError(f"--port must be from 0 to {2**16 - 1}, but is {chosen.port}.")
        network = chosen.model.init_args.get("network")
        settings = Settings(
            index=chosen.index,
            pipeline=chosen.pipeline or (network if isinstance(network, str) else None),
            adapter=chosen.model.init_args.get("adapter"),
            tokens=tuple(chosen.token.split(",")) if chosen.token else (),
            steps=chosen.steps,
            guidance=chosen.guidance,
        )
        desk = desk_of(module, data, trainer.strategy.root_device, settings)
        server.run(desk, chosen.host, chosen.port, say)
