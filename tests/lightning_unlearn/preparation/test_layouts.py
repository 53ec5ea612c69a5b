"""Data sets as people have them: the right samples, or one sentence; nothing lost in silence."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from prepare_toys import manifest, read

from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation.layouts.files import readable_suffixes
from lightning_unlearn.preparation.prepare import prepare

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
Colour = tuple[int, int, int]


def picture(colour: Colour = RED, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    settings = {"quality": 100} if kind in {"jpeg", "webp", "avif"} else {}
    Image.new("RGB", (4, 4), colour).save(stream, kind, **settings)
    return stream.getvalue()


def put(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def tree(contents: dict[str, str | bytes]) -> Callable[[Path], None]:
    return lambda folder: [put(folder, name, content) for name, content in contents.items()] and None


def tar(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as file:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def downloaded(key: str, colour: Colour, caption: str, **facts: Any) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    known = {"caption": caption, "key": key, "status": "success", "width": 4, "height": 4, **facts}
    return [
        (f"{key}.jpg", picture(colour, "jpeg")),
        (f"{key}.json", json.dumps(known).encode()),
        (f"{key}.txt", caption.encode()),
    ]


def table(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def arrow(splits: bool) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import datasets

        def rows(caption: str) -> Any:
            columns = {"image": [{"bytes": picture(GREEN), "path": None}], "text": [caption], "id": ["x1"]}
            features = datasets.Features(
                image=datasets.Image(), text=datasets.Value("string"), id=datasets.Value("string")
            )
            return datasets.Dataset.from_dict(columns, features=features)

        whole = datasets.DatasetDict(train=rows("trained"), test=rows("held out")) if splits else rows("whole")
        whole.save_to_disk(str(folder))

    return build


def image_parquet(folder: Path) -> None:
    import datasets

    features = datasets.Features(image=datasets.Image(), prompt=datasets.Value("string"))
    (folder / "data").mkdir(parents=True)
    for number, colour in enumerate((RED, BLUE)):
        columns = {"image": [{"bytes": picture(colour), "path": f"{number}.png"}], "prompt": [f"number {number}"]}
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(str(folder / "data" / f"train-0000{number}-of-00002.parquet"))


@dataclass
class Layout:
    """A folder, settings, and what must come of it: captions and colours, weights, counts; or a sentence."""

    build: Callable[[Path], None]
    settings: dict[str, Any] = field(default_factory=dict)
    captions: dict[str, list[str]] | None = None
    colours: dict[str, Colour] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    sentence: str | None = None
    source: str = ""
    left_out: int = 0


SKIP = {"on_bad_sample": "skip"}
LAYOUTS = {
    "captions in .txt, a line each": Layout(
        tree({"a.png": picture(GREEN), "a.txt": "1girl, red hair\nsolo\n", "s/b.PNG": picture(), "s/b.txt": "b"}),
        captions={"a": ["1girl, red hair", "solo"], "s-b": ["b"]},
        colours={"a": GREEN, "s-b": RED},
    ),
    "captions in .caption": Layout(tree({"c.png": picture(), "c.caption": "see"}), captions={"c": ["see"]}),
    "two caption files that agree": Layout(
        tree({"c.png": picture(), "c.caption": "see", "c.txt": "see"}), captions={"c": ["see"]}
    ),
    "two caption files that differ": Layout(
        tree({"c.png": picture(), "c.caption": "see", "c.txt": "sea"}), sentence=r"c\.txt and c\.caption, which differ"
    ),
    "two caption files, and it is said which": Layout(
        tree({"c.png": picture(), "c.caption": "see", "c.txt": "sea"}),
        {"caption_suffix": "caption"},
        captions={"c": ["see"]},
    ),
    "names with dots": Layout(tree({"v1.0 cat.png": picture(), "v1.0 cat.txt": "cat"}), captions={"v1_0 cat": ["cat"]}),
    "no caption": Layout(tree({"a.png": picture()}), sentence=r"a\.png has no caption"),
    "an empty caption file": Layout(
        tree({"a.png": picture(), "a.txt": ""}),
        {"missing_caption": "empty"},
        captions={"a": [""]},
        counted=("1 samples have the empty caption: a.png",),
    ),
    "one caption for all": Layout(
        tree({"a.png": picture(), "b.png": picture(BLUE), "b.txt": "not read"}),
        {"caption": "a photo of sks dog"},
        captions={"a": ["a photo of sks dog"], "b": ["a photo of sks dog"]},
        counted=("1 caption files were not read, because `caption` is for all: b.png",),
    ),
    "one caption for those that have none": Layout(
        tree({"a.png": picture(), "b.png": picture(BLUE), "b.txt": "its own"}),
        {"caption": "a photo of sks dog", "caption_for": "missing"},
        captions={"a": ["a photo of sks dog"], "b": ["its own"]},
    ),
    "kohya's folders": Layout(
        tree(
            {
                "10_sks dog/1.png": picture(GREEN),
                "2_sks_cat/2.png": picture(BLUE),
                "2_sks_cat/2.txt": "its own",
            }
        ),
        captions={"10_sks dog-1": ["sks dog"], "2_sks_cat-2": ["its own"]},
        colours={"10_sks dog-1": GREEN, "2_sks_cat-2": BLUE},
        weights={"10_sks dog-1": 10, "2_sks_cat-2": 2},
        counted=("2 folders' numbers of repeats became weights",),
    ),
    "one of kohya's folders alone": Layout(
        tree({"10_sks dog/1.png": picture()}),
        captions={"1": ["sks dog"]},
        weights={"1": 10},
        source="10_sks dog",
    ),
    "kohya's folders with regularisation": Layout(
        tree({"img/10_sks dog/1.png": picture(), "reg/1_dog/2.png": picture(BLUE)}),
        captions={"img-10_sks dog-1": ["sks dog"], "reg-1_dog-2": ["dog"]},
        weights={"img-10_sks dog-1": 10, "reg-1_dog-2": 1},
        counted=("1 pictures are regularisation (class) pictures, and marked so: reg/1_dog/2.png",),
    ),
    "kohya's folders and one without a number": Layout(
        tree({"10_sks dog/1.png": picture(), "others/2.png": picture(), "0_none/3.png": picture()}),
        {"like": "kohya"},
        captions={"10_sks dog-1": ["sks dog"]},
        weights={"10_sks dog-1": 10},
        counted=("2 pictures lie in folders without a number of repeats, which kohya's trainer skips: 0_none/3.png",),
    ),
    "numbers that are no repeats": Layout(
        tree({"10_sks dog/1.png": picture(), "10_sks dog/1.txt": "dog"}),
        {"repeats": "none"},
        captions={"10_sks dog-1": ["dog"]},
    ),
    "OneTrainer's masks": Layout(
        tree({"a.png": picture(), "a.txt": "a", "a-masklabel.png": picture(BLUE), "a-condlabel.png": picture()}),
        captions={"a": ["a"]},
        counted=("2 masks were left out: a-condlabel.png, a-masklabel.png",),
    ),
    "two pictures of one name": Layout(
        tree({"a.jpg": picture(kind="jpeg"), "a.png": picture(), "a.txt": "a"}), sentence=r"the key 'a'.*a\.png"
    ),
    "two pictures of one name, the second left out": Layout(
        tree({"a.b.png": picture(GREEN), "a_b.png": picture(), "a.b.txt": "first", "a_b.txt": "second"}),
        SKIP,
        captions={"a_b": ["first"]},
        colours={"a_b": GREEN},
        left_out=1,
    ),
    "kinds that can't be read": Layout(
        tree({"a.png": picture(), "a.txt": "a", "z.heic": b"x", "z.txt": "z"}),
        sentence=r"z\.heic is a picture of a kind",
    ),
    "kinds that can't be read, left out": Layout(
        tree({"a.png": picture(), "a.txt": "a", "z.heic": b"x", "z.txt": "z", "c.jxl": b"x", "c.txt": "c"}),
        SKIP,
        captions={"a": ["a"]},
        left_out=2,
    ),
    "one caption in latin-1": Layout(
        tree({"a.png": picture(), "a.txt": "a", "b.png": picture(), "b.txt": "é".encode("latin-1")}),
        sentence=r"b\.txt is not UTF-8",
    ),
    "one caption in latin-1, left out": Layout(
        tree({"a.png": picture(), "a.txt": "a", "b.png": picture(), "b.txt": "é".encode("latin-1")}),
        SKIP,
        captions={"a": ["a"]},
        left_out=1,
    ),
    "files that are neither picture nor caption": Layout(
        tree({"a.png": picture(), "a.txt": "a", "gone.txt": "b", "_latent_cache/a.safetensors": b"", "x_te.npz": b""}),
        captions={"a": ["a"]},
        counted=("1 caption files have no picture: gone.txt", "2 other files were left out"),
    ),
    "a table with columns of any name": Layout(
        tree({"a.png": picture(GREEN), "metadata.csv": "image,prompt,artist\na.png,see,Ann\n"}),
        {"image_column": "image", "caption_column": "prompt"},
        captions={"a": ["see"]},
        colours={"a": GREEN},
    ),
    "a table whose columns are not said": Layout(
        tree({"a.png": picture(), "metadata.jsonl": '{"image": "a.png", "prompt": "see"}'}),
        sentence="image_column.*its columns: image, prompt",
    ),
    "a table of parquet": Layout(
        tree({"pics/a.png": picture(BLUE), "t.parquet": table([{"path": "pics/a.png", "tags": ["x, y", "z"]}])}),
        {"image_column": "path", "caption_column": "tags"},
        captions={"pics-a": ["x, y", "z"]},
        colours={"pics-a": BLUE},
        source="t.parquet",
    ),
    "a table that does not list all": Layout(
        tree({"a.png": picture(), "b.png": picture(), "metadata.csv": "file_name,text\na.png,see\n"}),
        captions={"a": ["see"]},
        counted=("1 pictures are not listed in metadata.csv: b.png",),
    ),
    "a table with a kind that can't be read": Layout(
        tree({"a.heic": b"x", "b.png": picture(), "metadata.csv": "file_name,text\na.heic,see\nb.png,be\n"}),
        SKIP,
        captions={"b": ["be"]},
        left_out=1,
    ),
    "a table that holds its pictures": Layout(
        tree({"t.parquet": table([{"image": {"bytes": picture(BLUE), "path": "x/a.png"}, "text": "see", "n": 3}])}),
        {"image_column": "image"},
        captions={"x-a": ["see"]},
        colours={"x-a": BLUE},
        source="t.parquet",
    ),
    "a table with weights": Layout(
        tree(
            {
                "a.png": picture(GREEN),
                "b.png": picture(),
                "metadata.csv": "file_name,text,weight\na.png,see,2.5\nb.png,be,1\n",
            }
        ),
        captions={"a": ["see"], "b": ["be"]},
        weights={"a": 2.5, "b": 1},
        counted=("2 samples have the weight in training that 'weight' says: a, b",),
    ),
    "a table whose weights are something else": Layout(
        tree({"a.png": picture(), "metadata.csv": "file_name,text,weight\na.png,see,12 kg\n"}),
        sentence="'12 kg' as 'weight' in its json, which says how often training repeats it",
    ),
    "OneTrainer's masks, where the loss was": Layout(
        tree({"a.png": picture(), "a.txt": "a", "a-masklabel.png": picture((255, 255, 255))}),
        {"like": "onetrainer", "masks": "loss"},
        captions={"a": ["a"]},
    ),
    "OneTrainer's masks, one of them black": Layout(
        tree({"a.png": picture(), "a.txt": "a", "a-masklabel.png": picture((0, 0, 0))}),
        {"masks": "loss"},
        sentence=r"mask of .*a\.png is all black",
    ),
    "pictures of several shapes in kohya's folders, in buckets": Layout(
        tree({"5_sks dog/1.png": picture(GREEN), "1_reg/2.png": picture(BLUE)}),
        {"like": "kohya", "caption_dropout": 0.25},
        captions={"5_sks dog-1": ["sks dog", ""], "1_reg-2": ["reg", ""]},
        colours={"5_sks dog-1": GREEN, "1_reg-2": BLUE},
        weights={"5_sks dog-1": 5, "1_reg-2": 1},
    ),
    "a misnamed table": Layout(
        tree({"a.png": picture(), "metadata.json1": '{"file_name": "a.png", "text": "see"}'}), sentence="no caption"
    ),
    "img2dataset's tar": Layout(
        tree({"00000.tar": tar([*downloaded("000000000", RED, "one"), *downloaded("000000001", BLUE, "two")])}),
        captions={"000000000": ["one"], "000000001": ["two"]},
        colours={"000000000": RED, "000000001": BLUE},
        source="00000.tar",
    ),
    "tars by a pattern": Layout(
        tree({f"{n:05d}.tar": tar(downloaded(f"{n:05d}0000", RED, f"of {n}")) for n in range(3)}),
        captions={f"{n:05d}0000": [f"of {n}"] for n in range(3)},
        source="{00000..00002}.tar",
    ),
    "tars by a pattern, of which one is missing": Layout(
        tree({"0.tar": tar(downloaded("x", RED, "x"))}),
        sentence=r"1 of the 2 tars .* are not there",
        source="{0..1}.tar",
    ),
    "a tar with captions of another name": Layout(
        tree({"0.tar": tar(downloaded("x", RED, "alt text", recaption="a red thing"))}),
        {"caption_column": "recaption"},
        captions={"x": ["a red thing"]},
        source="0.tar",
    ),
    "a compressed tar with folders, dots, and a Mac's leavings": Layout(
        tree(
            {
                "s.tar.gz": tar(
                    [
                        ("train.v1/", b""),
                        ("train.v1/._0001.json", b"\x00\x05"),
                        ("./train.v1/0001.PNG", picture(BLUE)),
                        ("./train.v1/0001.txt", b"blue"),
                        ("./train.v1/notes.md", b"words"),
                    ],
                    "w:gz",
                )
            }
        ),
        captions={"train_v1-0001": ["blue"]},
        colours={"train_v1-0001": BLUE},
        counted=("1 samples of tars have no picture: s.tar.gz, sample train.v1/notes",),
        source="s.tar.gz",
    ),
    "a tar with bad samples": Layout(
        tree(
            {
                "0.tar": tar(
                    [
                        *downloaded("a", RED, "good"),
                        ("b.jpg", picture()),
                        ("b.txt", b"\xe9"),
                        ("c.heic", b"x"),
                        ("c.txt", b"see"),
                        *downloaded("a", RED, "again"),
                    ]
                )
            }
        ),
        SKIP,
        captions={"a": ["good"]},
        left_out=3,
        source="0.tar",
    ),
    "a tar cut off": Layout(
        tree({"0.tar": tar(downloaded("a", RED, "x"))[:700]}), sentence=r"0\.tar can't be read", source="0.tar"
    ),
    "Hugging Face's arrow": Layout(arrow(False), {"key": "id"}, captions={"x1": ["whole"]}, colours={"x1": GREEN}),
    "Hugging Face's arrow with splits": Layout(
        arrow(True), {"split": "train"}, captions={"00000000": ["trained"]}, colours={"00000000": GREEN}
    ),
    "Hugging Face's arrow, no split said": Layout(arrow(True), sentence="splits train, test; say which.*`split`"),
    "Hugging Face's parquet": Layout(
        image_parquet,
        {"caption_column": "prompt"},
        captions={"0": ["number 0"], "1": ["number 1"]},
        colours={"0": RED, "1": BLUE},
    ),
    "Hugging Face's parquet, no caption said": Layout(image_parquet, sentence="its columns: image, prompt"),
    "Hugging Face's imagefolder with splits": Layout(
        tree(
            {
                "train/a.png": picture(BLUE),
                "train/metadata.jsonl": '{"file_name": "a.png", "text": "see"}\n',
                "test/b.png": picture(),
                "test/metadata.jsonl": '{"file_name": "b.png", "text": "held out"}\n',
            }
        ),
        {"split": "train"},
        captions={"train-a": ["see"]},
        colours={"train-a": BLUE},
    ),
    "a split of what has none": Layout(
        tree({"a.png": picture(), "a.txt": "a"}), {"split": "train"}, sentence="has no splits"
    ),
    "a folder without pictures": Layout(tree({"notes.md": "words"}), sentence="holds no sample.*1 other files"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_right_samples_or_one_sentence(name: str, tmp_path: Path, text_encoder: Path) -> None:
    layout = LAYOUTS[name]
    folder, out = tmp_path / "set", tmp_path / "out"
    layout.build(folder)
    settings = {"size": 4, "text_encoder": str(text_encoder), "dtype": "float32", **layout.settings}

    def run() -> None:
        prepare(str(out), str(folder / layout.source), **settings)

    if layout.sentence is not None:
        with pytest.raises(InputError, match=layout.sentence) as caught:
            run()
        assert "\n" not in str(caught.value)
        assert not (out / "manifest.json").exists()
        return
    run()
    samples = read(out)
    assert {key: sample.captions for key, sample in samples.items()} == layout.captions
    for key, colour in layout.colours.items():
        expected = torch.tensor(colour)[:, None, None].expand(3, 4, 4) / 127.5 - 1
        torch.testing.assert_close(samples[key].latent, expected, atol=3 / 127.5, rtol=0)  # JPEG is not exact
    weights = {key: sample.metadata["weight"] for key, sample in samples.items() if "weight" in sample.metadata}
    assert weights == layout.weights
    about = manifest(out)
    counted = [
        f"{entry['count']} {entry['what']}: {', '.join(entry['first'])}" for entry in about["left_out"]["counts"]
    ]
    for line in layout.counted:
        assert any(line in said for said in counted), counted
    assert about["skipped"] == layout.left_out == len(about["left_out"]["faults"])
    assert str(tmp_path) not in json.dumps(about)


def test_a_data_set_without_its_library_says_what_to_install(
    tmp_path: Path, text_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_parquet(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"which needs datasets; `pip install lightning-unlearn\[datasets\]`"):
        prepare(str(tmp_path / "out"), str(tmp_path / "set"), size=4, text_encoder=str(text_encoder))


def test_linked_folders_are_followed_once(tmp_path: Path, text_encoder: Path) -> None:
    tree({"elsewhere/a.png": picture(), "elsewhere/a.txt": "a", "set/b.png": picture(), "set/b.txt": "b"})(tmp_path)
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    prepare(str(tmp_path / "out"), str(tmp_path / "set"), size=4, text_encoder=str(text_encoder))
    assert sorted(read(tmp_path / "out")) == ["b", "link-a"]


@pytest.mark.skipif(".avif" not in readable_suffixes(), reason="Pillow is built without AVIF")
def test_an_avif_is_a_sample_where_pillow_reads_it(tmp_path: Path, text_encoder: Path) -> None:
    tree({"a.avif": picture(GREEN, "avif"), "a.txt": "a"})(tmp_path / "set")
    prepare(str(tmp_path / "out"), str(tmp_path / "set"), size=4, text_encoder=str(text_encoder))
    assert list(read(tmp_path / "out")) == ["a"]


def test_what_is_not_taken_is_said_at_the_end(tmp_path: Path, text_encoder: Path) -> None:
    names = {f"{n}-masklabel.png": picture() for n in range(5)}
    tree({"a.png": picture(), "a.txt": "a " * 90, **names})(tmp_path / "set")
    with pytest.warns(
        UserWarning, match=r"5 masks were left out: 0-masklabel.png, .*, \.\.\.; 1 captions are longer"
    ) as said:
        prepare(str(tmp_path / "out"), str(tmp_path / "set"), size=4, text_encoder=str(text_encoder))
    assert len([warning for warning in said if issubclass(warning.category, UserWarning)]) == 1
    assert "than the 77 tokens that are read" in str(said[0].message)


def test_an_empty_caption_is_the_empty_prompt(tmp_path: Path, text_encoder: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel

    tree({"a.png": picture()})(tmp_path / "set")
    settings: dict[str, Any] = {"size": 4, "text_encoder": str(text_encoder), "dtype": "float32"}
    with pytest.warns(UserWarning, match="empty caption"):
        prepare(str(tmp_path / "out"), str(tmp_path / "set"), missing_caption="empty", **settings)
    ids = AutoTokenizer.from_pretrained(text_encoder)([""], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        states = CLIPTextModel.from_pretrained(text_encoder)(**ids)[0] * ids["attention_mask"][..., None]
    torch.testing.assert_close(read(tmp_path / "out")["a"].text, states, atol=1e-6, rtol=1e-5)


def test_a_set_says_what_it_will_take_before_it_is_made(
    tmp_path: Path, text_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        noise.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("one\ntwo")
    settings: dict[str, Any] = {"size": 32, "text_encoder": str(text_encoder), "flips": True, "picture_size": 0}
    (shard,) = prepare(str(tmp_path / "out"), str(tmp_path), **settings)
    said = capsys.readouterr().err
    promised = float(said.split("will take about ")[1].split(" KB")[0]) * 1000
    assert said.index("will take about") < said.index("prepare: ")
    # A tar ends in blocks of zeros up to 10,240 bytes, and a sample's json fills a block at least.
    assert shard.bytes is not None
    assert abs(shard.bytes - promised) <= 10240 + 20 * 1024
