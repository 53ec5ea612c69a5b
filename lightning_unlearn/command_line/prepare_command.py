"""The command that makes shards."""

from __future__ import annotations

from lightning_unlearn.command_line.plain_parser import plain_parser
from lightning_unlearn.preparation import prepare as make_shards


def prepare(arguments: list[str]) -> None:
    """Make shards.

    Args:
        arguments: Options.
    """
    parser = plain_parser("prepare", "Images and captions, or ready latents and embeddings, to shards.")
    parser.add_function_arguments(make_shards)
    config = parser.parse_args(arguments)
    config.pop("config", None)

    # Only now, so that --help answers at once.
    from lightning_unlearn.command_line.command_parts import many

    shards = make_shards(**parser.instantiate_classes(config).as_dict())
    samples = many(sum(shard.samples or 0 for shard in shards), "sample")
    print(f"{samples} in {many(len(shards), 'shard')} written to {config.output}.")
