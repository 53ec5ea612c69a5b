"""The pages of a report: one that stands alone, or, for many queries, a first one and others in a folder beside it.

What comes out of a shard or a run is text to be escaped, or a picture to be decoded and encoded again; a
Content-Security-Policy forbids the pages every request outside the report, and every script but the one that searches.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_unlearn.data.files import write_atomically
from lightning_unlearn.report.content import Content
from lightning_unlearn.report.figures import histogram
from lightning_unlearn.report.pictures import Picture
from lightning_unlearn.report.words import duration, number, share
from lightning_unlearn.scores.table import ScoreTable

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MOST_ON_ONE = 50  # queries; a report with more has pages
PAGE_BYTES = 2**20  # a page is full when its queries have so many; the last one may go beyond
PROMPT = 200  # characters of a prompt on the first page of many
SEARCHED_BYTES = 2**21  # of captions that the first page of many searches


@dataclass(frozen=True)
class Entry:
    """A query in the contents.

    Attributes:
        number: 1 for the first.
        prompt: Of the query.
        picture: Of the query.
        address: Where it is shown.
    """

    number: int
    prompt: str
    picture: Picture | None
    address: str


class Pages:
    """Writes the pages of a report.

    Args:
        path: Of the first page, or of the only one.
        table: The scores.
        common: What all pages say, by the names that the templates have for it.
    """

    def __init__(self, path: Path, table: ScoreTable, common: Mapping[str, Any]) -> None:
        self.path, self.table = path, table
        self.paged = len(table.queries) > MOST_ON_ONE
        self.folder = path.with_suffix("")
        self.shown: set[str] = set()
        self._environment = _environment()
        self._common = {"count": len(table.queries), "paged": self.paged, **common}

    def write(self, contents: Iterable[Content], over_queries: Mapping[str, Any]) -> None:
        """Write all pages, the first one at last.

        Args:
            contents: Of all queries, in their order, one at a time.
            over_queries: Field to groups' shares over all queries; looked at after the last content.
        """
        entries: list[Entry] = []
        captions: dict[str, list[int]] = {}
        written: list[str] = []
        sections: list[Markup] = []
        for name, batch in self._batches(contents):
            sections = [section for _, section in batch]
            for content, _ in batch:
                self._note(content, captions)
                address = f"{self.folder.name}/{name}" if self.paged else ""
                entries.append(
                    Entry(
                        content.number,
                        content.prompt[:PROMPT] if self.paged else content.prompt,
                        content.picture,
                        f"{address}#query-{content.number}",
                    )
                )
            if self.paged:
                last = batch[-1][0].number
                page = self._render(
                    "page.html.jinja",
                    sections=sections,
                    first=batch[0][0].number,
                    last=last,
                    before=written[-1] if written else None,
                    after=_name(len(written) + 2) if last < len(self.table.queries) else None,
                )
                _write(self.folder / name, page)
                written.append(name)
        pages = [entry.address.partition("/")[2].partition("#")[0] for entry in entries]
        first = self._render(
            "report.html.jinja",
            contents=entries,
            sections=[] if self.paged else sections,
            base=f"{self.folder.name}/" if self.paged else "",
            over_queries=over_queries,
            captions=_searched(captions, pages) if self.paged else None,
        )
        if self.paged:
            os.sync()  # the pictures that it leads to
        _write(self.path, first)
        self._remove_others(set(written))

    def _batches(self, contents: Iterable[Content]) -> Iterator[tuple[str, list[tuple[Content, Markup]]]]:
        """Names of pages and what stands on them; all on one where the report stands alone."""
        batch: list[tuple[Content, Markup]] = []
        pages = size = 0
        for content in contents:
            section = self._section(content)
            batch.append((content, section))
            size += len(section)
            if self.paged and size >= PAGE_BYTES:
                pages += 1
                yield _name(pages), batch
                batch, size = [], 0
        if batch:
            yield _name(pages + 1), batch

    def _section(self, content: Content) -> Markup:
        from markupsafe import Markup

        scores = self.table.scores[:, content.number - 1].astype(np.float64) / content.unit
        shown = np.array([image.score for image in content.top]) / content.unit
        plot = Markup(histogram(scores, shown, content.unit_name, f"plot{content.number}-"))
        back = f"../{self.path.name}" if self.paged else "#top"
        return Markup(self._render("query.html.jinja", query=content, plot=plot, back=back))

    def _note(self, content: Content, captions: dict[str, list[int]]) -> None:
        pictures = [content.picture, *(member.picture for member in content.members)]
        pictures += [image.picture for image in (*content.top, *content.bottom)]
        self.shown |= {picture.address for picture in pictures if picture is not None}
        if self.paged:
            for image in content.top:
                for caption in image.captions:
                    numbers = captions.setdefault(caption, [])
                    if not numbers or numbers[-1] != content.number:
                        numbers.append(content.number)

    def _render(self, template: str, **values: Any) -> str:
        several = len(self.table.queries) > 1
        return self._environment.get_template(template).render(**self._common, several=several, **values)

    def _remove_others(self, written: set[str]) -> None:
        """Pages of an earlier report that had more."""
        for path in self.folder.glob("page-*.html"):
            if path.name not in written:
                path.unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"page-{number:04d}.html"


def _write(path: Path, page: str) -> None:
    # A caption may hold half a surrogate pair, which JSON can write and UTF-8 can't.
    write_atomically(path, page.encode("utf-8", "replace"))


def _searched(captions: Mapping[str, Sequence[int]], pages: Sequence[str]) -> Markup:
    """What the first page of many searches: captions, cut where there are too many, and who shows them."""
    from markupsafe import Markup

    longest = max(20, SEARCHED_BYTES // max(1, len(captions)))
    cut: dict[str, set[int]] = {}
    for caption, numbers in captions.items():
        cut.setdefault(caption[:longest], set()).update(numbers)
    data = {"pages": pages, "captions": [[caption, sorted(numbers)] for caption, numbers in sorted(cut.items())]}
    # JSON is nearly JavaScript's; "<" would end the element that holds it.
    return Markup(json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"))


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(folder),
    )
    script = (folder / "search.js").read_text("utf-8")
    environment.filters |= {"number": number, "share": share, "duration": duration}
    environment.globals |= {
        "script": Markup(script),
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return environment
