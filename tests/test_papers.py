"""The pages of the papers' two experiments: each of their commands runs, on small arrays of the published layouts."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_toys import run
from PIL import Image
from prepare_toys import manifest, read
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser
from tiny_pipelines import parts

from lightning_unlearn.diffusion.adapters import load_adapter
from lightning_unlearn.errors import InputError
from lightning_unlearn.preparation import prepare
from lightning_unlearn.scores.files import read_scores

DOCS = Path(__file__).parent.parent / "docs"
MODEL = Path("data/abc/models/imagenet/n01440764_0000")
PICTURES, LAION, QUERIES = 4, 5, 2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def blocks(page: str, language: str) -> list[str]:
    sybil = Sybil([CodeBlockParser(language, lambda example: None)])
    return [str(example.parsed) for example in sybil.parse(DOCS / page).examples()]


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, in order."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def follow(page: str, smaller: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Run all that a page tells, in the folder that this process is in.

    Args:
        page: Its name.
        smaller: Command to the settings that make it small, which a second config gives.
        monkeypatch: Sets variables.

    Returns:
        Name of a Python file to the names in it after it ran.
    """
    scripts = {}
    for language, suffix in (("python", "py"), ("yaml", "yaml")):
        for block in blocks(page, language):
            if name := re.match(rf"# (\w+\.{suffix})\n", block):
                Path(name[1]).write_text(block)
    for command, settings in smaller.items():
        Path(f"smaller_{command}.yaml").write_text(yaml.safe_dump(settings))
    for words in commands(page):
        while assigned := re.fullmatch(r"([A-Z_]+)=(.*)", words[0]):
            monkeypatch.setenv(assigned[1], assigned[2])
            words = words[1:]
        if words[0] == "python":
            names: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(Path(words[1]).read_text(), words[1], "exec"), names)
            scripts[words[1]] = names
        else:
            assert words[0] == "lightning-unlearn"
            more = ("--config", f"smaller_{words[1]}.yaml") if words[1] in smaller else ()
            # A strategy of the page's own takes one step.
            steps = words[1] == "attribute" and "--model.init_args.strategy" not in words
            run(*words[1:], *more, *(("--model.init_args.strategy.init_args.steps", "1") if steps else ()))
    return scripts


def picture(path: Path, number: int, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 4, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def with_flips(seed: int, count: int, *shape: int) -> np.ndarray[Any, Any]:
    """``(2 count, *shape)``, of which the second half are unlike the first."""
    return np.random.default_rng(seed).standard_normal((2 * count, *shape)).astype(np.float32)


# ---------------------------------------------------------------------- MSCOCO


SMALL_NETWORK = {
    "layers_per_block": 1,
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


@pytest.fixture
def mscoco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the authors' script leaves in data/mscoco."""
    from diffusers import UNet2DConditionModel

    monkeypatch.chdir(tmp_path)
    folder = Path("data/mscoco")
    generator = np.random.default_rng(3)
    # The order of the json is not that of the names.
    ids = [391895, 522418, 184613, 57870]
    for identity in ids:
        picture(folder / "train2017" / f"{identity:012d}.jpg", identity)
    (folder / "annotations").mkdir()
    annotations = [
        {"image_id": identity, "caption": f"caption {number} of {identity}"}
        for number in range(6)
        for identity in sorted(ids)
    ]
    images = [{"id": identity, "file_name": f"{identity:012d}.jpg"} for identity in ids]
    content = json.dumps({"images": images, "annotations": annotations})
    (folder / "annotations" / "captions_train2017.json").write_text(content)
    np.save(folder / "coco17_train_latents.npy", with_flips(0, PICTURES, 4, 16, 16))
    text = generator.standard_normal((PICTURES, 5, 77, 1024)).astype(np.float16)
    np.save(folder / "coco17_train_text_embeddings.npy", text)
    for number in range(QUERIES):
        picture(folder / "sample" / f"{number}.png", number)
    (folder / "sample_caption.txt").write_text("a cat\na dog\n")
    np.save(folder / "coco17_sample_latents.npy", with_flips(1, QUERIES, 4, 16, 16)[:QUERIES])
    np.save(folder / "coco17_sample_text_embeddings.npy", text[:QUERIES, :1].astype(np.float32))
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=1024, attention_head_dim=8, **SMALL_NETWORK
    )
    torch.save(network.state_dict(), folder / "model.bin")
    return folder


def test_the_mscoco_page_runs_from_the_published_files_to_the_table(
    mscoco: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False}
    network = {"init_args": SMALL_NETWORK}
    small = {
        "model": {"init_args": {"network": network, "rise_draws": 2, "views": {"timesteps": 1}}},
        "data": {"init_args": {"draws": 2, "draw_batch_size": 2}},
        "trainer": quiet,
    }
    training = {
        "model": {"init_args": {"network": network}},
        "data": {"init_args": {"batch_size": 2, "num_workers": 0}},
        "trainer": {**quiet, "max_epochs": 1},
        "draws": 10,
        "design": {"k": [2], "removal_queries": 1, "random_repeats": 1, "seeds": 2},
    }
    # `fisher` has one config, like `attribute`, and reads no queries.
    follow("mscoco.md", {"check": small, "fisher": small, "attribute": small, "evaluate": training}, monkeypatch)
    samples = read(mscoco / "shards")
    latents = np.load(mscoco / "coco17_train_latents.npy")
    text = np.load(mscoco / "coco17_train_text_embeddings.npy")
    sample = samples["train2017-000000184613"]  # the third of the json
    assert sample.captions == [f"caption {number} of 184613" for number in range(5)]
    assert np.array_equal(sample.latent, latents[2].astype(np.float16))
    assert sample.latent_flip is not None
    assert np.array_equal(sample.latent_flip, latents[2 + PICTURES].astype(np.float16))
    assert np.array_equal(sample.text, text[2])
    assert sample.picture is not None
    for name in ("attribution", "plus", "cheap"):
        table = read_scores(name)
        assert sorted(table.keys) == sorted(samples)
        assert table.queries == ["sample-0", "sample-1"]
        assert np.isfinite(table.scores).all()
        assert (Path(name) / "report.html").is_file()
    assert read_scores("attribution").run["rule"] == "difference"
    results = json.loads(Path("study/results.json").read_text())
    assert {"unlearning", "unlearning_plus"} <= set(json.dumps(results).replace('"', " ").split())
    assert "scoring" in capsys.readouterr().out


def test_the_config_has_the_published_network(mscoco: Path) -> None:
    from diffusers import UNet2DConditionModel

    settings = yaml.safe_load((DOCS.parent / "configs" / "mscoco.yaml").read_text())["model"]["init_args"]["network"]
    with torch.device("meta"):
        network = UNet2DConditionModel(**settings["init_args"])
    attention = [name for name, _ in network.named_parameters() if re.search(r"attn2\.to_[kv]\.weight", name)]
    assert len(attention) == 2 * (3 * 2 + 1 + 3 * 3)
    for name in attention:
        assert network.get_parameter(name).shape[1] == 1024


# ---------------------------------------------------------------------- customised models


@pytest.fixture
def abc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stable Diffusion 1.4 as a tiny pipeline, and what the authors' script leaves in data/abc."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    monkeypatch.chdir(tmp_path)
    network = parts.seeded(
        lambda: UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=768,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=parts.kl_autoencoder(4),
        text_encoder=parts.clip_encoder(768, projected=False, length=77),
        tokenizer=parts.clip_tokenizer(77),
        unet=network,
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    parts.saved(pipeline, Path("stable-diffusion-v1-4"))
    folder = Path("data/abc")
    MODEL.mkdir(parents=True)
    weights = {
        name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
        for name, value in network.state_dict().items()
        if re.search(r"attn2\.to_[kv]\.weight", name)
    }
    torch.save(weights, MODEL / "pytorch_custom_diffusion_weights.pt")
    torch.save({"<new1>": torch.ones(768)}, MODEL / "<new1>.bin")
    for number in range(LAION):
        picture(folder / "laion_subset" / "images" / f"{number:05d}.jpg", number)
    (folder / "laion_subset" / "captions.txt").write_text("".join(f"picture {n}\n" for n in range(LAION - 1)) + "\n")
    np.save(folder / "laion_latents.npy", with_flips(0, LAION, 4, 64, 64))
    text = np.random.default_rng(1).standard_normal((LAION, 1, 77, 768)).astype(np.float32)
    np.save(folder / "laion_text_embeddings.npy", text)
    paths = [f"dataset/exemplar/imagenet/fish/{number}.jpg" for number in range(2)]
    for number, path in enumerate(paths):
        picture(folder / path.removeprefix("dataset/"), 50 + number, 140)
    (folder / "json").mkdir()
    (folder / "json" / "test_unobserved_imagenet.json").write_text(json.dumps([{"exemplar": paths}]))
    tasks = []
    for number in range(QUERIES):
        name = f"synth/imagenet/gpt/n01440764_0000/samples/{number:05d}.png"
        picture(folder / name, 80 + number, 140)
        tasks.append(
            {
                "synth_image_path": name,
                "prompt": f"a <new1> fish in {'ab'[number]}",
                "test_case": "test_unobserved_imagenet",
                "test_case_ind": 0,
                "model_path": "models/imagenet/n01440764_0000",
                "train_prompt": "<new1> fish",
            }
        )
    Path("tasks").mkdir()
    Path("tasks/all_tasks.json").write_text(json.dumps(tasks))
    return folder


def test_the_page_of_the_customised_models_runs_from_the_published_files_to_the_table(
    abc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        "model": {"init_args": {"rise_draws": 2, "views": {"timesteps": 1}}},
        "data": {"init_args": {"draws": 2, "draw_batch_size": 2}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    names = follow("custom_diffusion.md", dict.fromkeys(("check", "fisher", "attribute"), small), monkeypatch)
    latents = np.load(abc / "laion_latents.npy")
    laion, exemplars = read(abc / "laion_shards"), read(MODEL / "exemplars")
    last = laion[f"laion-{LAION - 1}"]
    assert last.captions == [""]
    assert last.latent_flip is not None
    assert np.array_equal(last.latent_flip, latents[-1].astype(np.float16))
    assert [sample.captions for sample in exemplars.values()] == [["<new1> fish"]] * 2
    assert all(sample.latent_flip is not None for sample in exemplars.values())
    assert manifest(MODEL / "queries")
    # The new word is one token, with the vector that was learned, so the same caption without it has other states.
    for name in ("attribution", "ours"):
        table = read_scores(MODEL / name)
        assert sorted(table.keys) == sorted([*laion, *exemplars])
        assert table.queries == ["query-0", "query-1"]
        assert np.isfinite(table.scores).all()
    found = names["retrieval.py"]["retrieval"]([MODEL / "attribution"])
    assert found["recall@10"] == 1.0  # there are seven candidates
    assert 0 < found["mean_average_precision"] <= 1
    assert str(found) in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("name", ["pytorch_custom_diffusion_weights.pt", "renamed.bin"])
def test_weights_of_standard_names_take_the_place_of_the_networks(tmp_path: Path, prefix: str, name: str) -> None:
    from toys import tiny_unet

    network: Any = tiny_unet()
    weights = {key: value + 1 for key, value in network.state_dict().items() if re.search(r"attn2\.to_[kv]", key)}
    assert weights
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / name)
    others = {key: value.clone() for key, value in network.state_dict().items() if key not in weights}
    load_adapter(network, str(tmp_path / name))
    for key, value in {**weights, **others}.items():
        assert torch.equal(network.state_dict()[key], value)


def test_a_file_of_both_flips_has_two_halves(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((3, 4, 8, 8), np.float32))
    np.save(tmp_path / "text.npy", np.zeros((1, 1, 4, 6), np.float32))
    (tmp_path / "captions.txt").write_text("a\n")
    link = tmp_path / "link.npy"
    os.symlink(tmp_path / "latents.npy", link)
    with pytest.raises(InputError, match="its 3 rows are not twice as many"):
        prepare(
            str(tmp_path / "shards"),
            latents=str(tmp_path / "latents.npy"),
            latents_flip=str(link),
            text=str(tmp_path / "text.npy"),
            captions=str(tmp_path / "captions.txt"),
        )
