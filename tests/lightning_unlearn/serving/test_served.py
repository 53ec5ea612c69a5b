"""The page as people use it: one server for all tests, of a part of the sample data, asked by Chromium and by HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
from gradio_client import Client, handle_file
from PIL import Image
from playwright.sync_api import Browser, Page, Request, sync_playwright

from lightning_unlearn.command_line.ask_sample import ENCODER
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.serving import server
from lightning_unlearn.serving.desk import Desk

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH; apt-get install chromium"
)
ENCODER_HERE = find_spec(ENCODER) is not None
DESK, PHONE = (1280, 900), (360, 780)
HERE = ("127.0.0.1", "::1", "localhost")
BROKEN = b"\x89PNG\r\n\x1a\nand no more"
NO_SIDEWAYS = "document.documentElement.scrollWidth <= innerWidth"
# What is cut off although nobody meant to cut it: captions of several lines are, and what is hidden for readers' ears.
CLIPPED = """[...document.querySelectorAll("[class^=lu-] *")].filter(one => one.scrollWidth > one.clientWidth + 1
  && !["inline", "contents"].includes(getComputedStyle(one).display) && one.clientWidth > 1)
  .map(one => one.className)"""


class Served:
    """The server, as tests see it."""

    def __init__(self, desk: Desk, address: str, elsewhere: list[Any]) -> None:
        self.desk, self.address, self.elsewhere = desk, address, elsewhere

    def get(self, path: str, host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
        request = urllib.request.Request(self.address + path, headers={"Host": host} if host else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)


def _commands(folder: Path, patch: pytest.MonkeyPatch) -> Desk:
    """The desk that the commands make of one shard of the sample data, looked at twice a picture."""
    kept: list[Desk] = []
    patch.setattr(server, "run", lambda desk, host, port, say: kept.append(desk))
    import lightning_unlearn.datamodules

    shard = Path(str(lightning_unlearn.datamodules.__file__)).with_name("sample") / "shards" / "emoji-000000.tar"
    index = str(folder / "index")
    config = ["--config", "sample.yaml", "--data.init_args.shards", str(shard)]
    config += ["--model.init_args.views.timesteps", "2", "--trainer.accelerator", "cpu"]
    assert main(["index", *config, "--trainer.enable_progress_bar", "false", "--output", index]) == 0
    assert main(["serve", *config, "--index", index]) == 0
    return kept[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    import uvicorn

    folder, elsewhere, connect = tmp_path_factory.mktemp("served"), list[Any](), socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in HERE:
            elsewhere.append(address)
            raise OSError("a test has no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setattr("lightning_unlearn.preparation.asked.STEPS", 8)
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "dropped"))
        desk = _commands(folder, patch)
        listening = server.listening("127.0.0.1", 0)
        running = uvicorn.Server(uvicorn.Config(server.application(desk), log_level="error", ws="none"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.05)
        yield Served(desk, f"http://127.0.0.1:{listening.getsockname()[1]}", elsewhere)
        running.should_exit = running.force_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def client(served: Served) -> Client:
    return Client(served.address, verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@contextlib.contextmanager
def _opened(browser: Browser, served: Served, size: tuple[int, int]) -> Iterator[tuple[Page, list[str]]]:
    """The page in a window of a size, and what it asked for elsewhere."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
    context.set_default_timeout(60_000)
    page, elsewhere = context.new_page(), list[str]()

    def seen(request: Request) -> None:
        if not request.url.startswith((f"{served.address}/", "data:", "blob:")):
            elsewhere.append(request.url)

    page.on("request", seen)
    page.goto(served.address)
    page.get_by_label("Prompt").wait_for()
    yield page, elsewhere
    context.close()


def _caption(served: Served, row: int = 0) -> str:
    return served.desk.captions.captions[row][0]


# ---------------------------------------------------------------------- in a browser


@needs_browser
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_prompt_is_typed_and_its_sources_are_seen(browser: Browser, served: Served, size: tuple[int, int]) -> None:
    caption = _caption(served)
    with _opened(browser, served, size) as (page, elsewhere):
        page.get_by_label("Prompt").fill(caption)
        page.locator("#ask").click()
        answer = page.locator(".lu-answer")
        answer.wait_for()
        assert answer.locator("h2").inner_text() == caption
        assert answer.locator(".lu-sure").inner_text().startswith("How sure:")
        cards = answer.locator(".lu-card")
        assert cards.count() == 12
        # The training picture of that caption is among 136 the first.
        assert cards.first.locator(".lu-caption").inner_text() == caption
        assert answer.locator("img").evaluate_all("all => all.every(one => one.naturalWidth && one.clientWidth)")
        assert page.locator(".lu-groups tbody tr").count() >= 2
        assert page.evaluate(NO_SIDEWAYS)
        assert page.evaluate(CLIPPED) == []

        cards.first.click()
        page.locator(".lu-picture h2", has_text=caption).wait_for()
        helped = page.locator(".lu-helped .lu-card")
        assert helped.locator(".lu-rank").inner_text().split()[-1] == "1"
        assert page.evaluate(NO_SIDEWAYS)
        helped.click()
        answer.wait_for()

        page.get_by_role("tab", name="Search").click()
        page.get_by_label("Words of a caption").fill(caption)
        page.get_by_label("Words of a caption").press("Enter")
        page.locator(".lu-found .lu-card").first.click()
        page.get_by_role("button", name="Ask with this caption").click()
        assert page.get_by_label("Prompt").input_value() == caption
        assert page.evaluate(NO_SIDEWAYS)
    assert elsewhere == []
    assert served.elsewhere == []


@needs_browser
def test_a_picture_is_dropped_and_one_that_is_broken_gets_a_sentence(
    browser: Browser, served: Served, tmp_path: Path
) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (90, 60), "orange").save(stream, "jpeg")
    with _opened(browser, served, DESK) as (page, elsewhere):
        page.get_by_label("Prompt").fill(_caption(served))
        drop = page.locator("#dropped input[type=file]")
        drop.set_input_files({"name": "broken.png", "mimeType": "image/png", "buffer": BROKEN})
        page.locator("#dropped img").wait_for(state="attached")
        page.locator("#ask").click()
        said = page.locator("#said .lu-notice")
        said.wait_for()
        assert said.inner_text() == "This file can't be read as a picture; give a whole one (PNG, JPEG, WEBP)."
        page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
        drop.set_input_files({"name": "orange.jpg", "mimeType": "image/jpeg", "buffer": stream.getvalue()})
        page.locator("#dropped img").wait_for(state="attached")
        page.locator("#ask").click()
        page.locator(".lu-answer").wait_for()
        assert page.locator("#said .lu-notice").count() == 0
        with page.expect_download() as taken:
            page.get_by_role("link", name="Picture to share").click()
        taken.value.save_as(tmp_path / "share.png")
        with Image.open(tmp_path / "share.png") as shared:
            assert shared.width == 1600
            # Its left half shows the picture that was dropped.
            assert np.abs(np.asarray(shared)[200, 200].astype(int) - (255, 165, 0)).max() < 12
    assert elsewhere == []


@needs_browser
def test_a_browser_would_not_even_ask_elsewhere(browser: Browser, served: Served) -> None:
    with _opened(browser, served, DESK) as (page, _):
        for address in ("https://fonts.googleapis.com/css2", "http://127.0.0.1:9/"):
            refused = page.evaluate(
                """address => new Promise(done => {
                  addEventListener("securitypolicyviolation", event => done(event.blockedURI), {once: true});
                  const late = () => setTimeout(() => done("only unreachable"), 500);
                  fetch(address, {mode: "no-cors"}).then(() => done("went"), late);
                })""",
                address,
            )
            assert refused == address


# ---------------------------------------------------------------------- by other ways


def test_twenty_ask_at_once_and_each_gets_the_own_answer(client: Client, served: Served) -> None:
    prompts = [_caption(served, row) for row in range(20)]
    jobs = [client.submit(prompt, 0, None, None, api_name="/ask") for prompt in prompts]
    for prompt, job in zip(prompts, jobs, strict=True):
        said, answer, *_ = job.result(timeout=300)
        assert said == ""
        assert re.search(r"<h2[^>]*>(.*)</h2>", answer)[1] == prompt  # type: ignore[index]
    # Once more, alone: the same numbers, whatever was asked beside it.
    again = client.predict(prompts[7], 0, None, None, api_name="/ask")[1]
    scores = [re.findall(r'class="lu-score">.*?</span>([^<]*)<', page) for page in (again, jobs[7].result()[1])]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 12
    assert served.elsewhere == []


@pytest.mark.parametrize(
    ("prompt", "seed", "sentence"),
    [
        ("x " * 50_000, 0, "This prompt has 100,000 letters, and no more than 4,000 are taken; shorten it."),
        ("  \n", 0, "Nothing is asked yet: write a prompt."),
        pytest.param(
            "<b>no caption</b>",
            0,
            "only captions of its training are understood",
            marks=pytest.mark.skipif(ENCODER_HERE, reason="with its encoder the sample model understands all prompts"),
        ),
        ("anything", -1, "A seed is a whole number from 0 on"),
    ],
)
def test_what_can_not_be_asked_gets_a_sentence(client: Client, prompt: str, seed: int, sentence: str) -> None:
    said, *_ = client.predict(prompt, seed, None, None, api_name="/ask")
    assert said.startswith('<p class="lu-notice" role="alert">')
    assert sentence in said
    assert "<b>" not in said
    assert "Traceback" not in said


def test_files_of_this_machine_and_addresses_are_not_read(client: Client, served: Served, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(BROKEN)
    said, *_ = client.predict(_caption(served), 0, handle_file(str(tmp_path / "broken.png")), None, api_name="/ask")
    assert "This file can&#39;t be read as a picture" in said
    # By HTTP alone: a client would upload what lies on its own machine.
    for path in ("http://192.0.2.1/picture.png", "/etc/hostname"):
        given = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
        place = f"{served.address}/gradio_api/call/ask"
        body = json.dumps({"data": [_caption(served), 0, given, None]}).encode()
        request = urllib.request.Request(place, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            event = json.load(reply)["event_id"]
        with urllib.request.urlopen(f"{place}/{event}", timeout=60) as reply:
            said = reply.read().decode()
        assert said.startswith("event: error")
        assert "Traceback" not in said
    assert served.elsewhere == []


def test_the_table_and_the_picture_are_taken_along(client: Client, served: Served) -> None:
    caption = _caption(served, 3)
    answer = client.predict(caption, 1, None, None, api_name="/ask")[1]
    links = re.findall(r'href="(answers/[^"]*)"', answer)
    assert [Path(link).name for link in links] == ["sources.png", "scores.csv", "scores.parquet"]
    picture, table, columns = (served.get(f"/{link}")[1] for link in links)
    rows = pyarrow.csv.read_csv(io.BytesIO(table))
    whole = pyarrow.parquet.read_table(io.BytesIO(columns))
    for found in (rows, whole):
        assert found.column_names == ["rank", "key", "score", "part:das", "part:d_trak", "caption"]
        assert found.num_rows == 136
        assert found["caption"][0].as_py() == caption
    scores = np.asarray(whole["score"])
    assert (np.diff(scores) <= 0).all()
    (token,) = re.findall(r"answers/([^/]*)/scores.csv", answer)
    asked = served.desk.asked(token)
    assert asked is not None
    np.testing.assert_array_equal(np.sort(asked.answer.scores), np.sort(scores))
    about = {name.decode(): value.decode() for name, value in whole.schema.metadata.items()}
    assert about["prompt"] == caption
    assert about["meaning"] == served.desk.provenance.meaning
    assert len(about["model"]) == len(about["data"]) == 32
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
    status, said, _ = served.get("/answers/nobody/scores.csv")
    assert (status, said) == (404, b"This answer is not kept any more; ask again.")


def test_the_server_answers_to_its_own_names_alone_and_keeps_browsers_at_home(served: Served) -> None:
    status, page, headers = served.get("/")
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert b"googleapis" not in page
    assert served.get("/", host="evil.example")[0] == 400
