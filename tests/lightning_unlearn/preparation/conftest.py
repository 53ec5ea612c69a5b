import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from prepare_toys import tiny_text_encoder, tiny_tokenizer


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("prepare went to the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_text_encoder().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
