"""A query's region: how its picture is read, and that the loss is that of the region alone."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attribution_runs import decoded, random_fisher, toy_data, unlearn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference_attribution import Naive, mean_gradient, natural_step
from torch import Tensor, nn
from toys import LATENT, ToyDenoiser, ToyObjective, grey_png, tiny_unet, told, toy_fields, toy_shards

from lightning_unlearn.data.masks import decode_mask
from lightning_unlearn.data.samples import Sample, ViewBatch, named_arrays
from lightning_unlearn.data.shards import encode_sample, write_shards
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.diffusion.objective import DenoisingObjective, Objective, mean_error
from lightning_unlearn.draws.unlearning_draws import draw_for_target
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Measuring
from lightning_unlearn.strategies import Newton
from lightning_unlearn.unlearning.module import UnlearningModule

DRAWS, DAMPING = 6, 0.1
ALL = np.ones(LATENT[1:])
# Soft at its edge, and neither square nor in the middle.
HALF = np.repeat([1.0, 0.5, 0.0], [3, 1, 4])[:, None] * np.repeat([1.0, 0.0], [6, 2])
# What an 8-bit picture keeps of it.
KEPT = torch.from_numpy(np.rint(255 * HALF) / 255)


class RegionObjective(ToyObjective):
    """The toy's loss, over the region."""

    takes_masks = True

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        s = ((timesteps + 1) / 11).to(noise)[:, None, None, None]
        prediction = network((1 - s) * batch.latents + s * noise, timesteps, batch.text)
        return mean_error((prediction - noise).square(), batch.mask)


# ---------------------------------------------------------------------------------- how it is read


def slow_areas(grey: np.ndarray[Any, Any], height: int, width: int) -> list[list[float]]:
    """The mean of a mask over each place, pixel by pixel."""
    places = [[0.0] * width for _ in range(height)]
    for row in range(height):
        for column in range(width):
            top, bottom = row * grey.shape[0] / height, (row + 1) * grey.shape[0] / height
            left, right = column * grey.shape[1] / width, (column + 1) * grey.shape[1] / width
            terms = [
                float(grey[y, x])
                * max(0.0, min(bottom, y + 1) - max(top, y))
                * max(0.0, min(right, x + 1) - max(left, x))
                for y in range(grey.shape[0])
                for x in range(grey.shape[1])
            ]
            places[row][column] = math.fsum(terms) / ((bottom - top) * (right - left)) / 255
    return places


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_mask_of_any_size_is_averaged_over_areas(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    grey = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    grey[0, 0] = 9  # not empty
    found = decode_mask(grey_png(grey / 255), rows, columns, "A query")
    assert found.dtype == torch.float32
    expected = torch.tensor(slow_areas(grey, rows, columns))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (1000, 333)])
def test_a_white_mask_is_exactly_one_everywhere(size: tuple[int, int]) -> None:
    assert torch.equal(decode_mask(grey_png(np.ones(size)), 8, 8, "A query"), torch.ones(8, 8))


def picture(kind: str, mode: str = "L", size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, "white" if mode != "I;16" else 9).save(stream, kind)
    return stream.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that says that it is large, and holds nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (grey_png(np.zeros((8, 8))), "is all black"),
        (picture("png", "RGB"), "is of the kind RGB, not 8-bit grey"),
        (picture("png", "LA"), "is of the kind LA, not 8-bit grey"),
        (picture("png", "P"), "is of the kind P, not 8-bit grey"),
        (picture("png", "I;16"), "is of the kind I;16, not 8-bit grey"),
        (picture("jpeg"), "can't be read as a PNG"),
        (picture("gif"), "can't be read as a PNG"),
        (picture("tiff"), "can't be read as a PNG"),
        (b"", "can't be read as a PNG"),
        (picture("png")[:-20], "can't be read as a PNG"),
        (picture("png", size=(4097, 4096)), "has 4097×4096 pixels, more than"),
        (header(10**5, 10**3), "can't be read as a PNG"),
        (header(10**5, 10**5), "can't be read as a PNG"),
    ],
)
def test_what_is_no_mask_is_one_sentence_with_the_querys_key(content: bytes, says: str) -> None:
    fields = {**toy_fields(3, prefix="query"), "__url__": "queries.tar", "mask.png": content}
    with pytest.raises(InputError, match=r"^Sample 'query-00003' in queries\.tar: mask\.png ") as error:
        decoded(fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_a_mask_is_read_of_queries_alone(tmp_path: Path) -> None:
    made = told(toy_fields(0), HALF)
    again = encode_sample(
        "b", np.zeros(LATENT, np.float32), np.zeros((1, 4, 6), np.float32), {"captions": ["b"]}, mask=grey_png(HALF)
    )
    write_shards([made, again], tmp_path / "shards")
    (info,) = list_shards(str(tmp_path / "shards"))
    assert [sample.mask for sample in read_samples(info, pictures=True)] == [None, None]
    for sample in read_samples(info, masks=True):
        torch.testing.assert_close(sample.mask, KEPT.float())


def test_what_is_not_read_can_not_fail(tmp_path: Path) -> None:
    toy_shards(tmp_path / "queries", 1, 1, prefix="query")
    write_shards([{**told(toy_fields(number)), "mask.png": b"broken"} for number in range(3)], tmp_path / "train")
    data = toy_data(tmp_path)
    data.setup("predict")
    assert [(len(batch), batch.error) for batch in data.predict_dataloader()] == [(3, None)]


def test_a_mask_is_in_a_querys_fingerprint_and_changes_none_without() -> None:
    plain, masked = decoded(toy_fields(0)), decoded(told(toy_fields(0), HALF))
    assert set(named_arrays([plain])) == {"sample-00000/latent", "sample-00000/text"}
    assert set(named_arrays([masked])) == {"sample-00000/latent", "sample-00000/text", "sample-00000/mask"}


# ---------------------------------------------------------------------------------- the loss of a region


def network_of(name: str) -> tuple[nn.Module, Objective]:
    if name == "toy":
        return ToyDenoiser(), RegionObjective()
    return tiny_unet(), DenoisingObjective({}, name, snr_gamma=5.0 if name == "epsilon" else None)  # type: ignore[arg-type]


def slow_loss(name: str, objective: Objective, query: Sample, number: int, timestep: int, noise: Tensor) -> Any:
    """A function of a float64 network: the region's loss of one draw, element by element."""
    latent, text = query.latent.double(), query.text[number % len(query.text)].double()

    def errors(network: nn.Module) -> tuple[Tensor, float]:
        if name == "toy":
            s = float(torch.tensor((timestep + 1) / 11, dtype=torch.float32))
            predicted = network(((1 - s) * latent + s * noise)[None], torch.tensor([timestep]), text[None])[0]
            return (predicted - noise) ** 2, 1.0
        assert isinstance(objective, DenoisingObjective)
        kept = float(objective.scheduler.alphas_cumprod[timestep])
        noisy = kept**0.5 * latent + (1 - kept) ** 0.5 * noise
        predicted = network(noisy[None], timestep, encoder_hidden_states=text[None]).sample[0]
        weight = 1.0 if objective.snr_gamma is None else min(objective.snr_gamma / (kept / (1 - kept)), 1.0)
        wanted = {"epsilon": noise, "sample": latent, "v_prediction": kept**0.5 * noise - (1 - kept) ** 0.5 * latent}
        return (predicted - wanted[name]) ** 2, weight

    def loss(network: nn.Module) -> Tensor:
        found, weight = errors(network)
        total, shares = torch.zeros((), dtype=torch.float64), 0.0
        for channel in range(LATENT[0]):
            for row in range(LATENT[1]):
                for column in range(LATENT[2]):
                    share = float(KEPT[row, column])
                    total = total + share * found[channel, row, column]
                    shares += share
        return weight * total / shares

    return loss


def write_queries(folder: Path, mask: Any) -> Path:
    fields = [told(toy_fields(number, captions=2, prefix="query"), mask) for number in range(2)]
    write_shards(fields, folder / "queries")
    toy_shards(folder / "train", 2, 2)
    return folder


def deltas(folder: Path, network: nn.Module, objective: Objective, strategy: Newton) -> UnlearningModule:
    selection = "text_kv" if isinstance(objective, DenoisingObjective) else "all"
    fisher = random_fisher(network, selection)
    module = UnlearningModule(network, objective, fisher, selection, strategy, damping=DAMPING, rise_draws=5)
    unlearn(module, toy_data(folder, draws=DRAWS, draw_batch_size=4))
    return module


@pytest.mark.parametrize("name", ["toy", "epsilon", "v_prediction", "sample"])
def test_delta_of_a_region_is_that_of_the_regions_loss(name: str, tmp_path: Path) -> None:
    network, objective = network_of(name)
    network.double()
    module = deltas(write_queries(tmp_path, HALF), network, objective, Newton(alpha=0.7, N=50))
    assert module.deltas is not None
    found = module.deltas.named()
    fisher = random_fisher(network, "text_kv" if name != "toy" else "all")
    means = {key: total / fisher.count for key, total in fisher.sums.items()}
    for target in range(2):
        query = decoded(toy_fields(target, captions=2, prefix="query"))
        timesteps, noises = draw_for_target(
            "unlearning", 0, query.key, range(DRAWS), DRAWS, objective.num_timesteps, LATENT
        )
        losses = [
            slow_loss(name, objective, query, draw, int(timesteps[draw]), noises[draw].double())
            for draw in range(DRAWS)
        ]
        naive = Naive(network, list(found))
        nothing = {key: torch.zeros_like(value) for key, value in naive.base.items()}
        expected = natural_step(mean_gradient(naive, nothing, losses), means, DAMPING, 0.7 / 50)
        for key, delta in expected.items():
            assert float(delta.norm()) > 0
            # The mask is float32, and so is its rounding.
            assert float((found[key][target] - delta).norm()) <= 1e-6 * float(delta.norm()), key


@pytest.mark.parametrize("name", ["toy", "epsilon"])
def test_the_rise_is_that_of_the_regions_loss(name: str, tmp_path: Path) -> None:
    network, objective = network_of(name)
    network.double()
    module = deltas(write_queries(tmp_path, HALF), network, objective, Newton(target_increase=1e-3))
    query = decoded(toy_fields(0, captions=2, prefix="query"))
    timesteps, noises = draw_for_target("rise", 0, query.key, range(5), 5, objective.num_timesteps, LATENT)
    assert module.deltas is not None
    naive = Naive(network, list(module.deltas.named()))
    losses = [slow_loss(name, objective, query, draw, int(timesteps[draw]), noises[draw].double()) for draw in range(5)]
    first = {key: value[0] for key, value in module.deltas.named().items()}
    before, after = (math.fsum(naive.value(delta, loss) for loss in losses) / 5 for delta in (None, first))
    assert module.results[query.key]["loss_before"] == pytest.approx(before, rel=1e-6)
    assert after / before - 1 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["toy", "epsilon"])
def test_a_mask_of_all_of_the_picture_changes_nothing(name: str, tmp_path: Path) -> None:
    found = []
    for folder, mask in (("plain", None), ("masked", np.ones((40, 24)))):
        module = deltas(write_queries(tmp_path / folder, mask), *network_of(name), Newton(alpha=0.7, N=50))
        assert module.deltas is not None
        found.append(module.deltas.named())
    for key, delta in found[0].items():
        assert float((found[1][key] - delta).norm()) <= 1e-6 * float(delta.norm())


def test_a_region_changes_the_delta_and_its_outside_does_not(tmp_path: Path) -> None:
    whole = deltas(write_queries(tmp_path / "all", None), *network_of("toy"), Newton(alpha=0.7, N=50)).deltas
    half = deltas(write_queries(tmp_path / "half", HALF), *network_of("toy"), Newton(alpha=0.7, N=50)).deltas
    assert whole is not None
    assert half is not None
    for key, delta in whole.named().items():
        assert float((half.named()[key] - delta).norm()) > 0.01 * float(delta.norm())


# ---------------------------------------------------------------------------------- who knows of masks


class Rewritten(DenoisingObjective):
    """Somebody's own loss in the place of one that takes masks."""

    def __call__(self, network: nn.Module, batch: ViewBatch, timesteps: Tensor, noise: Tensor) -> Tensor:
        return super().__call__(network, ViewBatch(batch.latents, batch.conditions), timesteps, noise)


class Named(DenoisingObjective):
    """Somebody's own name for a loss that takes masks."""


@pytest.mark.parametrize(("objective", "name"), [(ToyObjective(), "ToyObjective"), (Rewritten({}), "Rewritten")])
def test_a_loss_that_knows_nothing_of_masks_is_refused(objective: Objective, name: str, tmp_path: Path) -> None:
    network = ToyDenoiser() if name == "ToyObjective" else tiny_unet()
    says = f"The query 'query-00000' has a mask, of which {name} knows nothing; .*leave masks out"
    with pytest.raises(InputError, match=says):
        deltas(write_queries(tmp_path, HALF), network, objective, Newton(alpha=0.7, N=50))
    deltas(write_queries(tmp_path / "plain", None), network, objective, Newton(alpha=0.7, N=50))


def test_a_class_that_only_gives_the_loss_a_name_takes_masks_still(tmp_path: Path) -> None:
    found = deltas(write_queries(tmp_path, HALF), tiny_unet(), Named({}), Newton(alpha=0.7, N=50))
    assert found.targets == ["query-00000", "query-00001"]


def test_a_retrained_model_is_measured_on_the_region() -> None:
    network, objective = network_of("toy")
    network.requires_grad_(False)
    plain, masked = (decoded(told(toy_fields(0, captions=2), mask)) for mask in (None, HALF))
    loss = Measuring([masked], draws=10)(network, objective)[masked.key].loss
    timesteps, noises = draw_for_target("evaluation", 0, plain.key, range(10), 10, 10, LATENT)
    slow = [slow_loss("toy", objective, plain, draw, int(timesteps[draw]), noises[draw].double()) for draw in range(10)]
    expected = math.fsum(float(one(network.double())) for one in slow) / 10
    assert loss == pytest.approx(expected, rel=1e-5)
    assert Measuring([plain], draws=10)(network.float(), objective)[plain.key].loss != pytest.approx(loss, rel=1e-3)
    assert Measuring([plain], draws=10).settings() != Measuring([masked], draws=10).settings()
