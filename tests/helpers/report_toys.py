"""Tables, samples and pages of reports, taken apart, and the browser that looks at them."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.scores.table import ScoreTable

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH; apt-get install chromium"
)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000""".split()  # noqa: SIM905


def encoded_picture(width: int, height: int, kind: str = "png", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def sample_of(key: str, *captions: str, latent: Any = None, picture: bytes | None = None, **metadata: Any) -> Sample:
    latent = torch.zeros(3, 4, 4) if latent is None else latent
    texts = list(captions or [f"caption of {key}"])
    return Sample(key, latent, {"text": torch.zeros(len(texts), 1, 1)}, {"captions": texts, **metadata}, None, picture)


def table_of(
    scores: Any, keys: Sequence[str] | None = None, queries: Sequence[str] | None = None, **run: Any
) -> ScoreTable:
    scores = np.asarray(scores, np.float32)
    scores = scores[:, None] if scores.ndim == 1 else scores
    keys = [f"image-{row:04d}" for row in range(len(scores))] if keys is None else list(keys)
    queries = [f"query-{column}" for column in range(scores.shape[1])] if queries is None else list(queries)
    content = {
        "fingerprints": {"weights": "0123456789abcdef"},
        "rule": "difference",
        "views": {"timesteps": 8, "captions": None},
        "unlearning": {"strategy": "newton", "objective": {"class": "Toy", "scheduler": {"beta_start": 0.0001}}},
        "precision": "32-true",
        "targets": {
            key: {
                "captions": [f"prompt of {key}"],
                "loss_before": 0.02,
                "loss_after": 0.022,
                "rise": 0.1,
                "penalty": 3.2e-5,
            }
            for key in queries
        },
        "shards": {"shard-a": {}},
        "versions": {"torch": "2.13.0"},
        "world_size": 2,
        "seconds": 75.0,
        **run,
    }
    base = np.full(len(keys), 0.5, np.float32)
    return ScoreTable(keys, ["shard-a"] * len(keys), queries, scores, base, content)


class Page(HTMLParser):
    """Tags with their attributes, the text of each element with a class, and the rest of the text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] != "script" if self.tags else True:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def chromium(folder: Path, page: Path, *flags: str) -> str:
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        *flags,
        page.as_uri(),
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
