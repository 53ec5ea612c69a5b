"""Near-copies are found by their pixels, and pictures that only look alike are none."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.datamodules import sample
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards
from lightning_unlearn.report import near_copies as rule
from lightning_unlearn.report.near_copies import LEVELS, SIDE, code_of, near_copies
from lightning_unlearn.report.pictures import image_of

SHARDS = Path(next(iter(sample.__path__))) / "shards"


def _scene(seed: int, side: int = 96) -> Image.Image:
    """A picture with light and dark, large and small things, some of it white."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(20, 200, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).copy()
    for _ in range(12):
        x, y, width = (int(value) for value in generator.integers(0, side, 3))
        pixels[y : y + 9, x : x + width // 3] = generator.integers(0, 256, 3)
    return Image.fromarray(pixels)


def _changed(image: Image.Image, size: float, brightness: float) -> Image.Image:
    resized = image.resize((round(image.width * size), round(image.height * size)), Image.Resampling.LANCZOS)
    return ImageEnhance.Brightness(resized).enhance(brightness)


@pytest.fixture(scope="module")
def emoji() -> dict[str, Image.Image]:
    """The sample data's pictures."""

    def all_samples() -> Iterator[Sample]:
        for shard in list_shards(str(SHARDS)):
            yield from read_samples(shard, pictures=True)

    return {one.key: image for one in all_samples() if (image := image_of(one)) is not None}


def test_no_two_emoji_are_taken_for_copies_though_many_look_alike(emoji: dict[str, Image.Image]) -> None:
    assert len(emoji) == 544
    assert near_copies({key: code_of(image) for key, image in emoji.items()}) == {}


def test_copies_of_emoji_of_other_size_and_brightness_are_found_among_all_others(
    emoji: dict[str, Image.Image],
) -> None:
    codes = {key: code_of(image) for key, image in emoji.items()}
    changes = ((2.0, 0.6), (0.5, 1.0), (1.5, 0.8), (1.0, 1.05))
    chosen = sorted(emoji)[::60]
    for key in chosen:
        for number, change in enumerate(changes):
            codes[f"{key}~{number}"] = code_of(_changed(emoji[key], *change))
    groups = set(near_copies(codes).values())
    # Never two emoji in one group, and hardly a copy that is missed: brightening leaves little of white on white.
    assert all(len({key.partition("~")[0] for key in group}) == 1 for group in groups)
    assert sum(len(group) - 1 for group in groups) >= len(chosen) * len(changes) - 2
    assert {group[0] for group in groups} == set(chosen)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.5, 3.0), brightness=st.floats(0.4, 1.4))
def test_a_change_of_size_and_brightness_makes_a_copy(seed: int, size: float, brightness: float) -> None:
    image = _scene(seed)
    copy, other = _changed(image, size, brightness), _scene(seed + 1)
    found = near_copies({"a": code_of(image), "b": code_of(copy), "c": code_of(other)})
    assert found == {"a": ("a", "b"), "b": ("a", "b")}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), place=st.integers(0, 60))
def test_a_picture_in_which_something_else_stands_is_no_copy(seed: int, place: int) -> None:
    image = _scene(seed)
    pixels = np.asarray(image).copy()
    pixels[place : place + 24, place : place + 24] += 128  # which goes around
    assert near_copies({"a": code_of(image), "b": code_of(Image.fromarray(pixels))}) == {}


def test_what_was_compressed_again_is_a_copy() -> None:
    image = _scene(0, 256)
    stream = io.BytesIO()
    image.save(stream, "jpeg", quality=60)
    with Image.open(stream) as compressed:
        assert len(near_copies({"a": code_of(image), "b": code_of(compressed)})) == 2


def test_brightening_brings_a_picture_to_its_level_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where brightening cuts off white, only the levels still tell that a copy is one.
    image = _scene(3)
    light = ImageEnhance.Brightness(image).enhance(1.5)
    codes = {"a": code_of(image), "b": code_of(light)}
    for place, level in enumerate(LEVELS[1:], 1):
        for code in codes.values():
            if code[place].any():
                assert code[place].mean() / 255 == pytest.approx(level, abs=0.01)
    assert len(near_copies(codes)) == 2
    monkeypatch.setattr(rule, "LEAST_ALIKE", (rule.LEAST_ALIKE[0], *[2.0] * (len(LEVELS) - 1)))
    assert near_copies(codes) == {}


def _house(fill: tuple[int, int, int]) -> Image.Image:
    """A house drawn in black lines on white, filled with a colour."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon([(14, 44), (48, 12), (82, 44)], fill, "black", 4)
    draw.rectangle([20, 44, 76, 84], fill, "black", 4)
    draw.rectangle([42, 60, 54, 84], fill, "black", 4)
    return image


def _shirt(printed: str) -> Image.Image:
    """A black T-shirt on white with something on its front that is hardly lighter."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    outline = [(20, 12), (76, 12), (94, 34), (80, 44), (76, 38), (76, 90), (20, 90), (20, 38), (16, 44), (2, 34)]
    draw.polygon(outline, (12, 12, 12))
    if printed == "circle":
        draw.ellipse([38, 40, 58, 60], (60, 60, 60))
    else:
        draw.rectangle([30, 46, 66, 56], (70, 10, 10))
    return image


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_house((255, 240, 150)), _house((160, 210, 255))),
        (_house((255, 200, 210)), _house((200, 245, 205))),
        (_house((255, 235, 190)), _house((190, 225, 255))),
        (_shirt("circle"), _shirt("bar")),
    ],
)
def test_pictures_in_other_colours_or_with_another_small_thing_are_no_copies(
    one: Image.Image, other: Image.Image
) -> None:
    codes = {"a": code_of(one), "b": code_of(other)}
    assert near_copies(codes) == {}
    assert set(near_copies(codes | {"c": code_of(_changed(one, 1.5, 0.8))})) == {"a", "c"}


def test_flat_pictures_are_nobodys_copies() -> None:
    flat = {str(grey): code_of(Image.new("RGB", (40, 40), (grey, grey, grey))) for grey in (0, 100, 101, 255)}
    assert near_copies(flat) == {}
    assert near_copies({}) == {}


def test_groups_do_not_depend_on_order_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes = {}
    for number in range(12):
        code = generator.integers(0, 256, (len(LEVELS), SIDE, SIDE, 3), dtype=np.uint8)
        for copy in range(number % 4):
            codes[f"{number:02d}-{copy}"] = np.clip(code.astype(int) + copy, 0, 255).astype(np.uint8)
    whole = near_copies(codes)
    assert sorted(len(group) for group in set(whole.values())) == [2] * 3 + [3] * 3
    assert near_copies(dict(reversed(codes.items()))) == whole
    monkeypatch.setattr(rule, "BLOCK", 2)
    assert near_copies(codes) == whole
