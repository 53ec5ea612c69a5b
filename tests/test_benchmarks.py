"""The scripts of ``benchmarks/``: what they import of one another leads round in no circle."""

from __future__ import annotations

import ast
import importlib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SCRIPTS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The scripts that one imports, within its functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    named = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    named |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return named & SCRIPTS.keys()


def test_no_script_imports_in_a_circle() -> None:
    order = [*TopologicalSorter({name: imports_of(path) for name, path in SCRIPTS.items()}).static_order()]
    assert order.index("benches") < order.index("judged") < order.index("bench")


def test_reading_a_packed_study_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever judges a bench leaves its committed files as they are."""
    monkeypatch.syspath_prepend(str(SCRIPTS["packed"].parent))
    benches, packed = (importlib.import_module(name) for name in ("benches", "packed"))
    bench = benches.Bench("digits")
    path = bench.folder / "study" / "study.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert packed.open_study(bench).packed
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
