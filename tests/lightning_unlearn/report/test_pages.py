"""Reports of many queries, rows of near-copies, groups, licences, and the search, in a real browser too."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from report_toys import Page, chromium, encoded_picture, needs_browser, sample_of, table_of

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.errors import InputError
from lightning_unlearn.report import pages, pictures
from lightning_unlearn.report.ranking import Ranking, ends_of
from lightning_unlearn.report.report import write_report
from lightning_unlearn.scores.table import ScoreTable


def _picture(number: int, size: float = 1, brightness: float = 1) -> bytes:
    generator = np.random.default_rng(number)
    image = Image.fromarray(generator.integers(20, 180, (6, 6, 3), dtype=np.uint8)).resize((80, 80))
    image = image.resize((round(80 * size), round(80 * size)), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(brightness).save(stream, "png")
    return stream.getvalue()


def _write(
    folder: Path, table: ScoreTable, samples: dict[str, Sample], queries: Sequence[Sample] = (), **options: Any
) -> Path:
    def fetch(keys: frozenset[str]) -> Iterator[Sample]:
        return (sample for key, sample in samples.items() if key in keys)

    return write_report(folder / "report.html", table, queries, fetch, **options)


def _copies() -> tuple[ScoreTable, dict[str, Sample]]:
    """Ten images, five of which show the same: ranks 1, 2, 4, 7 and 10."""
    table = table_of(np.arange(10.0, 0, -1))
    samples = {key: sample_of(key, picture=_picture(number)) for number, key in enumerate(table.keys)}
    for row, (size, brightness) in {1: (2, 1), 3: (0.5, 0.7), 6: (1.5, 1.2), 9: (1, 0.5)}.items():
        samples[table.keys[row]] = sample_of(table.keys[row], picture=_picture(0, size, brightness))
    return table, samples


# ---------------------------------------------------------------------- one row for near-copies


def test_five_copies_of_one_picture_are_one_row_with_its_members(tmp_path: Path) -> None:
    table, samples = _copies()
    path = _write(tmp_path, table, samples, top=4, bottom=2)
    page = path.read_text()
    top = page[page.index("Most influential") : page.index("Least influential")]
    assert re.findall(r'<li value="(\d+)">', top) == ["1", "3", "5", "6"]
    assert "4 near-copies at ranks 2, 4, 7, …" in Page(page).text
    assert re.findall(r"<li>rank (\d+), score \+[\d.]+: <span[^>]*>([^<]*)<", page)[:4] == [
        ("2", "image-0001"),
        ("4", "image-0003"),
        ("7", "image-0006"),
        ("10", "image-0009"),
    ]
    assert "among all training images (1 group found)" in page
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["near_copies"] == {
        "looked_at": 10,
        "groups": [[f"image-{row:04d}" for row in (0, 1, 3, 6, 9)]],
    }
    rows = record["queries"][0]["most_influential"]
    assert [row["rank"] for row in rows] == [1, 3, 5, 6]
    assert rows[0]["near_copies"][1] == {"key": "image-0003", "rank": 4, "score": 7.0}


@pytest.mark.parametrize("raced", [False, True])
def test_ties_and_races_rank_copies_as_the_table_does(raced: bool) -> None:
    table, _ = _copies()
    table = replace(table, keys=list(reversed(table.keys)), scores=np.float32([[number // 4] for number in range(10)]))
    if raced:
        table = replace(table, finished=np.arange(10) % 3 == 0, run={**table.run, "race": {"top": 2}})
    group = tuple(table.keys[row] for row in (0, 2, 5, 8, 9))
    ranked = Ranking(table, {}, dict.fromkeys(group, group)).top("query-0", ends_of(table, "query-0", 10, 0), 6)
    order = [table.keys[row] for row in table.order("query-0")]
    (row,) = [image for image in ranked if image.key in group]
    assert [(row.rank, row.key), *((copy.rank, copy.key) for copy in row.copies)] == [
        (place, key) for place, key in enumerate(order, 1) if key in group
    ]


def test_without_pictures_it_says_that_nothing_was_looked_for(tmp_path: Path) -> None:
    page = _write(tmp_path, table_of([2.0, 1.0]), {}).read_text()
    assert "Near-copies among the training images were not looked for: there are no pictures" in page


# ---------------------------------------------------------------------- groups and licences


def test_groups_shares_stand_with_intervals_and_never_as_a_contribution(tmp_path: Path) -> None:
    table = table_of(np.random.default_rng(0).standard_normal((40, 2)))
    samples = {
        key: sample_of(key, artist=["Klee", "Marc", "<b>Evil</b>"][row % 3], licence="CC0")
        for row, key in enumerate(table.keys)
    }
    path = _write(tmp_path, table, samples, groups=["artist", "licence", "artist"])
    page = Page(path.read_text())
    assert page.text.count("Where the ranked evidence comes from, by “artist”") == 3  # each query, and both
    assert page.text.count("by “licence”") == 3
    assert "It is a share of ranks, and none of the picture." in page.text
    assert "<b>Evil</b>" in page.text
    assert not page.all("b")
    assert "mean over all queries" in page.text
    record = json.loads(path.with_suffix(".json").read_text())
    artists = record["queries"][0]["groups"]["artist"]
    assert sum(one["share"] for one in artists) == pytest.approx(1)
    assert all(one["low"] <= one["share"] <= one["high"] for one in artists)
    assert {one["group"] for one in record["groups"]["over_queries"]["artist"]} == {"Klee", "Marc", "<b>Evil</b>"}
    assert record["queries"][0]["groups"]["licence"][0]["share"] == pytest.approx(1)


def test_a_field_that_nobody_has_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    table = table_of([1.0, 2.0])
    samples = {key: sample_of(key, artist="Klee") for key in table.keys}
    with pytest.raises(InputError, match=r"No training image has 'artst'.*artist\); name another\."):
        _write(tmp_path, table, samples, groups=["artst"])
    assert not list(tmp_path.iterdir())


def test_what_a_licence_says_stands_on_its_row_and_a_refusal_above_them(tmp_path: Path) -> None:
    table = table_of([3.0, 2.0, 1.0])
    about = [{"license": "notAllowed"}, {"licence": "CC-BY-NC-4.0"}, {}]
    samples = {key: sample_of(key, **said) for key, said in zip(table.keys, about, strict=True)}
    path = _write(tmp_path, table, samples)
    page = path.read_text()
    assert re.findall(r'class="permission (\w+)"', page) == ["forbids", "restricts"]
    assert "says that it may not be trained on: license: notAllowed" in Page(page).text
    assert "1 of the 3 images below says that it may not be trained on." in Page(page).text
    rows = json.loads(path.with_suffix(".json").read_text())["queries"][0]["most_influential"]
    assert rows[0]["permission"] == {"kind": "forbids", "words": "license: notAllowed"}
    assert "permission" not in rows[2]


# ---------------------------------------------------------------------- many queries


def _many(folder: Path, monkeypatch: pytest.MonkeyPatch, queries: int = 7, images: int = 30) -> Path:
    """A report of several pages, since little is enough for one here."""
    monkeypatch.setattr(pages, "MOST_ON_ONE", 3)
    monkeypatch.setattr("lightning_unlearn.report.report.MOST_ON_ONE", 3)
    monkeypatch.setattr(pages, "PAGE_BYTES", 30_000)
    table = table_of(np.random.default_rng(0).standard_normal((images, queries)))
    samples = {
        key: sample_of(key, f"caption of {key}", "</script><b>Évil</b>", picture=_picture(row))
        for row, key in enumerate(table.keys)
    }
    asked = [sample_of(key, f"prompt of {key}", picture=_picture(1000 + n)) for n, key in enumerate(table.queries)]
    return _write(folder, table, samples, asked, top=4, bottom=2)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_many_queries_have_pages_that_name_each_other_and_share_their_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _many(tmp_path, monkeypatch)
    names = sorted(one.name for one in (tmp_path / "report").glob("*.html"))
    assert names == [f"page-{number:04d}.html" for number in range(1, len(names) + 1)]
    assert len(names) >= 3
    first = Page(path.read_text())
    links = [link["href"] for link in first.all("a") if link["href"].startswith("report/")]
    seen: list[str] = []
    shown: set[str] = set()
    for number, name in enumerate(names):
        text = (tmp_path / "report" / name).read_text()
        assert "data:image" not in text
        assert len(text) < 100_000
        page = Page(text)
        hrefs = [link["href"] for link in page.all("a")]
        assert (names[number + 1] if number + 1 < len(names) else None) in [*hrefs, None]
        assert ("page-0000.html" in hrefs, names[number - 1] in hrefs if number else True) == (False, True)
        seen += [f"report/{name}#{found}" for found in re.findall(r'<section class="result" id="([^"]*)"', text)]
        for image in page.all("img"):
            assert (tmp_path / "report" / image["src"]).is_file()
            shown.add(image["src"])
        for href in hrefs:
            aim = (tmp_path / "report" / href.partition("#")[0]).resolve()
            assert href.startswith("#") or aim.is_file()
    # The link past the title goes to the first one, too.
    assert links[1:] == seen
    assert links[0] == seen[0]
    kept = {f"pictures/{one.name}" for one in (tmp_path / "report" / "pictures").iterdir()}
    assert kept == shown | {image["src"].removeprefix("report/") for image in first.all("img")}
    assert len(json.loads((tmp_path / "report.json").read_text())["queries"]) == 7


def test_a_shorter_report_leaves_no_page_or_picture_of_the_longer_and_the_same_run_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _many(tmp_path / "again", monkeypatch, queries=4)
    _many(tmp_path / "new", monkeypatch, queries=9)
    longer = _tree(tmp_path / "new")
    _many(tmp_path / "new", monkeypatch, queries=4)
    assert _tree(tmp_path / "new") == _tree(tmp_path / "again")
    assert len(longer) > len(_tree(tmp_path / "new"))
    _many(tmp_path / "new", monkeypatch, queries=2)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "report.json", "assertion.json"}


def test_captions_that_the_first_page_searches_are_data_and_cut_where_they_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = _many(tmp_path / "whole", monkeypatch).read_text()
    assert page.count("</script>") == 2
    (stored,) = re.findall(r'<script type="application/json" id="captions">(.*?)</script>', page)
    data = json.loads(stored)
    assert len(data["pages"]) == 7
    found = dict(data["captions"])
    assert found["</script><b>Évil</b>"] == list(range(1, 8))
    table_first = json.loads((tmp_path / "whole" / "report.json").read_text())["queries"][2]["most_influential"][0]
    assert 3 in found[table_first["captions"][0]]
    monkeypatch.setattr(pages, "SEARCHED_BYTES", 10)
    page = _many(tmp_path / "cut", monkeypatch).read_text()
    (stored,) = re.findall(r'<script type="application/json" id="captions">(.*?)</script>', page)
    assert max(len(caption) for caption, _ in json.loads(stored)["captions"]) == 20


def test_pictures_in_files_are_small_and_kept_once(tmp_path: Path) -> None:
    album = pictures.InFiles(tmp_path)
    with Image.open(io.BytesIO(encoded_picture(600, 300))) as large:
        shown = [album.place(large.copy()) for _ in range(3)]
    assert len(set(shown)) == 1
    (path,) = album.folder.iterdir()
    assert (shown[0].address, shown[0].width, shown[0].height) == (f"pictures/{path.name}", 192, 96)
    (tmp_path / "pictures" / "of somebody else.png").write_text("")
    pictures.remove_pictures(tmp_path, {shown[0].address})
    assert path.exists()
    pictures.remove_pictures(tmp_path)
    assert [one.name for one in album.folder.iterdir()] == ["of somebody else.png"]


# ---------------------------------------------------------------------- in a browser

# Put into a page in the place of its policy: writes into the search box and tells what is seen then.
TYPED = """<script>addEventListener("load", () => {
  const box = document.getElementById("search");
  const seen = which => [...document.querySelectorAll(which)].filter(one => one.checkVisibility()).length;
  const images = [...document.images];
  const found = {empty: images.filter(image => !image.naturalWidth).length, images: images.length, steps: []};
  for (const text of WORDS) {
    box.value = text;
    box.dispatchEvent(new Event("input"));
    found.steps.push({rows: seen(".images > li"), entries: seen("section.result"), contents: seen(".contents li"),
      found: [...document.querySelectorAll("#search-found li")].map(one => one.textContent),
      links: [...document.querySelectorAll("#search-found a")].map(one => one.getAttribute("href")),
      said: document.getElementById("search-said").textContent});
  }
  found.alarm = document.querySelectorAll("#search-found b").length;
  document.body.dataset.found = encodeURIComponent(JSON.stringify(found));
});</script>"""


def _typed(folder: Path, path: Path, words: Sequence[str]) -> dict[str, Any]:
    """What is seen of a copy of a page, in its place, after words were typed into its search."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    page = page.replace(' loading="lazy"', "")  # all are there when the page is
    copy = path.with_name(f"copy-of-{path.name}")
    copy.write_text(page.replace("</body>", TYPED.replace("WORDS", json.dumps(words)) + "</body>"))
    (data,) = re.findall(r'data-found="([^"]*)"', chromium(folder, copy, "--dump-dom"))
    copy.unlink()
    found: dict[str, Any] = json.loads(unquote(data))
    return found


@needs_browser
def test_a_search_leaves_the_images_whose_captions_have_the_words(tmp_path: Path) -> None:
    table = table_of(np.stack([np.arange(20.0), -np.arange(20.0)], 1))
    samples = {
        key: sample_of(key, f"caption {row % 5} Évil", picture=_picture(row)) for row, key in enumerate(table.keys)
    }
    asked = [sample_of("query-0", "a fox"), sample_of("query-1", "a bear")]
    path = _write(tmp_path, table, samples, asked, top=5, bottom=3)
    found = _typed(tmp_path, path, ["", "evil 4", "image-0019", "BEAR", "nothing of the kind", ""])
    assert found["empty"] == 0
    steps = found["steps"]
    assert [step["entries"] for step in steps] == [2, 2, 2, 1, 0, 2]
    # Five of each, one of which is the fourth; the last of the other query is found in what is folded.
    assert [step["rows"] for step in steps] == [10, 3, 2, 5, 0, 10]
    assert [step["contents"] for step in steps] == [2, 2, 2, 1, 0, 2]
    assert steps[1]["said"].endswith("images shown, in 2 of 2 entries.")
    assert steps[0]["said"] == steps[-1]["said"] == ""


@needs_browser
def test_the_first_page_of_many_searches_the_captions_of_all_and_every_picture_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _many(tmp_path, monkeypatch)
    found = _typed(tmp_path, path, ["evil", "query-3"])
    assert found["images"] == 7
    assert found["empty"] == 0
    assert found["alarm"] == 0
    (line,) = found["steps"][0]["found"]
    assert line.startswith("</script><b>Évil</b>")
    for number, link in enumerate(found["steps"][0]["links"], 1):
        name, _, aim = link.partition("#")
        assert f'id="{aim}"' in (tmp_path / name).read_text()
        assert aim == f"query-{number}"
    assert found["steps"][1]["contents"] == 1
    second = _typed(tmp_path, tmp_path / "report" / "page-0002.html", ["evil"])
    assert second["empty"] == 0
    assert second["images"] > 6


@needs_browser
def test_under_its_own_policy_a_page_searches_and_shows_pictures_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _many(tmp_path, monkeypatch)
    for page in (path, tmp_path / "report" / "page-0001.html"):
        # The search shows its box: the script that is allowed did run.
        dom = chromium(tmp_path, page, "--dump-dom")
        assert 'role="search" hidden' not in dom
        assert 'role="search"' in dom
    shot = tmp_path / "shot.png"
    chromium(tmp_path, tmp_path / "report" / "page-0001.html", f"--screenshot={shot}", "--window-size=1280,1400")
    with Image.open(shot) as screenshot:
        colours = np.asarray(screenshot.convert("HSV"))[..., 1]
    assert (colours > 60).mean() > 0.02  # pictures have colours, all else is grey but for some words
