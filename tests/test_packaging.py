"""What is installed: an editable installation finds every folder, another one only those that pyproject.toml names."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_room_is_named_among_the_packages() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("lightning_unlearn/**/__init__.py")}
    assert rooms <= set(settings["packages"])
    for package in settings["packages"]:
        assert package in rooms or (ROOT / settings["package-dir"][package]).is_dir()
