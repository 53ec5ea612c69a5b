"""Every block of code in README and docs does what it says, and every link leads somewhere.

Python runs on toy data, YAML is taken by the parser of the command it is for, and each command in a shell block is
parsed with all of its options.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from command_toys import run, toy_folder, write_config
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser
from toys import DIM, LATENT, TOKENS, tiny_unet

from lightning_unlearn import DenoisingObjective, DiffusionModule, TrainingDataModule
from lightning_unlearn.command_line.cli import main
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import FAMILIES, Family

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "yaml", "bash", "bibtex", "text")
# Runs for a minute: tests/lightning_unlearn/test_python_api.py runs it and looks at what comes out.
RUN_ELSEWHERE = 'UnlearningModule("pipeline"'
QUIET = ("--trainer.enable_progress_bar", "false")


def blocks(language: str) -> list[Any]:
    """The blocks of a language, named by page and line."""
    sybil = Sybil([CodeBlockParser(language, lambda example: None)], pattern="*.md")
    found: list[tuple[Path, Example]] = [(page, example) for page in PAGES for example in sybil.parse(page).examples()]
    return [pytest.param(str(example.parsed), id=f"{page.relative_to(ROOT)}:{example.line}") for page, example in found]


def named(language: str, suffix: str) -> dict[str, str]:
    """Blocks whose first line is a comment with the name of a file, by that name."""
    found = {}
    for block in blocks(language):
        (text,) = block.values
        if name := re.match(rf"# (\w+\.{suffix})\n", text):
            found[name[1]] = text
    return found


class YourModule(DiffusionModule):
    """A LightningModule that calls its network ``unet``."""

    def __init__(self) -> None:
        super().__init__(tiny_unet(), DenoisingObjective())
        self.unet = self.network


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of toys, with its deviations; beside it an index of them."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "toy.yaml")
    step = ("--model.init_args.strategy", "Newton", "--model.init_args.strategy.init_args.target_increase", "0.1")
    run("attribute", "--config", config, "--output", folder / "run", "--keep_deviations", "true", *step, *QUIET)
    run("index", "--config", config, "--output", folder / "index", *QUIET)
    return folder / "run"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of a user who has followed the pages: configs, data, and modules of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TOYS", str(toy_folder()))
    for folder in ("configs", "datamodules", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for name, text in {**named("yaml", "yaml"), **named("python", "py")}.items():
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "configs" / "train_sample.yaml", tmp_path / "train.yaml")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "pictures" / "a.txt").write_text("a caption\n")
    sys.modules.pop("your_package", None)
    importlib.invalidate_caches()
    return tmp_path


def printed(*arguments: str) -> None:
    """Let a command parse its options, and say nothing else."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--print_config"])
    assert ended.value.code == 0, arguments


def test_every_block_says_in_which_language_it_is() -> None:
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.MULTILINE)
        assert not [word for word in fences[::2] if word not in LANGUAGES], page
        assert not any(fences[1::2]), page


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text: str, place: Path, finished: Path) -> None:
    code = compile(text, "block", "exec")
    if RUN_ELSEWHERE in text:
        return
    (place / "attribution").symlink_to(finished)
    (place / "index").symlink_to(finished.parent / "index")
    names: dict[str, Any] = {"__name__": "block"}
    if "your_module" in text:
        names["your_module"] = YourModule()
        names["your_data"] = TrainingDataModule(str(toy_folder() / "train"), batch_size=8)
    before = dict(names)
    exec(code, names)
    if "your_module" in before:
        assert (place / "fisher.safetensors").is_file()
    for kind in names.values():
        if isinstance(kind, type) and kind.__module__ == "block" and not issubclass(kind, Family):
            assert_is_an_objective(kind)


def assert_is_an_objective(kind: Callable[[], Any]) -> None:
    """Losses of toys are one number a view."""
    objective = kind()
    batch = ViewBatch(torch.randn(3, *LATENT), {"text": torch.randn(3, TOKENS, DIM)})
    assert objective(tiny_unet(), batch, torch.tensor([0, 10, 999]), torch.randn(3, *LATENT)).shape == (3,)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_a_config(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = yaml.safe_load(text)
    (place / "block.yaml").write_text(text)
    if "design" in keys:
        printed("evaluate", "--config", "train.yaml", "--config", "block.yaml")
    elif "model" in keys:
        whole = "class_path" in keys["model"]
        base = () if whole else ("--config", write_config(place / "toy.yaml"))
        printed("attribute", *base, "--config", "block.yaml")
    else:
        printed("fit", "--config", "train.yaml", "--config", "block.yaml")


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_and_their_options_exist(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, list[str]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and (assigned := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])):
            variables[assigned[1]] = shlex.split(assigned[2])
            words = words[1:]
        if words and words[0].startswith("$"):
            words = variables[words[0][1:]] + words[1:]
        if words:
            check_command(words, place)


def check_command(words: list[str], place: Path) -> None:
    """That a command can be started so, in a clone."""
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "lightning-unlearn":
        printed(*arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in arguments if "=" not in word] == [word for word in arguments if word in targets]
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for word in arguments for name in re.findall(r"\[([\w-]+)\]", word)} <= set(extras)
    elif "-m" in arguments:
        assert importlib.util.find_spec(arguments[arguments.index("-m") + 1]) is not None
        assert all((ROOT / word).is_file() for word in arguments if word.endswith(".py"))
    elif program in ("python", "bash", "sbatch"):
        script = next(word for word in arguments if re.search(r"\.(py|sh)\b", word))
        assert (place / script).is_file() or (ROOT / script).is_file(), script
    else:
        assert program == "ruff", f"nobody looks at {words}"


def test_an_option_that_there_is_not_is_seen(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split("lightning-unlearn report --folders attribution"), place)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_the_prose_names_are_there(page: Path) -> None:
    folders = "benchmarks|callbacks|configs|datamodules|lightning_unlearn|scripts|tests"
    for name in re.findall(rf"`(?:python )?((?:{folders})/[\w./-]+)[` ]", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


# ---------------------------------------------------------------------- README


def test_readme_has_the_numbers_of_the_results_page_and_at_most_200_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    table = importlib.import_module("results_table").results_table()
    readme = (ROOT / "README.md").read_text("utf-8")
    assert table in readme, "the table is of other results; run python scripts/results_table.py"
    assert len(readme.splitlines()) <= 200


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_of_pages_beside_the_site_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES[2:], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_sites_pages_lead_to_files_in_plain_markdown_too(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s#]+)[^)\s]*\)", page.read_text("utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


# ---------------------------------------------------------------------- the site


class Page(HTMLParser):
    """What a page has for others to call, what it calls, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: Counter[str] = Counter()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag."""
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors[given["id"]] += 1
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "canonical" not in given.get("rel", ""):
            self.fetched.append(given.get("href", ""))
        self.fetched += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= 15
    for path, page in pages.items():
        assert not [anchor for anchor, count in page.anchors.items() if count > 1], path
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [address for address in Page(path).fetched if urlsplit(address).netloc], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text("utf-8")), path


def test_each_command_has_its_options_on_the_site(site: Path) -> None:
    page = (site / "reference" / "commands.html").read_text("utf-8")
    for option in ("--method", "--race", "--passes", "--samples_per_shard", "--trainer.num_nodes", "--design.subsets"):
        assert f"<code>{option}</code>" in page


def test_each_family_stands_on_the_site(site: Path) -> None:
    page = (site / "attribute.html").read_text("utf-8")
    for family in FAMILIES:
        assert f"<td>{family.title}</td>" in page


def test_each_public_name_has_its_place_on_the_site(site: Path) -> None:
    import lightning_unlearn

    anchors = Page(site / "reference" / "python.html").anchors
    for name in lightning_unlearn.__all__:
        assert name == "__version__" or f"lightning_unlearn.{name}" in anchors, name


def test_formulas_and_roles_of_docstrings_are_shown(site: Path) -> None:
    for name in ("python", "modules"):
        page = (site / "reference" / f"{name}.html").read_text("utf-8")
        assert "<math" in page
        assert not re.search(r":(class|func|meth|attr|mod|math):|\.\. math::", page)
