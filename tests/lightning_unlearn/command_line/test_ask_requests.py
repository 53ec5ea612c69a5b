"""What may be asked, and the one sentence that everything else gets; how long it will take, and batches that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_toys import write_config
from PIL import Image

from lightning_unlearn.command_line import ask_command
from lightning_unlearn.command_line.ask_checks import check_request
from lightning_unlearn.command_line.ask_config import answer_digest, config_of_request
from lightning_unlearn.command_line.ask_costs import Machine, about, batches_that_fit, forecast, passes_for
from lightning_unlearn.command_line.ask_folder import AskFolder, facts_of
from lightning_unlearn.command_line.ask_queries import Gallery, given_picture, query_words
from lightning_unlearn.command_line.ask_request import Request, request_of
from lightning_unlearn.command_line.ask_run import _parsed
from lightning_unlearn.command_line.ask_sample import text_states
from lightning_unlearn.command_line.check_costs import calls_memory
from lightning_unlearn.command_line.check_plan import plan_of
from lightning_unlearn.errors import InputError

SAMPLE = Path(__file__).parents[3] / "datamodules" / "sample"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline (its index at least), training pictures and a picture to ask about."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipeline", "train", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("train/a.png", "asked.png"):
        Image.new("RGB", (8, 8), "red").save(name)
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "settings.yaml").write_text("model: {init_args: {views: {timesteps: 2}}}\n")
    (tmp_path / "other.yaml").write_text("pictures: 1\n")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a dog", "artist": "ann"}\n{"prompt": "a cat"}\n')
    (tmp_path / "no_prompt.csv").write_text("text\na dog\n")
    return tmp_path


MODEL = ["--pipeline", "pipeline", "--images", "train"]


def asked(*words: str) -> Request:
    request = request_of(ask_command._parser().parse_args(list(words)))
    check_request(request)
    return request


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "a dog"], "No model is named"),
        (["--pipeline", "pipeline", "--prompt", "a dog"], "No training pictures are named"),
        ([*MODEL, "--shards", "shards", "--prompt", "a dog"], "leave one of them out"),
        (["--pipeline", "nowhere", "--images", "train", "--prompt", "a dog"], "There is no pipeline at nowhere"),
        (["--pipeline", "asked.png", "--images", "train", "--prompt", "a dog"], "from_single_file"),
        (["--pipeline", "empty", "--images", "train", "--prompt", "a dog"], "no model_index.json"),
        (["--pipeline", "pipeline", "--images", "empty", "--prompt", "a dog"], "holds no picture"),
        (["--pipeline", "pipeline", "--images", "nowhere", "--prompt", "a dog"], "nowhere is not there"),
        ([*MODEL], "Nothing is asked"),
        ([*MODEL, "--prompt", " "], "A prompt is empty"),
        ([*MODEL, "--prompt", "x" * 100_000], "shorten it"),
        ([*MODEL, "--prompt", "a dog", "a dog"], "asked twice"),
        ([*MODEL, "--prompt", "a dog", "--seed", "-1"], "A seed is a number from 0 on"),
        ([*MODEL, "--query", "asked.png"], "needs the prompt"),
        ([*MODEL, "--query", "asked.png", "--prompt", "a", "b"], "1 --query and 2 prompts"),
        ([*MODEL, "--query", "broken.png", "--prompt", "a"], "can't be read as a picture"),
        ([*MODEL, "--query", "nowhere.png", "--prompt", "a"], "There is no picture at nowhere.png"),
        ([*MODEL, "--query", "asked.png", "--prompt", "a", "--seed", "1"], "--seed is for pictures"),
        ([*MODEL, "--prompts", "none.txt"], "holds no prompt"),
        ([*MODEL, "--prompts", "asked.png"], "no text in UTF-8"),
        ([*MODEL, "--prompts", "no_prompt.csv"], "Row 1 of no_prompt.csv has no prompt"),
        ([*MODEL, "--prompts", "rows.jsonl", "--concept", "artist"], "'a cat' has none"),
        ([*MODEL, "--prompt", "a dog", "--adapter", "nowhere"], "There is no adapter at nowhere"),
        ([*MODEL, "--prompt", "a dog", "--like", "nobody"], "like='nobody' is none of kohya"),
        ([*MODEL, "--prompt", "a dog", "--method", "nothing"], "There is no method 'nothing'; take unlearning"),
        ([*MODEL, "--prompt", "a dog", "--top", "0"], "--top must be at least 1"),
        ([*MODEL, "--prompt", "a dog", "--passes", "1"], "--passes must be at least 2"),
        ([*MODEL, "--prompt", "a dog", "--steps", "0"], "--steps must be at least 1"),
        ([*MODEL, "--prompt", "a dog", "--prepare.output", "x"], "what ask itself decides"),
        ([*MODEL, "--prompt", "a dog", "--prepare.size", "big"], "give the side of the pictures"),
        ([*MODEL, "--prompt", "a dog", "--prepare.text_encoder", "x"], "generates with its own text encoder"),
        ([*MODEL, "--prompt", "a dog", "--settings", "other.yaml"], "is no file of settings"),
        ([*MODEL, "--prompt", "a dog", "--settings", "nowhere.yaml"], "can't be read"),
        (["--sample", *MODEL, "--prompt", "a dog"], "leave --pipeline, --images out"),
        (["--sample", "--like", "kohya", "--prompt", "a dog"], "leave --like out"),
        (["--sample", "--guidance", "2", "--prompt", "a dog"], "leave --guidance out"),
    ],
)
def test_whatever_can_not_be_asked_gets_one_sentence(words: list[str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        asked(*words)
    sentence = str(refused.value)
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_several_prompts_and_seeds_have_names_of_their_own() -> None:
    request = asked(*MODEL, "--prompts", "rows.jsonl", "--prompt", "A dog!", "--seed", "1", "2", "--concept", "prompt")
    keys = [question.key for question in request.questions]
    assert len(set(keys)) == len(keys) == 6
    # Those that read alike as words are told apart.
    assert [key.startswith("a-dog-seed-1") for key in keys] == [True, False, True, False, False, False]
    assert "a-cat-seed-2" in keys
    assert request.questions[2].fields == {"artist": "ann"}


def test_settings_stand_over_what_was_decided_and_places_make_no_other_answer(place: Path) -> None:
    request = asked(*MODEL, "--prompt", "a dog", "--settings", "settings.yaml")
    config = config_of_request(request, AskFolder(place / "one"), place / "queries", "adapter")
    assert config["model"]["init_args"]["views"] == {"timesteps": 2}
    assert config["model"]["init_args"]["parameters"] == "adapter"
    moved = config_of_request(request, AskFolder(place / "two"), place / "others", "adapter")
    assert answer_digest(config, None) == answer_digest(moved, None) != answer_digest(config, "DTRAK")


def test_a_folder_is_of_one_model_and_one_set_of_pictures(place: Path) -> None:
    (place / "train" / "a.txt").write_text("a dog")

    def inputs() -> dict[str, Any]:
        return {"images": facts_of(place / "train", ["a.png", "a.txt"], {}), "passes": 5}

    folder = AskFolder(place / "answer")
    folder.refuse_others(inputs())
    folder.claim(inputs())
    (place / "train" / "a.txt").write_text("a cat")
    folder.refuse_others(inputs())  # nothing was made of them yet
    folder.pictures.mkdir()
    with pytest.raises(InputError, match=r"another images \(with another a\.txt\)"):
        folder.refuse_others(inputs())
    (place / "train" / "a.txt").write_text("a dog")
    folder.refuse_others(inputs())
    with pytest.raises(InputError, match="passes 5, and now it is 7"):
        folder.refuse_others(inputs() | {"passes": 7})
    with pytest.raises(InputError, match="holds files that are not of ask"):
        AskFolder(place / "train").refuse_others(inputs())


def test_files_that_did_not_change_are_not_read_again(place: Path) -> None:
    known = {"a.png": [*facts_of(place / "train", ["a.png"], {})["a.png"][:2], "as before"]}
    assert facts_of(place / "train", ["a.png"], known) == known


def test_a_given_picture_stays_as_it_is_and_is_prepared_as_the_training_was(place: Path) -> None:
    turned = Image.new("RGB", (8, 4), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif)
    request = asked(*MODEL, "--query", "turned.jpg", "--prompt", "a dog", "--prepare.caption_dropout", "0.1")
    gallery = Gallery(place / "pictures", {})
    gallery.fill(request.questions, lambda: given_picture)
    gallery.show(request.questions, place / "queries")
    with Image.open(place / "queries" / "pictures" / "turned.png") as picture:
        assert picture.size == (8, 4)
        assert picture.getexif()[0x0112] == 6
    (row,) = map(json.loads, (place / "queries" / "pictures" / "metadata.jsonl").read_text().splitlines())
    assert row == {
        "kind": "given",
        "of": "turned.jpg",
        "prompt": "a dog",
        "captions": ["a dog"],
        "file_name": "turned.png",
    }
    manifest = {
        "pictures": {"height": 64, "width": 64},
        "flips": True,
        "reading": {"choices": {"crop": "bucket", "exif": "keep", "bucket_step": 2, "caption_dropout": 0.1}},
    }
    words = query_words(request, place / "queries", manifest)
    options = dict(zip(words[::2], words[1::2], strict=True))
    for name, value in {"size": "64", "flips": "true", "crop": "bucket", "exif": "keep", "bucket_step": "2"}.items():
        assert options[f"--{name}"] == value
    assert "--caption_dropout" not in options


def test_the_sample_reads_captions_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_unlearn.command_line.ask_sample.find_spec", lambda name: None)
    questions = asked("--sample", "--prompt", "An emoji of a Tiger", "tiger face").questions
    states, said = text_states(questions, SAMPLE / "shards")
    assert states.shape == (2, 1, 10, 384)
    assert said == ["the caption 'tiger'", "the caption 'tiger face'"]
    with pytest.raises(InputError, match=r"such as 'unicorn face'.*sample-data"):
        text_states(asked("--sample", "--prompt", "a unicorn").questions, SAMPLE / "shards")


def test_batches_fit_the_memory_and_what_is_left_is_told(tmp_path: Path) -> None:
    import yaml

    config = yaml.safe_load(Path(write_config(tmp_path / "toy.yaml")).read_text())
    parsed = _parsed(config)
    plan = plan_of(parsed.model, parsed.data)
    assert plan.network is not None
    assert plan.objective is not None
    assert plan.sample is not None
    memory = calls_memory(plan.network, plan.objective, plan.sample, list(plan.layers))
    large = Machine(torch.device("cpu"), 2**40)
    assert batches_that_fit(plan, memory, large) == (4, 4)
    _, backward = memory
    assert backward is not None
    for bytes_there in range(10_000, 10_000_000, 500_000):
        fit = batches_that_fit(plan, memory, Machine(torch.device("cpu"), bytes_there))
        assert set(fit) <= {1, 2, 4}
    assert batches_that_fit(plan, memory, Machine(torch.device("cpu"), 10_000)) == (1, 1)
    lines = forecast(plan, 5, "unlearning", 0, memory, tmp_path, large)
    assert [line.split(":")[0].strip() for line in lines[:-1]] == ["unlearning", "scoring"]
    assert "of memory" in lines[-1]
    assert "some seconds in all" in lines[-1]
    assert "gradients" in "".join(forecast(plan, 5, "DTRAK", 0, memory, tmp_path, large))
    small = Machine(torch.device("cpu"), 10_000)
    assert any("more memory than there is" in line for line in forecast(plan, 5, None, 0, memory, tmp_path, small))


def test_times_and_passes_in_words() -> None:
    assert [about(seconds) for seconds in (3, 50, 190, 9000)] == [
        "some seconds",
        "about 1 minute",
        "about 3 minutes",
        "about 2.5 hours",
    ]
    assert [passes_for(samples) for samples in (4, 500, 10_000)] == [20, 10, 5]
