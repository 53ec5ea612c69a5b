"""What each trainer makes of one and the same folder, by small expectations written out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prepare_toys import manifest, read

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.choices import choose
from lightning_unlearn.preparation.prepare import prepare
from lightning_unlearn.preparation.resizing import resized

TRAINERS = ("kohya", "simpletuner", "onetrainer", "ai-toolkit", "diffusers")
RED, WHITE, BLUE, BLACK = [1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def made(tmp_path: Path, text_encoder: Path) -> Any:
    """Runs `prepare` on the folder `set` and gives its samples."""

    def run(**settings: Any) -> dict[str, Any]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        prepare(
            str(out),
            str(tmp_path / "set"),
            **{"size": 4, "text_encoder": str(text_encoder), "dtype": "float32"} | settings,
        )
        return read(out)

    (tmp_path / "set").mkdir()
    return run


@pytest.mark.parametrize(
    ("like", "captions"),
    [
        (None, ["1girl, red hair", "solo"]),
        ("kohya", ["1girl, red hair"]),
        ("simpletuner", ["1girl, red hair", "solo"]),
        ("onetrainer", ["1girl, red hair", "solo"]),
        ("ai-toolkit", ["1girl, red hair, solo"]),
        ("diffusers", ["1girl, red hair", "solo"]),
    ],
)
def test_lines_of_a_caption_file(like: str | None, captions: list[str], made: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("1girl, red hair\n\nsolo\n")
    assert made(like=like)["a"].captions == captions
    # The single choice takes precedence.
    assert made(like=like, caption_lines="first")["a"].captions == ["1girl, red hair"]


def test_a_blank_first_line_is_the_caption_where_the_first_line_is(made: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("\nsolo\n")
    assert made(like="kohya")["a"].captions == [""]


@pytest.mark.parametrize("like", [None, *TRAINERS])
def test_exif_orientation(like: str | None, made: Any, tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "blue")
    picture.paste((255, 0, 0), (0, 0, 4, 2))  # red above, blue below
    exif = Image.Exif()
    exif[0x0112] = 3  # to be turned upside down
    picture.save(tmp_path / "set" / "a.png", exif=exif)
    (tmp_path / "set" / "a.txt").write_text("a")
    top = made(like=like)["a"].latent[:, 0, 0].tolist()
    assert top == (RED if like == "kohya" else BLUE)
    assert made(like=like, exif="keep")["a"].latent[:, 0, 0].tolist() == RED
    assert made(like=like, exif="turn")["a"].latent[:, 0, 0].tolist() == BLUE


@pytest.mark.parametrize(
    ("like", "shown"),
    [
        (None, WHITE),
        ("kohya", RED),
        ("simpletuner", WHITE),
        ("onetrainer", WHITE),
        ("ai-toolkit", RED),
        ("diffusers", RED),
    ],
)
def test_colours_beneath_transparency(like: str | None, shown: list[float], made: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("a")
    assert made(like=like)["a"].latent[:, 0, 0].tolist() == shown
    assert made(like=like, alpha="drop")["a"].latent[:, 0, 0].tolist() == RED
    assert made(like=like, alpha="white")["a"].latent[:, 0, 0].tolist() == WHITE


@pytest.mark.parametrize(
    ("like", "wide"), [("kohya", (4, 4)), ("simpletuner", (4, 8)), ("onetrainer", (4, 8)), ("ai-toolkit", (4, 4))]
)
def test_pictures_get_their_bucket_unless_the_middle_is_asked_for(
    like: str, wide: tuple[int, int], made: Any, tmp_path: Path
) -> None:
    for name, size in (("a", (4, 4)), ("b", (8, 8)), ("c", (10, 4))):
        Image.new("RGB", size).save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(name)
    shapes = {key: tuple(sample.latent.shape) for key, sample in made(like=like).items()}
    assert shapes == {"a": (3, 4, 4), "b": (3, 4, 4), "c": (3, *wide)}
    shapes = {key: tuple(sample.latent.shape) for key, sample in made(like=like, crop="middle").items()}
    assert set(shapes.values()) == {(3, 4, 4)}


def test_a_turned_picture_has_the_bucket_of_its_turned_shape(made: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 4)).save(tmp_path / "set" / "a.png", exif=exif)
    (tmp_path / "set" / "a.txt").write_text("a")
    bucket = {"crop": "bucket", "buckets": "nearest"}
    assert made(**bucket)["a"].latent.shape == (3, 8, 4)
    assert made(**bucket, exif="keep")["a"].latent.shape == (3, 4, 8)


@pytest.mark.parametrize(
    ("like", "caption"),
    [(None, ["sks dog"]), ("kohya", ["sks dog"]), ("simpletuner", None), ("onetrainer", None), ("ai-toolkit", [""])],
)
def test_a_missing_caption(like: str | None, caption: list[str] | None, made: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "3_sks dog"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    if caption is None:
        with pytest.raises(InputError, match="has no caption"):
            made(like=like)
    else:
        assert made(like=like)["3_sks dog-a"].captions == caption
    sample = made(like=like, caption="a photo of sks")["3_sks dog-a"]
    # Kohya's trainer takes its class token, and ours the folder's name, only where no caption is given.
    assert sample.captions == ["a photo of sks"]
    assert sample.metadata.get("weight") == (3 if like in {None, "kohya"} else None)


def test_ai_toolkit_reads_a_default_file_where_a_caption_is_missing(made: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / f"{name}.png")
    (tmp_path / "set" / "a.txt").write_text("its own")
    (tmp_path / "set" / "default.txt").write_text("for\nall")
    samples = made(like="ai-toolkit")
    assert {key: sample.captions for key, sample in samples.items()} == {"a": ["its own"], "b": ["for, all"]}


def test_diffusers_gives_its_one_prompt_to_all_and_others_where_none_is(made: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("its own")
    for like in TRAINERS:
        expected = "sks" if like == "diffusers" else "its own"
        assert made(like=like, caption="sks")["a"].captions == [expected]


def test_kohya_stops_at_an_empty_caption_file(made: Any, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        made(like="kohya")
    assert made(like="ai-toolkit")["a"].captions == [""]


@pytest.mark.parametrize("like", TRAINERS)
def test_masks_are_pictures_but_for_onetrainer(like: str, made: Any, tmp_path: Path) -> None:
    for name in ("a", "a-masklabel"):
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(name)
    expected = ["a"] if like == "onetrainer" else ["a", "a-masklabel"]
    assert sorted(made(like=like)) == expected
    assert sorted(made(like=like, masks="leave_out")) == ["a"]


def test_kohya_takes_no_gif_and_says_so(made: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / name)
        (tmp_path / "set" / name).with_suffix(".txt").write_text("x")
    with pytest.warns(UserWarning, match="1 pictures are not of the `picture_kinds` that are taken: b.gif"):
        assert sorted(made(like="kohya")) == ["a"]
    assert sorted(made(like="kohya", picture_kinds="png, GIF")) == ["a", "b"]


def test_every_choice_stands_in_the_manifest(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("a")
    made(like="kohya", alpha="white", caption="sks")
    (out,) = tmp_path.glob("out-*")
    assert "like=kohya: caption dropout, shuffled tags" in capsys.readouterr().err
    told = manifest(out)["reading"]
    assert (told["like"], told["layout"], told["caption"]) == ("kohya", "folder", "sks")
    assert told["choices"] == {**choose("kohya")[0].as_json(), "alpha": "white"}
    assert told["choices"]["exif"] == "keep"
    assert any("dropout" in clause for clause in told["not_followed"])
    assert manifest(out)["pictures"]["resize"] == "kohya"


# --- resizing, on arrays


def ramp(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_kohya_shrinks_by_the_mean_over_areas_then_cuts() -> None:
    picture = ramp(24, 20)
    # To 8 high and 24 * 8 / 20 = 9.6, so 10 wide; one column is cut on each side.
    pixels = np.asarray(picture, dtype=np.float64)
    whole = np.zeros((8, 10, 3))
    for row in range(8):
        for column in range(10):
            total = np.zeros(3)
            for y in range(20):
                for x in range(24):
                    high = max(0.0, min((row + 1) * 2.5, y + 1) - max(row * 2.5, y))
                    wide = max(0.0, min((column + 1) * 2.4, x + 1) - max(column * 2.4, x))
                    total += pixels[y, x] * high * wide
            whole[row, column] = total / (2.5 * 2.4)
    got = np.asarray(resized(picture, 8, 8, "kohya"), dtype=np.float64)
    # Both round to 8 bits: at most half a step, and what float64 loses on the way.
    assert np.abs(got - whole[:, 1:9]).max() <= 0.5 + 1e-9


def test_kohya_enlarges_by_lanczos() -> None:
    expected = ramp(6, 4).resize((12, 8), Image.Resampling.LANCZOS).crop((2, 0, 10, 8))
    assert resized(ramp(6, 4), 8, 8, "kohya").tobytes() == expected.tobytes()


def test_torchvision_rounds_the_longer_side_down_and_cuts_the_middle() -> None:
    # 24 * 8 / 20 = 9.6, so 9 wide; round(0.5) is 0.
    expected = ramp(24, 20).resize((9, 8), Image.Resampling.LANCZOS).crop((0, 0, 8, 8))
    assert resized(ramp(24, 20), 8, 8, "torchvision").tobytes() == expected.tobytes()


def test_ours_cuts_the_middle_out_first() -> None:
    expected = ramp(24, 20).crop((2, 0, 22, 20)).resize((8, 8), Image.Resampling.BICUBIC)
    assert resized(ramp(24, 20), 8, 8, "bicubic").tobytes() == expected.tobytes()


@pytest.mark.parametrize("way", ["bicubic", "kohya", "torchvision"])
@pytest.mark.parametrize("size", [(5, 3), (3, 5), (1, 9), (4, 4), (40, 33)])
def test_any_shape_covers_the_square(way: Any, size: tuple[int, int]) -> None:
    assert resized(ramp(*size), 4, 4, way).size == (4, 4)
    assert resized(ramp(*size).convert("L"), 4, 4, way).mode == "L"


def test_an_unknown_trainer_is_refused() -> None:
    with pytest.raises(InputError, match="like='novel' is none of kohya, simpletuner"):
        choose("novel")


def test_pixels_of_a_like_go_through_its_resizing(made: Any, tmp_path: Path) -> None:
    ramp(8, 8).save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "a.txt").write_text("a")
    for like, way in (("kohya", "kohya"), ("diffusers", "torchvision"), ("ai-toolkit", "bicubic"), (None, "bicubic")):
        seen = np.asarray(resized(ramp(8, 8), 4, 4, way), dtype=np.float32)  # type: ignore[arg-type]
        expected = torch.from_numpy(seen.transpose(2, 0, 1) / np.float32(127.5) - 1)
        assert torch.equal(made(like=like)["a"].latent, expected)


def test_the_command_line_takes_choices(tmp_path: Path, text_encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_unlearn.command_line.cli import main

    folder = tmp_path / "set" / "2_sks"
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 8)).save(folder / "a.png")
    command = ["prepare", "--images", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--size=4"]
    command += ["--text_encoder", str(text_encoder), "--like=kohya"]
    assert main([*command, "--caption_dropout=2"]) == 1
    assert "caption_dropout must be" in capsys.readouterr().err
    assert main([*command, "--crop=middle"]) == 0
    assert read(tmp_path / "out")["2_sks-a"].captions == ["sks"]
