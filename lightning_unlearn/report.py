"""The page a person looks at: one HTML file that needs neither a network nor a script.

What comes out of a shard or a run is text to be escaped, or a picture to be decoded and encoded again; a
Content-Security-Policy forbids the page scripts and requests. The same run gives the same page, byte for byte.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_unlearn.errors import InputError
from lightning_unlearn.samples import Sample
from lightning_unlearn.scores import ScoreTable
from lightning_unlearn.shards import write_atomically

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]

LARGEST_SIDE = 384  # pixels of a picture in the page; larger ones are made smaller
LARGEST_PNG = 128  # up to this side a PNG is hardly larger than a JPEG, and exact
LARGEST_COARSE = 48  # up to this side pixels are enlarged as squares, not smoothed
# How a query was made: these of its facts come first.
MADE = ("kind", "of", "seed", "scheduler", "steps", "num_inference_steps", "guidance", "guidance_scale")
# Matplotlib only knows fixed colours; these stand for the page's own, which differ in light and dark.
INKS = {"#010203": "var(--muted)", "#010204": "var(--line)", "#010205": "var(--bulk)", "#010206": "var(--accent)"}
MUTED, LINE, BULK, ACCENT = INKS


@dataclass(frozen=True)
class Picture:
    """A picture inside the page.

    Attributes:
        address: A data URI.
        width: In pixels.
        height: In pixels.
        coarse: Whether it is so small that its pixels are shown as squares.
    """

    address: str
    width: int
    height: int
    coarse: bool


@dataclass(frozen=True)
class Ranked:
    """A training image and its place among all for one query.

    Attributes:
        rank: 1 for the most influential.
        key: Of the sample.
        score: Its score.
        base_loss: Its mean loss before unlearning.
        captions: Empty if the sample was not found.
        picture: ``None`` if there is nothing to see.
    """

    rank: int
    key: str
    score: float
    base_loss: float
    captions: list[str]
    picture: Picture | None


def write_report(
    path: str | Path,
    table: ScoreTable,
    queries: Sequence[Sample],
    pictures: Callable[[Sequence[str]], Mapping[str, Sample]],
    top: int = 12,
    bottom: int = 6,
) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        path: The HTML file; its folder is made if it is not there.
        table: The scores of all queries.
        queries: The queries' samples, in any order; of one that is missing, what ``run.json`` knows is shown.
        pictures: Fetches training samples by key; called once with all that are shown, and may leave some out.
        top: How many of a query's most influential images are shown.
        bottom: How many of its least influential ones.

    Returns:
        The path.

    Raises:
        InputError: If there is nothing to show, scores are not finite, or the file can't be written.
    """
    if top < 1 or bottom < 0:
        raise InputError(
            f"A report shows at least one image a query, but top is {top} and bottom {bottom}; raise them."
        )
    if not table.keys or not table.queries:
        raise InputError("There is nothing to report: the table has no samples or no queries; score some first.")
    if not (np.isfinite(table.scores).all() and np.isfinite(table.base_losses).all()):
        raise InputError("The score table holds NaN or infinity; score again into another folder.")
    path = Path(path)
    page = _render(table, {query.key: query for query in queries}, pictures, top, bottom)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A caption may hold half a surrogate pair, which JSON can write and UTF-8 can't.
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(
            f"The report can't be written to {path} ({error.strerror}); free the disk, or name another place."
        ) from None
    return path


# ---------------------------------------------------------------------- what the page says


def _render(
    table: ScoreTable,
    queries: Mapping[str, Sample],
    pictures: Callable[[Sequence[str]], Mapping[str, Sample]],
    top: int,
    bottom: int,
) -> str:
    from jinja2 import Environment, StrictUndefined

    by_key = np.argsort(np.asarray(table.keys), kind="stable")  # so that ties come in the order of ScoreTable.top
    ends: list[tuple[Rows, Rows]] = []
    for column in range(len(table.queries)):
        order = by_key[np.argsort(-table.scores[by_key, column], kind="stable")]
        ends.append((order[:top].copy(), order[max(top, len(order) - bottom) :].copy()))
    samples = pictures(sorted({table.keys[row] for rows in ends for row in np.concatenate(rows)}))
    run = table.run
    views = dict(run.get("views", {}))
    if views.get("captions", 0) is None:
        views["captions"] = "all"
    unlearning = run.get("unlearning", {})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "share": _share, "duration": _duration}
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text("utf-8"))
    return template.render(
        queries=[_query(table, column, queries, *rows, samples) for column, rows in enumerate(ends)],
        images=len(table.keys),
        shards=len(set(table.shards)),
        all_shards=len(run.get("shards", {})),
        rule=run.get("rule"),
        run=run,
        settings={
            "Unlearning": dict(_flatten({name: unlearning[name] for name in unlearning if name != "objective"})),
            "Objective": dict(_flatten(unlearning.get("objective", {}))),
            "Views": dict(_flatten(views)),
            "Versions": dict(_flatten(run.get("versions", {}))),
        },
    )


def _query(
    table: ScoreTable,
    column: int,
    queries: Mapping[str, Sample],
    highest: Rows,
    lowest: Rows,
    samples: Mapping[str, Sample],
) -> dict[str, Any]:
    from markupsafe import Markup

    key = table.queries[column]
    sample = queries.get(key)
    target = table.run.get("targets", {}).get(key, {})
    captions = sample.captions if sample else target.get("captions") or []
    metadata = sample.metadata if sample else {}
    facts = dict(_flatten({name: value for name, value in metadata.items() if name != "captions"}))
    # A training picture may be a query under its own key or, as in the sample data, say which one it is.
    own = next((name for name in (key, metadata.get("of")) if name in table.keys), None)
    scores = table.scores[:, column].astype(np.float64)
    largest = float(np.abs(scores).max())
    exponent = 3 * math.floor(math.log10(largest) / 3) if largest else 0
    unit, unit_name = 10.0**exponent, _power(exponent) if exponent else ""
    return {
        "number": column + 1,
        "key": key,
        "prompt": captions[0] if captions else key,
        "captions": captions,
        "picture": _picture_of(sample),
        "made": {"key": key} | {name: facts.pop(name) for name in MADE if name in facts},
        "facts": facts,
        "target": target,
        "own": own,
        "own_rank": table.rank(key, own) + 1 if own is not None else None,
        "top": _ranked(table, scores, highest, 1, samples),
        "bottom": _ranked(table, scores, lowest, len(scores) - len(lowest) + 1, samples),
        "unit": unit,
        "unit_name": unit_name,
        "plot": Markup(_plot(scores / unit, scores[highest] / unit, unit_name, f"plot{column + 1}-")),
        "rest": _rest(scores, table.base_losses.astype(np.float64), table.run.get("rule")),
    }


def _ranked(table: ScoreTable, scores: Floats, rows: Rows, first: int, samples: Mapping[str, Sample]) -> list[Ranked]:
    ranked = []
    for rank, row in enumerate(rows, first):
        sample = samples.get(table.keys[row])
        captions = sample.captions if sample else []
        loss = float(table.base_losses[row])
        ranked.append(Ranked(rank, table.keys[row], float(scores[row]), loss, captions, _picture_of(sample)))
    return ranked


def _rest(scores: Floats, base_losses: Floats, rule: str | None) -> dict[str, float]:
    """What unlearning did to all training images: how many losses rose, and by which shares of themselves."""
    rest = {"rose": float((scores > 0).mean()), "fell": float((scores < 0).mean())}
    if rule == "difference":
        known = base_losses > 0
        changes = scores[known] / base_losses[known]
    elif rule == "ratio":  # r = (u - b) / (u + b), so u / b - 1 = 2 r / (1 - r)
        known = np.abs(scores) < 1
        changes = 2 * scores[known] / (1 - scores[known])
    else:  # of another rule's scores nobody knows what they say of the loss
        return rest
    if len(changes):
        low, median, high = np.quantile(changes, (0.05, 0.5, 0.95)).tolist()
        rest |= {"low": low, "median": median, "high": high}
    return rest


# ---------------------------------------------------------------------- pictures


def _picture_of(sample: Sample | None) -> Picture | None:
    """A sample's picture, or the one its latent is, or ``None``; never an error: the page serves without it too."""
    from PIL import Image, ImageOps

    if sample is None:
        return None
    if sample.picture is not None:
        try:
            with Image.open(io.BytesIO(sample.picture), formats=("PNG", "JPEG", "WEBP")) as stored:
                stored.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
                upright = ImageOps.exif_transpose(stored).convert("RGBA")
        except Exception:  # damaged bytes make Pillow raise nearly anything
            return None
        paper = Image.new("RGBA", upright.size, "white")
        return _encode(Image.alpha_composite(paper, upright).convert("RGB"))
    latent = sample.latent.float().numpy()  # (C, H, W)
    # An autoencoder's latents may have three channels too, but they don't keep to [-1, 1]; generated pixels nearly do.
    if len(latent) not in (1, 3) or (np.abs(latent) <= 1.25).mean() < 0.95:
        return None
    pixels = np.rint((latent.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)  # (H, W, C)
    return _encode(Image.fromarray(pixels if len(latent) == 3 else pixels[..., 0]).convert("RGB"))


def _encode(image: Image.Image) -> Picture:
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    stream = io.BytesIO()
    kind = "png" if max(image.size) <= LARGEST_PNG else "jpeg"
    image.save(stream, kind, optimize=True, **({} if kind == "png" else {"quality": 88}))
    address = f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
    return Picture(address, *image.size, coarse=max(image.size) <= LARGEST_COARSE)


# ---------------------------------------------------------------------- the plot


def _plot(scores: Floats, shown: Floats, unit_name: str, prefix: str) -> str:
    """A histogram of all scores as SVG in the page's own colours and font, with those of the shown images marked."""
    import matplotlib
    from matplotlib.figure import Figure

    low, high = float(scores.min()), float(scores.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same: one bar in the middle
        margin = 0.5 * abs(high) or 0.5
        low, high = low - margin, high + margin
    edges = np.linspace(low, high, 2 * int(np.clip(np.sqrt(len(scores)), 4, 30)) + 2)  # an odd number of bars
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a user's matplotlibrc says
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 10.5})
        figure = Figure(figsize=(5.4, 2.4), dpi=72)
        axes = figure.add_axes((0.095, 0.21, 0.895, 0.67))
        for values, colour in ((scores, BULK), (shown, ACCENT)):
            # A bar of height one must be seen on a logarithmic axis, so that bars stand on a half.
            axes.stairs(np.maximum(np.histogram(values, edges)[0], 0.5), edges, baseline=0.5, fill=True, color=colour)
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2.5 * max(3, np.histogram(scores, edges)[0].max()))
        axes.yaxis.set_major_formatter(
            lambda value, _: f"{value:,.0f}" if value < 1e4 else _power(round(math.log10(value)))
        )
        axes.minorticks_off()
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, pad=5, labelcolor=MUTED)
        axes.spines[:].set_visible(False)
        axes.set_xlim(low, high)
        if low < 0 < high:
            axes.axvline(0, color=MUTED, linewidth=0.9, dashes=(3, 3))
        axes.set_xlabel(f"score, in units of {unit_name}" if unit_name else "score", color=MUTED)
        axes.text(0, 1.06, "training images (logarithmic)", color=MUTED, transform=axes.transAxes)
        axes.text(1, 1.06, f"{len(shown)} shown below", color=ACCENT, ha="right", transform=axes.transAxes)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    return _inline(stream.getvalue(), prefix, f"Histogram of the scores of {len(scores):,} training images.")


def _inline(svg: str, prefix: str, label: str) -> str:
    """An SVG file as a part of the page: no prologue, namespaces or size of its own, and ids that are nobody else's."""
    svg = svg[svg.index("<svg") :]
    start, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', start)
    assert view_box
    rest = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", rest)
    for ink, name in INKS.items():
        rest = rest.replace(ink, name)
    return f'<svg class="plot" role="img" aria-label="{label}" {view_box[0]}>{rest}'


# ---------------------------------------------------------------------- words for numbers


def _flatten(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of nested settings, as a person reads them."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{name} ")
        else:
            yield before + name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _number(value: float, sign: bool = False) -> str:
    """Three significant digits, and powers of ten where they need them."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:{'+' if sign else ''}#.3g}".partition("e")
    power = f"\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{_power(int(exponent))}" if exponent else ""
    return mantissa.removesuffix(".").replace("-", "−") + power


def _share(value: float, sign: bool = False) -> str:
    return f"{_number(100 * value, sign)}\N{NO-BREAK SPACE}%"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not hours and not minutes:
        return f"{_number(seconds)} s" if seconds < 10 else f"{rest} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
