"""The page: Gradio's inputs, tabs and queue around our own parts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio

from lightning_unlearn.errors import InputError
from lightning_unlearn.serving import fragments
from lightning_unlearn.serving.desk import ANSWERS_KEPT, LARGEST_PICTURE, LONGEST_PROMPT, Desk

TITLE = "Which training pictures made this one possible?"
FOUND_SHOWN = 48
# Questions that wait; whoever comes after them is told to come later.
LONGEST_QUEUE = 128
# What in our parts can be pressed tells the page which training picture, answer or prompt it stands for.
PRESSED = """
element.addEventListener("click", event => {
  const found = event.target.closest("[data-row], [data-asked], [data-prompt]");
  if (found) trigger("click", {...found.dataset});
});
"""
ASK, SEARCH, PICTURE = "ask", "search", "picture"
_log = logging.getLogger(__name__)


class Page:
    """The page of a desk.

    Args:
        desk: Where questions are answered.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def blocks(self) -> gradio.Blocks:
        """Gradio's app.

        Returns:
            It, not mounted yet.
        """
        desk = self.desk
        # delete_cache: pictures that were dropped are not kept longer than an hour.
        blocks = gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600))
        with blocks:
            asked = gradio.State([])  # tokens of this person's questions
            current = gradio.State("")
            _html(fragments.heading(TITLE, len(desk.pictures.keys), desk.provenance))
            with gradio.Tabs(selected=ASK) as tabs:
                with gradio.Tab("Ask", id=ASK):
                    with gradio.Row(equal_height=True):
                        with gradio.Column(scale=3, min_width=260):
                            prompt = gradio.Textbox(
                                label="Prompt",
                                placeholder="What a picture is generated with, or was",
                                lines=3,
                                max_lines=8,
                                max_length=LONGEST_PROMPT,
                                elem_id="prompt",
                            )
                            with gradio.Row(equal_height=True):
                                seed = gradio.Number(label="Seed", value=0, precision=0, min_width=90, scale=1)
                                button = gradio.Button("Ask", variant="primary", elem_id="ask", scale=2, min_width=90)
                        with gradio.Column(scale=2, min_width=200):
                            picture: Any = gradio.Image(
                                label="A picture that is there already",
                                type="filepath",
                                image_mode=None,
                                sources=["upload", "clipboard"],
                                height=190,
                                elem_id="dropped",
                                buttons=[],
                            )
                            # What can't be read as a picture gets our sentence, not Pillow's error.
                            picture.preprocess = _path_of
                    said = _html("", "said")
                    answer = _html("", "answer")
                    by = gradio.Dropdown(
                        list(desk.fields), label="Groups by", elem_id="by", visible=False, interactive=True
                    )
                    groups = _html("", "groups")
                with gradio.Tab("Search", id=SEARCH):
                    words = gradio.Textbox(label="Words of a caption", elem_id="words", submit_btn="Search")
                    found = _html(fragments.found("", [], [], 0), "found")
                with gradio.Tab("One picture", id=PICTURE):
                    one = _html(fragments.notice("Press a picture of an answer, or of a search."), "one")

            gradio.on(
                [button.click, prompt.submit],
                self._ask,
                [prompt, seed, picture, by, asked],
                [said, answer, by, groups, asked, current],
                api_name="ask",
                concurrency_id="ask",
                concurrency_limit=4,
                show_progress_on=[said],
            )
            quick: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 8, "show_progress": "hidden"}
            by.input(self._groups, [current, by], [groups], api_name="groups", **quick)
            gradio.on([words.submit], self._search, [words], [found], api_name="search", **quick)
            for part in (answer, found, one):
                part.click(
                    self._pressed,
                    [asked, by],
                    [tabs, one, answer, by, groups, current, prompt],
                    api_visibility="private",
                    **quick,
                )
        blocks.queue(max_size=LONGEST_QUEUE, default_concurrency_limit=8, api_open=False)
        return blocks

    def _ask(self, prompt: str, seed: float | None, path: str | None, by: str | None, tokens: list[str]) -> list[Any]:
        try:
            asked = self.desk.ask(prompt or "", int(seed or 0), _content(path))
        except InputError as error:
            return [fragments.notice(str(error)), *(gradio.skip() for _ in range(5))]
        except Exception:
            _log.exception("A question was not answered.")
            sentence = "This question could not be answered, for a reason that stands in the log of the server."
            return [fragments.notice(sentence), *(gradio.skip() for _ in range(5))]
        tokens = [*tokens, asked.token][-ANSWERS_KEPT:]
        return ["", *self._shown(asked, by), tokens, asked.token]

    def _shown(self, asked: Any, by: str | None) -> list[Any]:
        """An answer, the choice of groups, and these."""
        fields = self.desk.fields
        chosen = by if by in fields else next(iter(fields), None)
        table = fragments.groups(asked, chosen, self.desk.groups(asked, chosen)) if chosen else ""
        return [
            fragments.answer(self.desk, asked),
            gradio.update(visible=bool(fields), value=chosen),
            table,
        ]

    def _groups(self, token: str, by: str | None) -> str:
        asked = self.desk.asked(token)
        if asked is None or by is None or by not in self.desk.fields:
            return ""
        return fragments.groups(asked, by, self.desk.groups(asked, by))

    def _search(self, words: str) -> str:
        if len(words or "") > LONGEST_PROMPT:
            return fragments.notice(f"These are {len(words):,} letters; look for a few words.")
        rows, total = self.desk.captions.search(words or "", FOUND_SHOWN)
        return fragments.found(words or "", rows, self.desk.pictures.shown(rows), total)

    def _pressed(self, tokens: list[str], by: str | None, event: gradio.EventData) -> list[Any]:
        told: dict[str, Any] = event._data if isinstance(event._data, dict) else {}
        skip = [gradio.skip() for _ in range(7)]
        if isinstance(told.get("prompt"), str):
            return [gradio.Tabs(selected=ASK), *skip[:5], told["prompt"][:LONGEST_PROMPT]]
        if "asked" in told:
            asked = self.desk.asked(str(told["asked"]))
            if asked is None or asked.token not in tokens:
                return skip
            return [gradio.Tabs(selected=ASK), gradio.skip(), *self._shown(asked, by), asked.token, gradio.skip()]
        row = str(told.get("row", ""))
        if not row.isdecimal() or int(row) >= len(self.desk.pictures.keys):
            return skip
        return [gradio.Tabs(selected=PICTURE), self.one(int(row), tokens), *skip[:5]]

    def one(self, row: int, tokens: list[str]) -> str:
        """One training picture.

        Args:
            row: In the index.
            tokens: Of the questions whose askers look at it.

        Returns:
            HTML.
        """
        (shown,) = self.desk.pictures.shown([row])
        return fragments.picture(row, shown, self.desk.helped(row, tokens), len(self.desk.pictures.keys))


def _html(value: str, name: str | None = None) -> Any:
    return gradio.HTML(value, elem_id=name, js_on_load=PRESSED, apply_default_css=False)


def _path_of(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _content(path: str | None) -> bytes | None:
    if path is None:
        return None
    file = Path(path)
    if file.stat().st_size > LARGEST_PICTURE:
        raise InputError(f"This picture has more than {LARGEST_PICTURE // 2**20} MB; give a smaller one.")
    return file.read_bytes()


def theme() -> gradio.themes.Base:
    """Gradio's look with the fonts that the reader's own system has.

    Returns:
        The theme.
    """
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "Arial", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    return gradio.themes.Default(
        font=[gradio.themes.Font(name) for name in sans],
        font_mono=[gradio.themes.Font(name) for name in mono],
        primary_hue="teal",
    )


def head() -> str:
    """Our style, which Gradio would rewrite if it were given as such.

    Returns:
        What stands in the page's head.
    """
    return f"<style>\n{Path(__file__).with_name('style.css').read_text('utf-8')}</style>"
