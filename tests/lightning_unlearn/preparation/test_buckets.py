"""Buckets by each trainer's rule, on numbers and on pixels; dropped captions; masks of the loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prepare_toys import manifest, read

from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.datamodules.training import TrainingDataModule
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.buckets import BucketRule, Buckets
from lightning_unlearn.preparation.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def made(tmp_path: Path, text_encoder: Path) -> Any:
    """Runs `prepare` on the folder `set`, and gives the folder of its shards."""

    def run(**chosen: Any) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        given = {"size": 8, "text_encoder": str(text_encoder), "dtype": "float32", "picture_size": 0}
        prepare(str(out), str(tmp_path / "set"), **given | chosen)
        return out

    (tmp_path / "set").mkdir()
    return run


def put(folder: Path, name: str, pixels: Any, caption: str | None = "words") -> None:
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)


@pytest.mark.parametrize(
    ("rule", "side", "picture", "shape"),
    [
        # (height, width); by hand from each rule.
        ("kohya", 512, (768, 1024), (448, 576)),  # 4:3 is nearer to 9:7 than to 5:3
        ("kohya", 512, (1024, 768), (576, 448)),
        ("kohya", 512, (512, 512), (512, 512)),
        ("kohya", 512, (640, 384), (640, 384)),  # there is just this one
        ("kohya", 512, (100, 1000), (256, 1024)),  # no longer than the longest
        ("kohya", 1024, (1024, 1024), (1024, 1024)),
        ("nearest", 1024, (1000, 1500), (832, 1280)),  # 836.1 and 1254.1
        ("nearest", 512, (512, 512), (512, 512)),
        ("nearest", 512, (768, 1024), (448, 576)),  # 443.4 and 591.2
        ("nearest", 512, (2000, 500), (1024, 256)),
        ("ai-toolkit", 1024, (1664, 2432), (832, 1216)),
        ("ai-toolkit", 1024, (832, 1216), (768, 1152)),  # its own area is that of 1005 squared, and steps are cut off
        ("ai-toolkit", 1024, (512, 512), (512, 512)),  # nothing is enlarged
        ("ai-toolkit", 512, (1664, 2432), (384, 576)),  # 416 and 608, down to the step
    ],
)
def test_a_pictures_bucket_is_that_of_the_trainer(
    rule: BucketRule, side: int, picture: tuple[int, int], shape: tuple[int, int]
) -> None:
    assert Buckets(rule, side).shape_of(*picture) == shape


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(get_args(BucketRule)), st.integers(8, 4000), st.integers(8, 4000), st.sampled_from([512, 1024]))
def test_every_picture_has_a_bucket_of_whole_steps(rule: BucketRule, height: int, width: int, side: int) -> None:
    of = Buckets(rule, side, longest=2 * side)
    shape = of.shape_of(height, width)
    assert all(length > 0 and length % 64 == 0 for length in shape)
    turned = of.shape_of(width, height)[::-1]
    if rule == "kohya":
        # Nearest in one of the two ratios, which is not always nearest in the other.
        assert shape[0] * shape[1] <= 1.2 * side**2
    if rule == "nearest":
        assert turned == shape


@settings(max_examples=100, deadline=None)
@given(st.integers(8, 3000), st.integers(8, 3000))
def test_ai_toolkit_cuts_off_as_little_as_can_be(height: int, width: int) -> None:
    of = Buckets("ai-toolkit", 512)

    def lost(shape: tuple[int, int]) -> int:
        scale = max(shape[0] / height, shape[1] / width)
        tall, long = int(height * scale), int(width * scale)
        return (long - shape[1]) * tall + (tall - shape[0]) * long

    shape = of.shape_of(height, width)
    others = {of.shape_of(*other) for other in ((512, 512), (1000, 600), (600, 1000), (1000, 300))}
    if height * width >= 512**2 and (height, width) != shape:
        assert all(lost(shape) <= lost(other) for other in others)


def test_pixels_of_a_bucket_are_the_middle_of_the_picture_resized(made: Any, tmp_path: Path) -> None:
    """A wide picture that our own rule brings to three to one: it is cut, and nothing is distorted."""
    stripes = np.zeros((8, 20, 3))
    stripes[:, 2:18] = 255  # what is left of it
    put(tmp_path / "set", "wide", stripes)
    put(tmp_path / "set", "square", np.zeros((8, 8, 3)))
    out = made(like="simpletuner", bucket_step=4)
    samples = read(out)
    assert samples["wide"].latent.shape == (3, 4, 12)  # 8 / √2.5 = 5.1 and 12.6, each to the nearest multiple
    assert samples["square"].latent.shape == (3, 8, 8)
    # 20 columns become 12, and of 8 rows the middle 20 / 3 become 4: the white begins after 1.2 of 12 pixels.
    row = samples["wide"].latent[0, 2]
    assert row[0] < 0 < row[2]
    forms = {group.form for shard in list_shards(str(out)) for group in shard.groups}
    assert {form.split(",")[0] for form in forms} == {"latent 3x4x12", "latent 3x8x8"}
    assert manifest(out)["reading"]["choices"]["buckets"] == "nearest"


def test_kohyas_buckets_go_through_its_resizing(made: Any, tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(32)[None, :, None] * 8, (8, 32, 3))
    put(tmp_path / "set", "wide", ramp)
    out = made(like="kohya", bucket_step=4, bucket_shortest=4, bucket_longest=16)
    latent = read(out)["wide"].latent
    assert latent.shape == (3, 4, 16)
    # Half the size by the mean over areas: each pixel the mean of two columns.
    expected = torch.from_numpy(ramp[0, :, 0].astype(np.float32)).view(16, 2).mean(1)
    torch.testing.assert_close(latent[0, 0], (expected.round() / 127.5 - 1), atol=1.01 / 127.5, rtol=0)


def test_latents_of_a_batch_do_not_depend_on_its_shapes(made: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, shape in (("a", (8, 8, 3)), ("b", (8, 16, 3)), ("c", (8, 8, 3)), ("d", (16, 8, 3))):
        put(tmp_path / "set", name, rng.integers(0, 256, shape))
    chosen = {"like": "simpletuner", "bucket_step": 4, "flips": True}
    together, alone = read(made(**chosen, batch_size=16)), read(made(**chosen, batch_size=1))
    for name, sample in alone.items():
        assert torch.equal(together[name].latent, sample.latent)
        assert torch.equal(together[name].latent_flip, sample.latent.flip(-1))


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"bucket_step": 0}, "bucket_step from 1 on"),
        ({"bucket_shortest": 2000}, r"bucket_shortest \(2000\) not above bucket_longest \(1024\)"),
        ({"caption_dropout": 1.0}, "caption_dropout must be from 0 on and below 1"),
        ({"mask_folder": "masks"}, "set masks=loss"),
        ({"mask_folder": "nowhere", "masks": "loss"}, "no folder of masks at nowhere"),
    ],
)
def test_settings_out_of_range_get_one_sentence(
    chosen: dict[str, Any], sentence: str, made: Any, tmp_path: Path
) -> None:
    put(tmp_path / "set", "a", np.zeros((8, 8, 3)))
    with pytest.raises(InputError, match=sentence):
        made(**chosen)


def test_a_dropped_caption_is_stored_with_its_share(made: Any, tmp_path: Path) -> None:
    put(tmp_path / "set", "a", np.zeros((8, 8, 3)), "one\ntwo")
    put(tmp_path / "set", "b", np.zeros((8, 8, 3)), "")
    samples = read(made(caption_dropout=0.1, missing_caption="empty"))
    assert samples["a"].captions == ["one", "two", ""]
    assert samples["a"].caption_weights == pytest.approx([0.45, 0.45, 0.1])
    assert samples["b"].captions == [""]
    assert samples["b"].caption_weights is None
    assert torch.equal(samples["a"].text[2], samples["b"].text[0])


def test_a_column_that_is_no_weight_is_told_of_before_anything_is_encoded(made: Any, tmp_path: Path) -> None:
    put(tmp_path / "set", "a", np.zeros((8, 8, 3)), None)
    rows = [{"file_name": "a.png", "text": "a", "weight": "12 kg"}]
    (tmp_path / "set" / "metadata.jsonl").write_text("".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"a\.png.* has '12 kg' as 'weight'"):
        made()


def test_what_a_set_will_take_knows_that_one_prompt_is_stored_once_a_shard(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twenty pictures with one prompt, 77 tokens of 12 numbers in float32: 3.7 KB, else of each."""
    for number in range(20):
        put(tmp_path / "set", f"p{number}", np.full((8, 8, 3), number), None)
    out = made(caption="a photo of sks dog", tokens=77, samples_per_shard=10)
    said = next(line for line in capsys.readouterr().err.splitlines() if "will take about" in line)
    promised = float(said.split("about ")[1].split(" KB")[0]) * 1000
    held = sum(path.stat().st_size for path in out.glob("*.tar"))
    # Tars end with padding to a record of twenty blocks, and the samples' json is not known before.
    assert abs(promised - held) < 2 * 10240 + 20 * 1024


# ---------------------------------------------------------------------------------- where the loss was


def masks_of(out: Path) -> dict[str, Any]:
    (batch,) = TrainingDataModule(str(out), 8, every_sample=True).train_dataloader()
    if batch.masks is None:
        return {}
    return dict(zip(batch.keys, batch.masks, strict=True))


HALF = np.repeat([255, 0], 8)[None].repeat(16, 0)  # the left half is white


def test_onetrainers_masks_are_where_the_loss_was(made: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "set", name, np.zeros((16, 16, 3)))
    put(tmp_path / "set", "a-masklabel", HALF, None)
    out = made(like="onetrainer", masks="loss", bucket_step=8)
    assert sorted(read(out)) == ["a", "b"]
    masks = masks_of(out)
    # Resized bicubic, which rounds the edge off; away from it the mask is as it was.
    assert masks["a"][:, :3].min() == 1
    assert masks["a"][:, 5:].max() < 0.1
    assert (masks["b"] == 1).all()
    assert not manifest(out)["left_out"]["counts"]


def test_masks_of_a_folder_of_their_own_are_called_as_their_pictures(made: Any, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    put(tmp_path / "set", "a", np.zeros((8, 8, 3)))
    Image.fromarray(np.repeat([255, 0], 4)[None].repeat(8, 0).astype(np.uint8)).save(
        tmp_path / "masks" / "a.webp", lossless=True
    )
    masks = masks_of(made(like="ai-toolkit", masks="loss", mask_folder=str(tmp_path / "masks")))
    assert masks["a"].tolist() == [[1.0] * 4 + [0.0] * 4] * 8


def test_kohyas_alpha_mask_is_the_transparency_and_its_colours_show(made: Any, tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), 255)
    pixels[:, 4:, 3] = 0
    put(tmp_path / "set", "a", pixels)
    put(tmp_path / "set", "b", np.zeros((8, 8, 3)))
    out = made(like="kohya", masks="alpha")
    assert masks_of(out)["a"].tolist() == [[1.0] * 4 + [0.0] * 4] * 8
    assert (read(out)["a"].latent == 1).all()


def test_a_black_mask_is_told_of_and_a_query_is_not_masked_by_it(made: Any, tmp_path: Path) -> None:
    put(tmp_path / "set", "a", np.zeros((8, 8, 3)))
    put(tmp_path / "set", "a-masklabel", np.zeros((8, 8)), None)
    with pytest.raises(InputError, match=r"mask of .*is all black"):
        made(masks="loss")
    put(tmp_path / "set", "a-masklabel", np.full((8, 8), 255), None)
    assert read(made(masks="loss"))["a"].mask is None
