"""Pictures and captions to shards, on a tiny Stable Diffusion pipeline that lies in a temporary folder."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from prepare_toys import TEXT_DIM, manifest, read, tiny_text_encoder, tiny_tokenizer
from torch import Tensor
from toys import tiny_unet

from lightning_unlearn.data import shards
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import generator_for, tensors_digest
from lightning_unlearn.preparation.prepare import prepare

VAE_SCALE = 2
SIDE = 16  # pixels: the network's sample_size 8 times the VAE's scale
CAPTIONS = {"ball": ["a red ball", "round thing"], "cat": ["a cat"], "house": ["a house by the sea"]}


def tiny_vae(**overrides: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": SIDE,
            "scaling_factor": 0.3,
            "shift_factor": 0.1,
            **overrides,
        }
    ).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny-diffusion"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(TEXT_DIM, sample_size=SIDE // VAE_SCALE, in_channels=4, out_channels=4),
            scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def noise_picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (name, captions) in enumerate(CAPTIONS.items()):
        noise_picture(number).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("\n".join(captions) + "\n")
    return folder


def seen_by_network(picture: Image.Image, side: int = SIDE, mirrored: bool = False) -> Tensor:
    """(1, C, side, side) in [-1, 1]: middle square, bicubic."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    picture = picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BICUBIC)
    if mirrored:
        picture = ImageOps.mirror(picture)
    array = np.asarray(picture, dtype=np.float32).reshape(side, side, -1)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None]


def assert_nothing_written(folder: Path) -> None:
    assert not folder.exists() or list(folder.iterdir()) == []


# --- a pipeline


@torch.no_grad()
def test_pipeline_gives_scaled_latents_true_flips_and_text_states(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    shards = prepare(
        str(tmp_path / "out"), str(photos), str(pipeline), flips=True, dtype="float32", samples_per_shard=2
    )
    assert [(Path(shard.url).name, shard.samples) for shard in shards] == [
        ("shard-000000.tar", 2),
        ("shard-000001.tar", 1),
    ]
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    samples = read(tmp_path / "out")
    assert list(CAPTIONS) == sorted(samples)
    for key, captions in CAPTIONS.items():
        sample = samples[key]
        picture = Image.open(photos / f"{key}.png").convert("RGB")
        for latent, mirrored in ((sample.latent, False), (sample.latent_flip, True)):
            expected = (pipe.vae.encode(seen_by_network(picture, mirrored=mirrored)).latent_dist.mean[0] - 0.1) * 0.3
            assert latent is not None
            torch.testing.assert_close(latent, expected, atol=1e-6, rtol=1e-5)
        assert sample.latent.shape == (4, 8, 8)
        # The mirrored latent is another thing than the latent of the mirrored picture.
        assert sample.latent_flip is not None
        assert (sample.latent_flip - sample.latent.flip(-1)).abs().max() > 1e-3
        ids = pipe.tokenizer(
            captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        torch.testing.assert_close(sample.text, pipe.text_encoder(ids)[0], atol=1e-6, rtol=1e-5)
        assert sample.captions == captions
        assert sample.text.shape == (len(captions), 77, TEXT_DIM)
        assert sample.metadata["file_name"] == f"{key}.png"


@torch.no_grad()
def test_shards_of_stable_diffusion_are_the_same_to_the_bit_as_ever(
    photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    """Written out as they were computed before families did it: one batch, shift and factor in float32."""
    from diffusers import StableDiffusionPipeline

    prepare(str(tmp_path / "out"), str(photos), str(pipeline), dtype="float32")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    pixels = torch.cat([seen_by_network(Image.open(photos / f"{key}.png").convert("RGB")) for key in CAPTIONS])
    shift, factor = torch.tensor([0.1])[:, None, None], 0.3 / torch.tensor([1.0])[:, None, None]
    latents = (pipe.vae.encode(pixels).latent_dist.mean - shift) * factor
    captions = [caption for several in CAPTIONS.values() for caption in several]
    ids = pipe.tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    states = pipe.text_encoder(ids)[0].split([len(several) for several in CAPTIONS.values()])
    samples = read(tmp_path / "out")
    for row, key in enumerate(CAPTIONS):
        assert torch.equal(samples[key].latent, latents[row])
        assert torch.equal(samples[key].text, states[row])


@torch.no_grad()
def test_text_states_are_what_the_pipeline_itself_conditions_on(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    prepare(str(tmp_path / "out"), str(photos), str(pipeline), dtype="float32")
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    expected, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    torch.testing.assert_close(read(tmp_path / "out")["cat"].text, expected, atol=1e-6, rtol=1e-5)


def test_latents_and_text_do_not_depend_on_the_batch_size(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    for batch_size in (1, 2, 16):
        prepare(
            str(tmp_path / f"{batch_size}"),
            str(photos),
            str(pipeline),
            vae_sample="sample",
            flips=True,
            dtype="float32",
            batch_size=batch_size,
        )
    alone, *others = (read(tmp_path / f"{batch_size}") for batch_size in (1, 2, 16))
    for other in others:
        for key, sample in alone.items():
            torch.testing.assert_close(other[key].latent, sample.latent, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(other[key].latent_flip, sample.latent_flip, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(other[key].text, sample.text, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_draw_of_the_vae_depends_on_seed_and_key_alone(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    def run(name: str, seed: int) -> dict[str, Sample]:
        settings: dict[str, Any] = {"vae_sample": "sample", "seed": seed, "flips": True, "dtype": "float32"}
        prepare(str(tmp_path / name), str(photos), str(pipeline), **settings)
        return read(tmp_path / name)

    every = run("every", 5)
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", local_files_only=True)
    picture = Image.open(photos / "cat.png").convert("RGB")
    for latent, mirrored in ((every["cat"].latent, False), (every["cat"].latent_flip, True)):
        distribution = vae.encode(seen_by_network(picture, mirrored=mirrored)).latent_dist
        generator = generator_for("prepare", 5, "cat", "mirrored" if mirrored else "picture")
        drawn = distribution.mean + distribution.std * torch.randn((1, 4, 8, 8), generator=generator)
        assert latent is not None
        torch.testing.assert_close(latent, (drawn[0] - 0.1) * 0.3, atol=1e-6, rtol=1e-5)
    assert (run("seed", 6)["cat"].latent - every["cat"].latent).abs().max() > 0.01
    # Alone, and so in another place of the batch, it gets the same draw.
    for name in ("ball", "house"):
        (photos / f"{name}.png").unlink()
    torch.testing.assert_close(run("alone", 5)["cat"].latent, every["cat"].latent, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_vae_that_normalises_channels_or_has_no_shift_is_honoured(
    photos: Path, pipeline: Path, tmp_path: Path
) -> None:
    means, spreads = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    for name, config, shift, factor in (
        ("plain", {"shift_factor": None}, torch.zeros(4), torch.full((4,), 0.3)),
        (
            "channels",
            {"latents_mean": means, "latents_std": spreads},
            torch.tensor(means),
            0.3 / torch.tensor(spreads),
        ),
    ):
        changed = tmp_path / name
        shutil.copytree(pipeline, changed)
        vae = tiny_vae(**config)
        vae.save_pretrained(changed / "vae")
        prepare(str(tmp_path / f"{name}-shards"), str(photos), str(changed), dtype="float32")
        mean = vae.encode(seen_by_network(Image.open(photos / "cat.png").convert("RGB"))).latent_dist.mean[0]
        expected = (mean - shift[:, None, None]) * factor[:, None, None]
        torch.testing.assert_close(read(tmp_path / f"{name}-shards")["cat"].latent, expected, atol=1e-6, rtol=1e-5)


def test_size_overrides_what_the_network_says(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    prepare(str(tmp_path / "out"), str(photos), str(pipeline), size=8)
    assert read(tmp_path / "out")["cat"].latent.shape == (4, 4, 4)
    with pytest.raises(InputError, match="multiple of 2"):
        prepare(str(tmp_path / "odd"), str(photos), str(pipeline), size=9)


def test_manifest_says_how_the_shards_were_made(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    prepare(str(tmp_path / "out"), str(photos), str(pipeline), flips=True, vae_sample="sample", seed=3)
    about = manifest(tmp_path / "out")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", local_files_only=True)
    assert about["space"] == "latent"
    assert about["flips"] is True
    assert about["skipped"] == 0
    assert about["latent"]["shape"] == [4, 8, 8]
    assert about["latent"]["dtype"] == "float16"
    assert about["latent"]["vae"] == "tiny-diffusion/vae"
    assert about["latent"]["vae_sample"] == "sample"
    assert about["latent"]["seed"] == 3
    assert about["latent"]["vae_fingerprint"] == tensors_digest(vae.state_dict())
    assert about["latent"]["factor"] == pytest.approx([0.3])
    assert about["latent"]["shift"] == pytest.approx([0.1])
    assert about["text"]["shape"] == [77, TEXT_DIM]
    assert about["text"]["encoder"] == "tiny-diffusion/text_encoder"
    assert about["pictures"] == {"height": SIDE, "width": SIDE, "mode": "RGB", "resize": "bicubic"}
    assert [shard["samples"] for shard in about["shards"]] == [3]
    assert str(tmp_path) not in json.dumps(about)


def test_the_same_input_gives_the_same_bytes(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare(str(tmp_path / name), str(photos), str(pipeline), flips=True)
    for file in ("shard-000000.tar", "manifest.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


# --- pixels


@torch.no_grad()
def test_pixel_space_keeps_the_picture_and_zeroes_padding(photos: Path, text_encoder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    prepare(
        str(tmp_path / "out"),
        str(photos),
        size=8,
        text_encoder=str(text_encoder),
        tokens=10,
        flips=True,
        dtype="float32",
    )
    sample = read(tmp_path / "out")["cat"]
    expected = seen_by_network(Image.open(photos / "cat.png").convert("RGB"), 8)[0]
    torch.testing.assert_close(sample.latent, expected, atol=1e-6, rtol=0)
    assert sample.latent_flip is not None
    torch.testing.assert_close(sample.latent_flip, sample.latent.flip(-1), atol=0, rtol=0)
    tokens = tiny_tokenizer()(["a cat"], padding="max_length", max_length=10, return_tensors="pt")
    states = CLIPTextModel.from_pretrained(text_encoder, local_files_only=True)(**tokens).last_hidden_state
    padding = ~tokens["attention_mask"].bool()
    assert padding.any()
    torch.testing.assert_close(sample.text, states.masked_fill(padding[..., None], 0), atol=1e-6, rtol=1e-5)
    about = manifest(tmp_path / "out")
    assert about["space"] == "pixel"
    assert about["text"]["padding"] == "zero"
    assert about["text"]["shape"] == [10, TEXT_DIM]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["T5Model", "T5EncoderModel"])
def test_of_an_encoder_and_decoder_the_encoder_is_taken(kind: str, photos: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=54, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    prepare(str(tmp_path / "out"), str(photos), size=8, text_encoder=str(tmp_path / "t5"), tokens=10, dtype="float32")
    tokens = tiny_tokenizer()(["a cat"], padding="max_length", max_length=10, return_tensors="pt")
    states = model.get_encoder()(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
    torch.testing.assert_close(read(tmp_path / "out")["cat"].text, states, atol=1e-6, rtol=1e-5)


def test_grey_pictures_have_one_channel(photos: Path, text_encoder: Path, tmp_path: Path) -> None:
    prepare(str(tmp_path / "out"), str(photos), size=8, grey=True, text_encoder=str(text_encoder), dtype="float32")
    sample = read(tmp_path / "out")["cat"]
    expected = seen_by_network(Image.open(photos / "cat.png").convert("L"), 8)[0]
    torch.testing.assert_close(sample.latent, expected, atol=1e-6, rtol=0)
    assert sample.text.shape == (1, 77, TEXT_DIM)


def pixels_of(picture: Path, text_encoder: Path, tmp_path: Path, side: int = 8) -> Tensor:
    picture.with_suffix(".txt").write_text("a thing")
    prepare(str(tmp_path / "out"), str(picture.parent), size=side, text_encoder=str(text_encoder), dtype="float32")
    return read(tmp_path / "out")[picture.stem].latent


def test_exif_orientation_is_honoured(text_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    upright = noise_picture(0, 16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise to be seen upright
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "turned.png", exif=exif)
    pixels = pixels_of(tmp_path / "in" / "turned.png", text_encoder, tmp_path)
    torch.testing.assert_close(pixels, seen_by_network(upright, 8)[0], atol=1e-6, rtol=0)


def test_transparency_is_laid_over_white(text_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((255, 0, 0, 255), (0, 0, 4, 8))
    picture.save(tmp_path / "in" / "half.png")
    pixels = pixels_of(tmp_path / "in" / "half.png", text_encoder, tmp_path)
    assert torch.equal(pixels[:, :, 4:], torch.ones(3, 8, 4))
    assert torch.equal(pixels[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_a_palette_with_a_transparent_colour_is_laid_over_white(text_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([0, 0, 0, 0, 0, 255])
    picture.paste(1, (0, 0, 4, 8))
    picture.save(tmp_path / "in" / "half.gif", transparency=0)
    pixels = pixels_of(tmp_path / "in" / "half.gif", text_encoder, tmp_path)
    assert torch.equal(pixels[:, :, 4:], torch.ones(3, 8, 4))
    assert torch.equal(pixels[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_shrinking_is_antialiased(text_encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "in" / "stripes.png")
    assert pixels_of(tmp_path / "in" / "stripes.png", text_encoder, tmp_path).abs().max() < 0.15  # grey, not stripes


def test_preview_is_the_middle_of_the_picture_and_never_enlarged(
    photos: Path, text_encoder: Path, tmp_path: Path
) -> None:
    import io

    noise_picture(9, 100, 80).save(photos / "large.png")
    (photos / "large.txt").write_text("large")
    sides = {}
    for size in (0, 32):
        out = tmp_path / f"{size}"
        prepare(str(out), str(photos), size=8, text_encoder=str(text_encoder), picture_size=size)
        sides[size] = {key: sample.picture for key, sample in read(out).items()}
    assert set(sides[0].values()) == {None}
    for key, side in (("large", 32), ("cat", 20)):
        picture = sides[32][key]
        assert picture is not None
        image = Image.open(io.BytesIO(picture))
        assert image.size == (side, side)
        assert image.format == "WEBP"


# --- ready arrays


def ready_arrays(folder: Path, samples: int = 5, captions: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {
        "latents": rng.standard_normal((samples, 4, 8, 8)).astype(np.float32),
        "latents_flip": rng.standard_normal((samples, 4, 8, 8)).astype(np.float32),
        "text": rng.standard_normal((samples, captions, 7, 6)).astype(np.float32),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    rows = [[f"caption {c} of {n}" for c in range(captions)] for n in range(samples)]
    (folder / "captions.json").write_text(json.dumps(rows))
    return {**arrays, "rows": rows}


def array_settings(folder: Path, *names: str) -> dict[str, Any]:
    return {name: str(folder / f"{name}.npy") for name in names} | {"captions": str(folder / "captions.json")}


def test_ready_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    ready = ready_arrays(tmp_path)
    settings = array_settings(tmp_path, "latents", "latents_flip", "text")
    shards = prepare(str(tmp_path / "out"), **settings, dtype="float32", batch_size=2, samples_per_shard=3)
    assert [shard.samples for shard in shards] == [3, 2]
    samples = read(tmp_path / "out")
    for number in range(5):
        sample = samples[f"{number:08d}"]
        assert sample.captions == ready["rows"][number]
        assert np.array_equal(sample.latent, ready["latents"][number])
        assert sample.latent_flip is not None
        assert np.array_equal(sample.latent_flip, ready["latents_flip"][number])
        assert np.array_equal(sample.text, ready["text"][number])
        assert sample.picture is None
    about = manifest(tmp_path / "out")
    assert about["latent"]["vae"] == "ready array"
    assert about["flips"] is True


def test_ready_text_of_one_caption_needs_no_axis_for_it(tmp_path: Path) -> None:
    ready = ready_arrays(tmp_path, captions=1)
    np.save(tmp_path / "text.npy", ready["text"][:, 0])
    (tmp_path / "captions.txt").write_text("".join(f"caption {n}\n" for n in range(5)))
    settings = array_settings(tmp_path, "latents", "text") | {"captions": str(tmp_path / "captions.txt")}
    prepare(str(tmp_path / "out"), **settings, dtype="float32")
    sample = read(tmp_path / "out")["00000003"]
    assert np.array_equal(sample.text, ready["text"][3])
    assert sample.captions == ["caption 3"]
    assert sample.latent_flip is None


def test_ready_arrays_follow_a_table_that_names_their_pictures(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ready = ready_arrays(tmp_path, samples=3, captions=1)
    table = "file_name,text,photographer\nhouse.png,a house,Ann\nball.png,a ball,Bo\ncat.png,a cat,Cy\n"
    (photos / "metadata.csv").write_text(table)
    settings = array_settings(tmp_path, "latents", "text")
    del settings["captions"]
    prepare(str(tmp_path / "out"), str(photos), **settings, dtype="float32")
    samples = read(tmp_path / "out")
    for number, key in enumerate(["house", "ball", "cat"]):
        assert np.array_equal(samples[key].latent, ready["latents"][number])
        assert samples[key].picture is not None
    assert samples["ball"].metadata["photographer"] == "Bo"
    # Another order would have as many rows.
    assert "Row 0 of the ready text states is taken for the sample 'house', row 2 for 'cat'." in capsys.readouterr().err


def test_ready_latents_go_with_a_text_encoder(text_encoder: Path, tmp_path: Path) -> None:
    ready_arrays(tmp_path)
    prepare(str(tmp_path / "out"), **array_settings(tmp_path, "latents"), text_encoder=str(text_encoder))
    assert read(tmp_path / "out")["00000000"].text.shape == (2, 77, TEXT_DIM)


def test_ready_arrays_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    ready = ready_arrays(tmp_path)

    def refuse(match: str, **changes: Any) -> None:
        settings = array_settings(tmp_path, "latents", "latents_flip", "text") | changes
        with pytest.raises(InputError, match=match):
            prepare(str(tmp_path / "out"), **settings)
        assert_nothing_written(tmp_path / "out")

    np.save(tmp_path / "short.npy", ready["latents"][:4])
    refuse("4 ready latents but 5 samples", latents=str(tmp_path / "short.npy"), latents_flip=None)
    refuse("differ in shape", latents_flip=str(tmp_path / "short.npy"))
    refuse("4 ready text states but 5", text=_saved(tmp_path / "t.npy", ready["text"][:4]))
    refuse("has 2 captions, but the ready text has 1", text=_saved(tmp_path / "t.npy", ready["text"][:, :1]))
    refuse("must be .N, C, H, W.", latents=_saved(tmp_path / "l.npy", ready["latents"][0]), latents_flip=None)
    refuse("must be .N, C, H, W.", latents=_saved(tmp_path / "l.npy", ready["latents"].astype(int)), latents_flip=None)
    refuse("can't be read as a plain NumPy array", latents=str(tmp_path / "missing.npy"))
    refuse("flips", flips=True)
    refuse("size", size=8)


def _saved(path: Path, array: Any) -> str:
    np.save(path, array, allow_pickle=True)
    return str(path)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    ready_arrays(tmp_path)
    evil = tmp_path / "evil.npy"
    np.save(evil, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    settings = array_settings(tmp_path, "latents", "text") | {"latents": str(evil)}
    with pytest.raises(InputError, match="plain NumPy array"):
        prepare(str(tmp_path / "out"), **settings)


def test_numbers_that_a_shard_can_not_hold_are_refused_or_left_out(tmp_path: Path) -> None:
    ready = ready_arrays(tmp_path)
    ready["latents"][3, 0, 0, 0] = 1e6
    np.save(tmp_path / "latents.npy", ready["latents"])
    settings: dict[str, Any] = array_settings(tmp_path, "latents", "text")
    for dtype in ("float16", "float32"):  # what is read back is bounded, whatever the type could hold
        with pytest.raises(InputError, match=r"row 4.*larger than 1e\+04"):
            prepare(str(tmp_path / "out"), **settings, dtype=dtype)
        assert_nothing_written(tmp_path / "out")
    wide = {**settings, "dtype": "float32"}
    ready["text"][3, 0, 0, 0] = 1e6
    ready["latents"][3, 0, 0, 0] = 1e3
    np.save(tmp_path / "latents.npy", ready["latents"])
    np.save(tmp_path / "text.npy", ready["text"])
    with pytest.raises(InputError, match=r"row 4.*too large for float16"):
        prepare(str(tmp_path / "out"), **settings)
    prepare(str(tmp_path / "wide"), **wide)
    assert read(tmp_path / "wide")["00000003"].text.max() == 1e6
    with pytest.warns(UserWarning, match="1 of 5 samples were left out"):
        prepare(str(tmp_path / "skipped"), **settings, on_bad_sample="skip")
    samples = read(tmp_path / "skipped")
    assert sorted(samples) == ["00000000", "00000001", "00000002", "00000004"]
    assert np.array_equal(samples["00000004"].latent, ready["latents"][4].astype(np.float16).astype(np.float32))


# --- what bad input gets


@pytest.fixture
def pixels(photos: Path, text_encoder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"output": str(tmp_path / "out"), "images": str(photos), "size": 8, "text_encoder": str(text_encoder)}


def test_a_picture_that_can_not_be_read_is_an_error_or_left_out(
    pixels: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    whole = (photos / "cat.png").read_bytes()
    for damage in (whole[: len(whole) // 2], b"no picture", b""):
        (photos / "cat.png").write_bytes(damage)
        with pytest.raises(InputError, match=r"cat\.png can't be read as a picture"):
            prepare(**pixels)
        assert_nothing_written(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"1 of 3 samples were left out.*cat\.png"):
        prepare(**pixels, on_bad_sample="skip", batch_size=1)
    assert sorted(read(tmp_path / "out")) == ["ball", "house"]
    assert manifest(tmp_path / "out")["skipped"] == 1


def test_sixteen_bit_pictures_are_refused_rather_than_turned_white(
    pixels: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((16, 16), 40000, dtype=np.uint16)).save(photos / "cat.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        prepare(**pixels)


def test_a_sample_without_captions_is_an_error_or_left_out(
    pixels: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    (photos / "cat.txt").write_text("  \n\n")
    with pytest.raises(InputError, match=r"cat\.png has no caption"):
        prepare(**pixels)
    assert_nothing_written(tmp_path / "out")
    (photos / "cat.txt").unlink()
    with pytest.raises(InputError, match=r"cat\.png has no caption"):
        prepare(**pixels)
    with pytest.warns(UserWarning, match="1 of 3"):
        prepare(**pixels, on_bad_sample="skip")
    assert sorted(read(tmp_path / "out")) == ["ball", "house"]


def test_nothing_left_is_an_error(pixels: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    for text in photos.glob("*.txt"):
        text.unlink()
    with pytest.raises(InputError, match="None of the 3 samples"):
        prepare(**pixels, on_bad_sample="skip")
    assert_nothing_written(tmp_path / "out")


def test_of_two_samples_of_one_key_the_second_is_an_error_or_left_out(
    pixels: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    noise_picture(7).save(photos / "cat.jpg")
    with pytest.raises(InputError, match=r"Two samples have the key 'cat'.*cat\.png"):
        prepare(**pixels)
    assert_nothing_written(tmp_path / "out")
    with pytest.warns(UserWarning, match=r"1 of 4 samples were left out.*cat\.png"):
        prepare(**pixels, on_bad_sample="skip")
    assert read(tmp_path / "out")["cat"].metadata["file_name"] == "cat.jpg"
    assert "the key 'cat'" in manifest(tmp_path / "out")["left_out"]["faults"][0]


def test_keys_that_only_differ_in_what_a_tar_file_can_not_keep_are_one(pixels: dict[str, Any], photos: Path) -> None:
    for name in ("a.b", "a_b"):
        noise_picture(7).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("text")
    with pytest.raises(InputError, match="Two samples have the key 'a_b'"):
        prepare(**pixels)


def test_a_finished_folder_is_refused_unless_it_is_to_be_overwritten(
    pixels: dict[str, Any], photos: Path, tmp_path: Path
) -> None:
    prepare(**pixels, samples_per_shard=1)
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    with pytest.raises(InputError, match="done already: it holds 3 samples in 3 shards"):
        prepare(**pixels)
    (photos / "cat.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="can't be read"):
        prepare(**pixels, overwrite=True)
    # What failed has not touched what was there.
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before
    assert len(read(tmp_path / "out")) == 3
    noise_picture(1).save(photos / "cat.png")
    shards = prepare(**pixels, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "shard-000000.tar"]
    assert [shard.url for shard in shards] == [str(tmp_path / "out" / "shard-000000.tar")]
    assert len(read(tmp_path / "out")) == 3


def test_settings_that_do_not_fit_together_are_refused(pixels: dict[str, Any], pipeline: Path, tmp_path: Path) -> None:
    for match, changes in (
        ("Nothing to prepare", {"images": None}),
        ("Captions come with", {"captions": "captions.json"}),
        ("where latents come from", {"size": None}),
        ("where text comes from", {"text_encoder": None}),
        ("leave one of them out", {"text": "text.npy"}),
        ("goes with `latents`", {"latents_flip": "l.npy"}),
        ("need `captions`", {"images": None, "latents": "l.npy", "size": None}),
        ("leave `pipeline` out", {"pipeline": str(pipeline), "latents": "l.npy", "size": None}),
        ("a pipeline's VAE", {"vae_sample": "sample"}),
        ("channels of its own", {"pipeline": str(pipeline), "grey": True}),
        ("`tokens` is for", {"pipeline": str(pipeline), "text_encoder": None, "tokens": 5}),
        ("`batch_size` must be at least 1", {"batch_size": 0}),
        ("`size` must be at least 1", {"size": 0}),
        ("no device 'abacus'", {"device": "abacus"}),
        ("There is nothing at", {"images": str(tmp_path / "nowhere")}),
        ("fewer `tokens`", {"tokens": 78}),
    ):
        with pytest.raises(InputError, match=match):
            prepare(**pixels | changes)
        assert_nothing_written(tmp_path / "out")


def test_folders_that_are_no_models_are_refused(pixels: dict[str, Any], pipeline: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=match):
            prepare(**pixels | {"size": None, "text_encoder": None} | changes)
        assert_nothing_written(tmp_path / "out")

    def broken() -> Iterator[Path]:
        for number in range(7):
            yield Path(shutil.copytree(pipeline, tmp_path / f"broken-{number}"))

    copies = broken()
    refuse("There is no .*vae", pipeline=str(tmp_path / "nowhere"))
    refuse("There is no .*config.json", size=8, text_encoder=str(tmp_path / "nowhere"))
    two = next(copies)
    (two / "text_encoder_2").mkdir()
    refuse("just one CLIP text encoder", pipeline=str(two))
    pickled = next(copies)
    file = pickled / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    refuse("safetensors", pipeline=str(pickled))
    damaged = next(copies)
    (damaged / "text_encoder" / "model.safetensors").write_bytes(b"nothing")
    refuse("text_encoder can't be loaded", pipeline=str(damaged))
    for part, name in (("text_encoder", "model.safetensors"), ("vae", "diffusion_pytorch_model.safetensors")):
        incomplete = next(copies)
        weights = load_file(incomplete / part / name)
        dropped = next(key for key in sorted(weights) if key.endswith("norm1.weight") and "decoder" not in key)
        del weights[dropped]
        save_file(weights, incomplete / part / name, metadata={"format": "pt"})
        refuse("lacks 1 weights of its model", pipeline=str(incomplete))
    sizeless = next(copies)
    (sizeless / "unet" / "config.json").unlink()
    refuse("set size", pipeline=str(sizeless))
    other = next(copies)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    refuse("no AutoencoderKL", pipeline=str(other))


def test_a_full_disk_leaves_nothing_half_done(
    pixels: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_atomically

    def full(path: Path, content: bytes) -> None:
        if "shard-000001" in path.name:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(shards, "write_atomically", full)
    with pytest.raises(InputError, match="No space left on device"):
        prepare(**pixels, samples_per_shard=1)
    assert_nothing_written(tmp_path / "out")


# --- the command line


def test_the_command_line_takes_the_same_settings(photos: Path, pipeline: Path, tmp_path: Path) -> None:
    from lightning_unlearn.command_line.cli import main

    config = tmp_path / "prepare.yaml"
    config.write_text(f"images: {photos}\npipeline: {pipeline}\nflips: true\n")
    out = str(tmp_path / "out")
    assert main(["prepare", "--config", str(config), "--output", out, "--dtype=float32"]) == 0
    assert main(["prepare", "--config", str(config), "--output", out]) == 1
    assert sorted(read(tmp_path / "out")) == sorted(CAPTIONS)
    assert manifest(tmp_path / "out")["latent"]["dtype"] == "float32"
