"""From a finished training of ``configs/train_sample.yaml`` to the files that ship: weights and queries.

    lightning-unlearn fit --config configs/train_sample.yaml
    python scripts/export_sample_model.py runs/train_sample
    lightning-unlearn fisher --config configs/sample.yaml --passes 20 --output datamodules/sample/fisher.safetensors

It first checks that the model has learned: of 50 pictures generated for training captions, how many have their own
caption's picture among the five nearest training pictures.
"""

from __future__ import annotations

import argparse
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.loading import load_weights
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate, how_generated
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import seed_of

STEPS = 40
# Short names of what people recognise at 16 by 16 pixels; one generated query each.
GENERATED = ("cherries", "tiger", "sushi", "yawning_face", "soccer", "four_leaf_clover")
TRAINING_QUERIES = 2


def build_network(config: str = "configs/train_sample.yaml") -> nn.Module:
    """The sample network with random weights.

    Args:
        config: The training config.

    Returns:
        The network, in eval mode.
    """
    from diffusers import UNet2DConditionModel

    settings = yaml.safe_load(Path(config).read_text())["model"]["init_args"]["network"]["init_args"]
    network: nn.Module = UNet2DConditionModel(**settings)
    return network.eval()


def nearest_rank(picture: Tensor, own: int, training: Tensor) -> int:
    """How many training pictures are nearer to a picture than its own caption's.

    Args:
        picture: ``(C, H, W)``.
        own: Number of the caption's picture.
        training: ``(N, C, H, W)``.

    Returns:
        0 if its own is the nearest.
    """
    distances = (training - picture).flatten(1).square().sum(1)
    return int((distances < distances[own]).sum())


def check(network: nn.Module, samples: list[Sample], sheet: str | None) -> int:
    """Generate 50 pictures for training captions and count those that are recognised.

    Args:
        network: The trained network.
        samples: The training data.
        sheet: Where a contact sheet is written (generated above, training picture below), if anywhere.

    Returns:
        How many of 50 have their own picture among the five nearest.
    """
    chosen = random.Random(seed_of("recognise", 0)).sample(range(len(samples)), 50)
    text = torch.stack([samples[number].text[0] for number in chosen])
    pictures = generate(network, DenoisingObjective(), {"text": text}, samples[0].latent.shape, chosen, STEPS).clamp(
        -1, 1
    )
    training = torch.stack([sample.latent for sample in samples])
    ranks = [nearest_rank(picture, own, training) for picture, own in zip(pictures, chosen, strict=True)]
    print(
        f"own picture nearest: {sum(rank == 0 for rank in ranks)} of 50, among the five nearest: "
        f"{sum(rank < 5 for rank in ranks)} of 50"
    )
    if sheet is not None:
        rows = [torch.cat(list(pictures[start : start + 10]), 2) for start in range(0, 50, 10)]
        truth = [torch.cat(list(training[chosen[start : start + 10]]), 2) for start in range(0, 50, 10)]
        page = torch.cat([part for pair in zip(rows, truth, strict=True) for part in pair], 1)
        to_image(page).resize((page.shape[2] * 5, page.shape[1] * 5), Image.Resampling.NEAREST).save(sheet)
    return sum(rank < 5 for rank in ranks)


def to_image(latent: Tensor) -> Image.Image:
    """A pixel-space latent as a picture.

    Args:
        latent: ``(3, H, W)`` in [-1, 1].

    Returns:
        The picture.
    """
    array = ((latent.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def png(latent: Tensor) -> bytes:
    """A pixel-space latent as an enlarged PNG.

    Args:
        latent: ``(3, H, W)``.

    Returns:
        The file's bytes.
    """
    stream = io.BytesIO()
    to_image(latent).resize((64, 64), Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def make_queries(network: nn.Module, samples: list[Sample], folder: Path) -> None:
    """Six generated pictures and two training pictures, as query shards.

    Args:
        network: The trained network.
        samples: The training data.
        folder: Where the shards go.
    """
    by_name = {sample.metadata["short_name"]: sample for sample in samples}
    fields: list[dict[str, Any]] = []
    objective = DenoisingObjective()
    for seed, name in enumerate(GENERATED):
        source = by_name[name]
        given = {"text": source.text}
        picture = generate(network, objective, given, source.latent.shape, [seed], STEPS)[0].clamp(-1, 1)
        about = {"captions": source.captions, "kind": "generated", **how_generated(objective, seed, STEPS)}
        fields.append(encode_sample(f"generated-{name}", half(picture), half(source.text), about, picture=png(picture)))
    for sample in random.Random(seed_of("training-queries", 0)).sample(samples, TRAINING_QUERIES):
        about = {"captions": sample.captions, "kind": "training picture", "of": sample.key}
        name = f"training-{sample.metadata['short_name']}"
        fields.append(encode_sample(name, half(sample.latent), half(sample.text), about, picture=png(sample.latent)))
    write_shards(fields, folder, name="queries", about={"space": "pixel"})


def half(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as a float16 array.

    Args:
        tensor: Of any shape.

    Returns:
        The array.
    """
    array: np.ndarray[Any, Any] = tensor.half().numpy()
    return array


def main() -> None:
    """Check and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="default_root_dir of the training")
    parser.add_argument("--output", type=Path, default=Path("datamodules/sample"))
    parser.add_argument("--sheet", help="write a contact sheet of the 50 pictures here")
    arguments = parser.parse_args()
    network = build_network()
    load_weights(network, str(arguments.run / "sample.ckpt"), "network.")
    network.half().float()  # what ships is float16
    shards = list_shards(str(arguments.output / "shards"))
    samples = sorted((sample for shard in shards for sample in read_samples(shard)), key=lambda sample: sample.key)
    if check(network, samples, arguments.sheet) < 45:
        raise InputError("The model has not learned its captions; train it to the end of configs/train_sample.yaml.")
    weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(weights, arguments.output / "model.safetensors")
    make_queries(network, samples, arguments.output / "queries")


if __name__ == "__main__":
    main()
