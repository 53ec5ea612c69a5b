"""What ``from lightning_unlearn import …`` gives, and that nothing heavy is imported for it before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_unlearn

SOURCE = Path(lightning_unlearn.__file__)


@pytest.mark.parametrize("name", [name for name in lightning_unlearn.__all__ if name != "__version__"])
def test_each_name_is_the_class_or_function_of_its_name(name: str) -> None:
    assert getattr(lightning_unlearn, name).__name__ == name
    assert name in dir(lightning_unlearn)


def test_what_mypy_sees_is_what_is_there() -> None:
    seen = {
        (alias.asname, str(node.module))
        for node in ast.walk(ast.parse(SOURCE.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lightning_unlearn.")
        for alias in node.names
    }
    assert seen == {(name, f"lightning_unlearn.{place}") for name, place in lightning_unlearn._PLACES.items()}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unlearner'"):
        lightning_unlearn.Unlearner  # noqa: B018


def test_the_package_alone_imports_nothing_heavy() -> None:
    script = "import sys, lightning_unlearn; print({'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_class_is_found_by_its_public_path_in_a_config() -> None:
    from pydoc import locate

    from lightning_unlearn.unlearning.module import UnlearningModule

    assert locate("lightning_unlearn.UnlearningModule") is UnlearningModule
