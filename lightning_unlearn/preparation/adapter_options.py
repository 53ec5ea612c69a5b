"""What the header of an adapter's file says of the pictures that it was trained on, as options of ``prepare``."""

from __future__ import annotations

from lightning_unlearn.diffusion.adapters import read_training_record
from lightning_unlearn.diffusion.adapters.adapter_file import read_adapter_file


def options_of_adapter(adapter: str, size: int | None, flips: bool) -> tuple[int | None, bool, list[str]]:
    """The options that follow from an adapter's training.

    Args:
        adapter: Its file or folder.
        size: Side of the pictures, if it was given; it takes precedence.
        flips: Whether mirrored latents were asked for.

    Returns:
        Size and flips; and what was taken from the header, a few words each.

    Raises:
        InputError: If the file can't be read.
    """
    file = read_adapter_file(adapter)
    training = read_training_record(file.path, file.header)
    said = training.preparation() if training is not None else {}
    taken = []
    if size is None and "size" in said:
        size = said["size"]
        taken.append(f"size {size}")
    if not flips and said.get("flips"):
        flips = True
        taken.append("flips")
    return size, flips, taken
