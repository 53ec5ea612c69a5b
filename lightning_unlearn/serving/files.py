"""What can be taken along of an answer: the table as CSV or Parquet, and a picture to share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lightning_unlearn.report.words import number, sureness
from lightning_unlearn.serving.desk import Asked, Desk
from lightning_unlearn.serving.fragments import Source, sources

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

# The picture to share, in pixels.
WIDTH, MARGIN, GAP = 1600, 48, 24
OWN = 480
COLUMNS, ROWS = 4, 2
PAPER, INK, MUTED, LINE = "#ffffff", "#1b1e22", "#565d66", "#d9dde2"


def table(desk: Desk, asked: Asked) -> pa.Table:
    """All training pictures with their scores, the most influential first.

    Args:
        desk: Where the answer was given.
        asked: The answer.

    Returns:
        A row for each picture; what the answer is of stands in the table's metadata.
    """
    order = asked.order
    rows: list[int] = order.tolist()
    keys, captions = desk.pictures.keys, desk.captions.captions
    columns: dict[str, Any] = {
        "rank": np.arange(1, len(order) + 1),
        "key": [keys[row] for row in rows],
        "score": asked.answer.scores[order],
        **{f"part:{name}": values[order] for name, values in asked.answer.parts.items()},
        "caption": [captions[row][0] if captions[row] else "" for row in rows],
    }
    about = {
        "prompt": asked.prompt,
        "query": json.dumps(asked.query.metadata, ensure_ascii=False),
        "sure": json.dumps(asked.answer.sure),
        "meaning": desk.provenance.meaning,
        **desk.provenance.facts,
    }
    found: pa.Table = pa.table(columns)
    return found.replace_schema_metadata({name: _text(value) for name, value in about.items()})


def as_csv(desk: Desk, asked: Asked) -> bytes:
    """The table as CSV.

    Args:
        desk: Where the answer was given.
        asked: The answer.

    Returns:
        The file.
    """
    stream = io.BytesIO()
    pyarrow.csv.write_csv(table(desk, asked), stream)
    return stream.getvalue()


def as_parquet(desk: Desk, asked: Asked) -> bytes:
    """The table as Parquet, with how it was made in its metadata.

    Args:
        desk: Where the answer was given.
        asked: The answer.

    Returns:
        The file.
    """
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table(desk, asked), stream)
    return stream.getvalue()


def as_picture(desk: Desk, asked: Asked) -> bytes:
    """The query at the left and its first sources at the right, with what a score means and how it was made.

    Args:
        desk: Where the answer was given.
        asked: The answer.

    Returns:
        A PNG file.
    """
    from PIL import Image, ImageDraw

    from lightning_unlearn.serving.fragments import query_picture

    first = sources(desk, asked, COLUMNS * ROWS)
    side = (WIDTH - 2 * MARGIN - OWN - 2 * GAP - (COLUMNS - 1) * GAP) // COLUMNS
    height = 2 * MARGIN + ROWS * (side + 118) + 110
    card = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(card)
    _place(card, draw, query_picture(asked), MARGIN, MARGIN, OWN)
    below = _lines(draw, asked.prompt, MARGIN, MARGIN + OWN + 20, OWN, 34, 3, INK, bold=True)
    _lines(draw, sureness(asked.answer.sure), MARGIN, below + 8, OWN, 18, 3, MUTED)
    for place, source in enumerate(first):
        left = MARGIN + OWN + 2 * GAP + (place % COLUMNS) * (side + GAP)
        _source(card, draw, source, left, MARGIN + (place // COLUMNS) * (side + 118), side)
    bottom = height - MARGIN - 84
    draw.line((MARGIN, bottom, WIDTH - MARGIN, bottom), LINE, 2)
    below = _lines(draw, desk.provenance.meaning, MARGIN, bottom + 12, WIDTH - 2 * MARGIN, 20, 2, INK)
    _lines(draw, desk.provenance.line, MARGIN, below + 4, WIDTH - 2 * MARGIN, 17, 1, MUTED)
    stream = io.BytesIO()
    card.save(stream, "png")
    return stream.getvalue()


def _source(card: Image.Image, draw: ImageDraw.ImageDraw, source: Source, left: int, top: int, side: int) -> None:
    _place(card, draw, source.shown.picture, left, top, side)
    score = number(source.score, True)
    draw.text((left, top + side + 8), str(source.rank), INK, _font(24, bold=True))
    draw.text((left + side, top + side + 10), score, MUTED, _font(20), anchor="ra")
    words = source.shown.captions[0] if source.shown.captions else source.shown.key
    _lines(draw, words, left, top + side + 40, side, 20, 2, INK)


def _place(card: Image.Image, draw: ImageDraw.ImageDraw, picture: Any, left: int, top: int, side: int) -> None:
    """A picture in its square, as large as it fits."""
    import base64

    from PIL import Image

    draw.rectangle((left, top, left + side, top + side), "#f4f5f6", LINE)
    if picture is None:
        draw.text((left + side // 2, top + side // 2), "no picture", MUTED, _font(20), anchor="mm")
        return
    with Image.open(io.BytesIO(base64.b64decode(picture.address.split(",", 1)[1]))) as stored:
        scale = (side - 2) / max(stored.size)
        size = (max(1, round(stored.width * scale)), max(1, round(stored.height * scale)))
        way = Image.Resampling.NEAREST if picture.coarse else Image.Resampling.BICUBIC
        enlarged = stored.convert("RGB").resize(size, way)
    card.paste(enlarged, (left + 1 + (side - 2 - size[0]) // 2, top + 1 + (side - 2 - size[1]) // 2))


def _lines(
    draw: ImageDraw.ImageDraw,
    text: str,
    left: int,
    top: int,
    width: int,
    size: int,
    most: int,
    ink: str,
    *,
    bold: bool = False,
) -> int:
    """Text in lines of a width, cut after so many; where it ends."""
    font = _font(size, bold=bold)
    words, lines = text[:1000].split(), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = [_cut(draw, line, font, width, more=False) for line in lines[:most]]
    if len(lines) > most:
        shown[-1] = _cut(draw, shown[-1], font, width, more=True)
    for place, line in enumerate(shown):
        draw.text((left, top + place * round(1.3 * size)), line, ink, font)
    return top + len(shown) * round(1.3 * size)


def _cut(draw: ImageDraw.ImageDraw, line: str, font: Any, width: int, *, more: bool) -> str:
    if not more and draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(f"{line} …", font) > width:
        line = line[:-1]
    return f"{line.rstrip()} …"


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which has most letters and lies wherever matplotlib does."""
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / name), size)


def _text(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else ", ".join(value)
