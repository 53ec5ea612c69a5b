"""The command that makes an index, or adds shards to one."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lightning_unlearn.callbacks import IndexWriter
from lightning_unlearn.command_line.command_parts import BARE, make_folder, many, say
from lightning_unlearn.command_line.quiet import quiet
from lightning_unlearn.command_line.trainer_cli import TrainerCLI, attribution_parts, one_sentence
from lightning_unlearn.errors import InputError
from lightning_unlearn.index import Index, IndexPass
from lightning_unlearn.index.record import FAILED, index_digest, is_indexed, read_index
from lightning_unlearn.weights.parameters import layer_specs
from lightning_unlearn.weights.projection import Projection

# Of each output function; two of them in float16 with what is kept beside them are at most 16,000 bytes a sample.
NUMBERS = 3_800
# A side of a layer; more of them lose less, as long as they fit into the numbers.
SIDE = 8


def index(arguments: list[str]) -> None:
    """Make an index, or add shards to it; what is done already is left as it is.

    Args:
        arguments: Options.

    Raises:
        InputError: If there is to be less than one number.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, default="index", help="Folder of the index.")
        parser.add_argument(
            "--numbers",
            type=int,
            default=NUMBERS,
            help="At most so many numbers are kept of a sample's gradient, of each of two kinds, two bytes each.",
        )
        parser.add_argument("--seed", type=int, default=0, help="Of the random projections.")

    description = (
        "Keep of each training image the few numbers that new queries need, so that they cost no pass over the data. "
        "What is done already is left as it is; name more shards, and they are added."
    )
    with quiet(steps=True), one_sentence():
        cli = TrainerCLI("index", arguments, description, options, **BARE, inference_mode=False)
        module, data, trainer = attribution_parts(cli)
        numbers, output = cli.config.numbers, Path(cli.config.output)
        if numbers < 1:
            raise InputError(f"--numbers must be at least 1, but is {numbers}.")
        projection = Projection.within(layer_specs(module.layers), numbers, SIDE, cli.config.seed)
        make_folder(output)
        writer = IndexWriter(str(output))
        trainer.callbacks[:0] = [writer]  # type: ignore[attr-defined]
        say(
            f"Keeping {projection.numbers} numbers a kind of each image ({projection.side} a side of "
            f"{many(len(projection.layers), 'layer')}) …"
        )
        trainer.predict(IndexPass(module, projection), data, return_predictions=False)
        if trainer.is_global_zero:
            _wait(output)
            found = Index.open(output)
            size = sum(file.path.stat().st_size for file in found.files)
            say(f"Index of {many(len(found), 'sample')} ({size / max(1, len(found)):,.0f} bytes each): {output}")


def _wait(folder: Path) -> None:
    """Wait until each shard is kept or failed: other processes may still write, and there is no barrier after predict.

    Args:
        folder: The index's.

    Raises:
        InputError: If the folder is gone.
    """
    record = read_index(folder)
    if record is None:
        raise InputError(f"The folder {folder} was removed while the run went on; run the same command again.")
    digest, said = index_digest(record["fingerprints"]), False
    waiting = {name: about["version"] for name, about in record["shards"].items()}
    while waiting := {
        name: version
        for name, version in waiting.items()
        if not is_indexed(folder, name, version, record["sizes"], digest)
        and not (folder / FAILED / f"{name}.json").is_file()
    }:
        if not said:
            say("Waiting for the shards of other processes …")
            said = True
        time.sleep(0.5)
        if not folder.is_dir():
            raise InputError(f"The folder {folder} was removed while the run went on; run the same command again.")
