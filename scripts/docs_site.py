"""What the documentation site takes from elsewhere in the repository; hooks that mkdocs calls while it builds.

- the root folders, laid out as the package that they are installed as, for the reference of classes and functions;
- the options of every command, from its own parser;
- the families of networks;
- the results of the benches, their pictures, and CONTRIBUTING.md, as they stand.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from pathlib import Path
from typing import Any

# mkdocs looks for modules beside its hooks while it loads them.
from command_options import commands_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from results_table import results_table

from lightning_unlearn.diffusion.families import FAMILIES

ROOT = Path(__file__).parent.parent

# Pages of the site that are files of the repository.
PAGES = {
    "results/benches.md": "benchmarks/RESULTS.md",
    "results/second_look.md": "benchmarks/INDEX.md",
    "results/measuring.md": "benchmarks/README.md",
    "contribute.md": "CONTRIBUTING.md",
}
# How these call each other, and how their pages do.
LINKS = {"README.md": "measuring.md", "RESULTS.md": "benches.md"}
COMMANDS_PAGE = "reference/commands.md"
RESULTS_TABLE = "<!-- results table -->"
FAMILIES_TABLE = "<!-- families table -->"

_staged: list[tempfile.TemporaryDirectory[str]] = []


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show the source reader the package as it is installed.

    Args:
        config: The site's.

    Returns:
        It, with the folder where the package lies.
    """
    _staged.append(tempfile.TemporaryDirectory(prefix="docs-package-"))
    package = Path(_staged[-1].name) / "lightning_unlearn"
    package.mkdir()
    for inside in (ROOT / "lightning_unlearn").iterdir():
        (package / inside.name).symlink_to(inside)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
    for name, folder in folders.items():
        if "." in name:
            (package / name.partition(".")[2]).symlink_to(ROOT / folder)
    handlers: Any = config.plugins["mkdocstrings"].config
    handlers["handlers"]["python"]["paths"] = [_staged[-1].name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add pictures that lie elsewhere.

    Args:
        files: Those of ``docs/``.
        config: The site's.

    Returns:
        All files of the site.
    """
    for picture in sorted((ROOT / "benchmarks").glob("*/*.png")):
        uri = f"results/{picture.parent.name}/{picture.name}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is made, or lies elsewhere in the repository, where pages call each other by their names here.

    In ``docs/`` such a page only says so, for whoever reads the Markdown as it stands.

    Args:
        markdown: The page's.
        page: The page.
        config: The site's.
        files: All files.

    Returns:
        The page's Markdown.
    """
    if page.file.src_uri == COMMANDS_PAGE:
        return commands_page()
    if page.file.src_uri in PAGES:
        text = (ROOT / PAGES[page.file.src_uri]).read_text("utf-8")
        return re.sub(r"\]\(([A-Z]+\.md)\)", lambda found: f"]({LINKS.get(found[1], found[1])})", text)
    if RESULTS_TABLE in markdown:
        markdown = markdown.replace(RESULTS_TABLE, results_table())
    if FAMILIES_TABLE in markdown:
        markdown = markdown.replace(FAMILIES_TABLE, families_table())
    return markdown


def families_table() -> str:
    """What each family of networks is given, and its loss.

    Returns:
        A table in Markdown.
    """
    lines = ["| family | network | conditions | loss |", "|---|---|---|---|"]
    for family in FAMILIES:
        given = ", ".join(f"`{name}`{' (optional)' if one.optional else ''}" for name, one in family.conditions.items())
        loss = "a noise schedule's" if family.flow is None else "flow matching"
        classes = ", ".join(f"`{name}`" for name in family.class_names)
        lines.append(f"| {family.title} | {classes} | {given} | {loss} |")
    return "\n".join(lines)


def on_post_build(config: MkDocsConfig) -> None:
    """Take the package's place away again.

    Args:
        config: The site's.
    """
    while _staged:
        _staged.pop().cleanup()
