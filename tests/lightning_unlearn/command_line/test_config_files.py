"""YAML files that are none: one sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_toys import toy_config, toy_folder

from lightning_unlearn.command_line.cli import main

GOOD = yaml.safe_dump(toy_config(), sort_keys=False)
FILES = {
    "binary": (bytes(range(256)) * 4, "A config must be text in UTF-8, but byte 128 of one is not"),
    "utf-16": (GOOD.encode("utf-16"), "A config must be text in UTF-8, but byte 0 of one is not"),
    "latin-1": ("a: ä".encode("latin-1"), "A config must be text in UTF-8"),
    "zeros": (bytes(100), "control characters are not allowed"),
    "a list 2,000 deep": (b"a: " + b"[" * 2000 + b"]" * 2000, "A config is nested too deeply"),
    "keys 2,000 deep": ("\n".join(" " * depth + "a:" for depth in range(2000)).encode(), "A config is nested too"),
    "nothing": (b"", "Unexpected config"),
    "an interpolation without an end": (b"seed_everything: ${", "no viable alternative"),
    "code": (b'seed_everything: !!python/object/apply:os.system ["true"]', "could not determine a constructor"),
    "a negative seed": (GOOD.replace("seed_everything: 0", "seed_everything: -5").encode(), "but is -5; choose"),
    "a large seed": (GOOD.replace("seed_everything: 0", f"seed_everything: {2**32}").encode(), "from 0 to 4294967295"),
}


OF_OTHERS = [("fit", "a negative seed"), ("fit", "utf-16"), ("evaluate", "a large seed"), ("race", "a list 2,000 deep")]


@pytest.mark.parametrize(("command", "name"), [*(("attribute", name) for name in FILES), *OF_OTHERS])
def test_config_that_is_none_is_one_sentence(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOYS", str(toy_folder()))
    monkeypatch.chdir(tmp_path)
    content, says = FILES[name]
    (tmp_path / "config.yaml").write_bytes(content)
    capsys.readouterr()
    try:
        status: object = main([command, "--config", "config.yaml"])
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err.strip()
    assert status in (1, 2)
    assert says in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]
