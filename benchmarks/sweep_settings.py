"""The rows of a sweep: how queries are unlearned and samples scored, one setting changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

TIMESTEPS = 20


@dataclass(frozen=True)
class Unlearned:
    """How queries are unlearned, and on which noise samples are scored."""

    fisher: str = "ekfac"
    parameters: str = "text_kv"
    damping: float = 0.001
    rise: float = 1.0
    steps: int = 1
    noise: Literal["shared", "per_sample"] = "shared"
    draws: int = 128
    rise_draws: int = 64
    strategy: str = "newton"
    toward_data: float | None = None  # in the place of the rise


@dataclass(frozen=True)
class Reduced:
    """How the losses become scores: the rule, the part of the schedule, and every how manyth view."""

    rule: str = "ratio"
    start: int = 0
    end: int = TIMESTEPS
    stride: int = 1

    @property
    def views(self) -> slice:
        """The views, among all."""
        return slice(self.start + self.stride // 2, self.end, self.stride)

    @property
    def count(self) -> int:
        """How many views these are."""
        return len(range(TIMESTEPS)[self.views])


# The package's defaults but for the size of the step, which doubles a query's loss here; and the same with all weights.
CENTRE, PLAINLY = Unlearned(), Reduced()
HALFWAY = 0.5
DEFAULTS = replace(CENTRE, toward_data=HALFWAY)
WHOLE, DEFAULTS_WHOLE = (replace(unlearned, parameters="all") for unlearned in (CENTRE, DEFAULTS))
# Factor to the values it takes; the centre's own are left out.
UNLEARNED: dict[str, list[Unlearned]] = {
    "Fisher": [replace(CENTRE, fisher=fisher) for fisher in ("identity", "diagonal", "ekfac_true")],
    "damping": [replace(CENTRE, damping=damping) for damping in (0.0001, 0.1, 1.0)],
    "rise of the query's loss": [replace(CENTRE, rise=rise) for rise in (0.1, 3.0)],
    "share of the way to the data's loss": [replace(CENTRE, toward_data=share) for share in (0.25, HALFWAY, 1.0)],
    "steps": [replace(CENTRE, steps=4)],
    "strategy": [
        replace(CENTRE, strategy="penalised"),
        # Many steps of few fresh draws each, in place of one of many.
        replace(CENTRE, strategy="mirrored", draws=16),
        replace(CENTRE, strategy="mirrored", draws=16, fisher="identity", parameters="feed_forward"),
    ],
    "noise": [replace(CENTRE, noise="per_sample")],
    "draws to unlearn with": [replace(CENTRE, draws=draws, rise_draws=rise) for draws, rise in ((6, 2), (8, 2))],
    "weights": [replace(CENTRE, parameters="attention")],
    # Their rises are among the settings of method_settings.py, too.
    "all weights": [
        WHOLE,
        replace(WHOLE, fisher="identity"),
        replace(WHOLE, damping=1.0),
        replace(WHOLE, steps=4),
        DEFAULTS_WHOLE,
    ],
}
REDUCED: dict[str, list[Reduced]] = {
    "score rule": [replace(PLAINLY, rule="difference")],
    "part of the schedule": [
        *(replace(PLAINLY, start=start, end=start + 5) for start in (0, 5, 10, 15)),
        replace(PLAINLY, start=6),
    ],
    "views": [replace(PLAINLY, stride=stride) for stride in (2, 4, 10, 20)],
}


def variants() -> Iterator[tuple[str, Unlearned, Reduced]]:
    """All rows: the factor, and both halves of the settings; the centre first."""
    yield "centre", CENTRE, PLAINLY
    for factor, changed in UNLEARNED.items():
        yield from ((factor, unlearned, PLAINLY) for unlearned in changed)
    for factor, reductions in REDUCED.items():
        yield from ((factor, CENTRE, reduced) for reduced in reductions)


def changed(unlearned: Unlearned, reduced: Reduced) -> str:
    """What a row changes, in words."""
    if reduced != PLAINLY:
        if (reduced.start, reduced.end) != (PLAINLY.start, PLAINLY.end):
            part = f"{reduced.start / TIMESTEPS:.0%} to {reduced.end / TIMESTEPS:.0%}"
            return f"{part}, {reduced.count} views"
        return f"{reduced.count}" if reduced.stride != 1 else reduced.rule
    names = [name for name, value in asdict(unlearned).items() if value != getattr(CENTRE, name)]
    if unlearned.strategy == "mirrored":  # has no Fisher
        names = [name for name in names if name != "fisher"]
    # A selection of weights, a Fisher, a noise and a strategy say by themselves what they are.
    spoken = ("fisher", "parameters", "noise", "strategy")
    words = ["" if name in spoken else name.replace("_", " ") + " " for name in names]
    return ", ".join(word + str(getattr(unlearned, name)) for word, name in zip(words, names, strict=True))
