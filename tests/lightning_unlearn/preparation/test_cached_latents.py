"""Latents as kohya's trainer keeps them beside the pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prepare_toys import manifest, read

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.prepare import prepare

Arrays = dict[str, np.ndarray[Any, Any]]


def cached(shape: tuple[int, ...] = (4, 6, 4), suffix: str = "", seed: int = 0, flips: bool = True) -> Arrays:
    """What lies in one file; newer files name the latent's size behind each array."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {
        "latents": rng.standard_normal(shape).astype(np.float32),
        "original_size": np.array([512, 768]),
        "crop_ltrb": np.array([0, 0, 512, 768]),
    }
    if flips:
        arrays["latents_flipped"] = rng.standard_normal(shape).astype(np.float32)
    return {name + suffix: array for name, array in arrays.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    (path / "10_sks dog").mkdir(parents=True)
    for number, name in enumerate(("a", "b_1")):
        Image.new("RGB", (8, 12)).save(path / "10_sks dog" / f"{name}.png")
        np.savez(path / "10_sks dog" / f"{name}_0512x0768_sd.npz", **cached(seed=number))
    return path


@pytest.fixture
def settings(folder: Path, text_encoder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "output": str(tmp_path / "out"),
        "images": str(folder),
        "latents": str(folder),
        "text_encoder": str(text_encoder),
        "dtype": "float32",
    }


@pytest.mark.filterwarnings("ignore")
def test_cached_latents_are_scaled_as_in_training(settings: dict[str, Any], tmp_path: Path) -> None:
    prepare(**settings, flips=True, like="kohya")
    samples = read(tmp_path / "out")
    assert sorted(samples) == ["10_sks dog-a", "10_sks dog-b_1"]
    for number, sample in enumerate(samples[key] for key in sorted(samples)):
        arrays = cached(seed=number)
        assert sample.latent_flip is not None
        assert np.array_equal(sample.latent, arrays["latents"] * np.float32(0.18215))
        assert np.array_equal(sample.latent_flip, arrays["latents_flipped"] * np.float32(0.18215))
        assert sample.metadata["kohya"] == {"original_size": [512, 768], "crop_ltrb": [0, 0, 512, 768]}
        assert sample.metadata["weight"] == 10
        assert sample.captions == ["sks dog"]
    about = manifest(tmp_path / "out")["latent"]
    assert (about["vae"], about["factor"], about["shape"]) == ("cached by kohya", [0.18215], [4, 6, 4])


@pytest.mark.filterwarnings("ignore")
def test_those_of_sdxl_have_its_scale_and_may_name_their_size(settings: dict[str, Any], tmp_path: Path) -> None:
    for path in (tmp_path / "set").rglob("*.npz"):
        np.savez(path.with_name(path.name.replace("_sd.", "_sdxl.")), **cached(suffix="_6x4"))
        path.unlink()
    prepare(**settings)
    latent = read(tmp_path / "out")["10_sks dog-a"].latent
    assert np.array_equal(latent, cached()["latents"] * np.float32(0.13025))


def refused(match: str, **settings: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        prepare(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_what_can_not_be_used_gets_one_sentence(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    place = folder / "10_sks dog" / "a_0512x0768_sd.npz"
    np.savez(place, **cached(flips=False))
    refused("has no latents_flipped", **settings, flips=True)
    np.savez(place, **cached(suffix="_6x4"), **cached(suffix="_3x2"))
    refused("several resolutions", **settings)
    np.savez(place, **{**cached(), "latents": np.array([{"a": 1}], dtype=object)})
    refused("a_0512x0768_sd.npz can't be read.*allow_pickle", **settings)
    place.write_bytes(b"PK nothing")
    refused("a_0512x0768_sd.npz can't be read", **settings)
    place.unlink()
    refused("a.png has no cached latent", **settings)
    np.savez(place.with_name("a_0512x0768_sdxl.npz"), **cached())
    refused("of SD and of SDXL", **settings)
    refused("set `flips` instead", **settings | {"latents_flip": str(place)})
    refused("name `images`", **settings | {"images": None, "captions": "c.txt"})
    (tmp_path / "empty").mkdir()
    refused("has no cached latents", **settings | {"latents": str(tmp_path / "empty")})


@pytest.mark.filterwarnings("ignore")
def test_a_picture_without_one_is_left_out_where_bad_samples_are(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    (folder / "10_sks dog" / "a_0512x0768_sd.npz").write_bytes(b"damaged")
    prepare(**settings, on_bad_sample="skip")
    assert list(read(tmp_path / "out")) == ["10_sks dog-b_1"]
    assert manifest(tmp_path / "out")["skipped"] == 1
