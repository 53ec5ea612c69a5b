"""The methods of the benches, and what is tried of each."""

from __future__ import annotations

from benches import CHOSEN, FISHER_FILES

from lightning_unlearn.baselines import (
    DAS,
    DTRAK,
    TRAK,
    Baseline,
    GradientSimilarity,
    Influence,
    JourneyTRAK,
    PixelSimilarity,
    Random,
    TextSimilarity,
)
from lightning_unlearn.strategies import Newton

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)
# Sizes of a step: how far the query's loss rises, relative to itself or on the way to the training pictures' mean loss.
SIZES = ("rise 30%", "rise 100%", "rise 300%", "halfway")
# Whatever works with weights is tried on both selections; what stands after a setting's name.
SELECTIONS = {CHOSEN: "", "all": ", all weights"}
# On a bench whose `more_selections` names them these are tried, too, with the methods that are asked together: for
# what `auto` should mean alone (selections.py), so that in the tables all methods are tuned on as many settings.
MORE_SELECTIONS = {"attention": ", attention", "feed_forward": ", feed-forward", "linear": ", all linear"}
ENDS = SELECTIONS | MORE_SELECTIONS

# Method to its settings. All get eight a selection of weights, or what there is to choose.
BASELINE_SETTINGS: dict[str, dict[str, Baseline]] = {
    "random": {f"seed {seed}": Random(seed) for seed in range(8)},
    "pixel_similarity": {kind: PixelSimilarity(kind) for kind in ("cosine", "l2", "centred_cosine")},
    "text_similarity": {kind: TextSimilarity(kind) for kind in ("mean", "max", "max_token")},
    "gradient_similarity": {
        f"{kind}{', per timestep' * steps}": GradientSimilarity(kind, steps)
        for kind in ("dot", "cosine")
        for steps in (False, True)
    },
    "influence": {f"damping {value:g}": Influence(value) for value in RIDGES},
    "influence_ekfac": {f"damping {value:g}": Influence(value) for value in RIDGES},
    "trak": {f"ridge {value:g}": TRAK(value) for value in RIDGES},
    "journey_trak": {f"ridge {value:g}": JourneyTRAK(value) for value in RIDGES},
    "d_trak": {f"ridge {value:g}": DTRAK(value) for value in RIDGES},
    "das": {f"ridge {value:g}": DAS(value) for value in RIDGES},
}
# With a Fisher, and plain gradient ascent without one.
UNLEARNING = {"unlearning_ekfac": "ekfac", "unlearning": "diagonal", "gradient_ascent": "identity"}
# The default, and what the diagonal Fisher always had here (a hundredth of it changes its LDS by less than 0.02).
DAMPING = {"ekfac": 0.001, "diagonal": 0.1, "identity": 0.1}
METHODS = (*UNLEARNING, *BASELINE_SETTINGS)
# The package's defaults, and these with one switch: methods of one setting, for which nothing is chosen.
DEFAULT, DEFAULT_ALL, DEFAULT_DIFFERENCE = "default", "default_all", "default_difference"
DEFAULT_OF = "unlearning_ekfac"
DEFAULT_SETTINGS = {
    DEFAULT: "halfway, ratio",
    DEFAULT_ALL: "halfway, ratio, all weights",
    DEFAULT_DIFFERENCE: "halfway, difference",
}
# Several methods asked together, made of kept scores: what is asked of each, all weights.
CONSENSUS, CONSENSUS_FIXED = "consensus", "consensus_default"
_DAS, _D_TRAK = ("das", "ridge 0.001, all weights"), ("d_trak", "ridge 0.01, all weights")
_RISES = {
    rise: (DEFAULT_OF, f"rise {rise}, difference, all weights") for rise in ("30%", "100%")
}  # a modest one, and the one of the first version
CONSENSUS_PARTS: dict[str, list[tuple[str, str]]] = {
    "DAS + D-TRAK": [_DAS, _D_TRAK],
    **{f"DAS + unlearning {rise}": [_DAS, unlearned] for rise, unlearned in _RISES.items()},
    **{f"D-TRAK + unlearning {rise}": [_D_TRAK, unlearned] for rise, unlearned in _RISES.items()},
    **{f"DAS + D-TRAK + unlearning {rise}": [_DAS, _D_TRAK, unlearned] for rise, unlearned in _RISES.items()},
}
ASKED_TOGETHER = (DEFAULT_OF, "d_trak", "das")
CONSENSUS_DEFAULT = "DAS + D-TRAK + unlearning 30%"
# The same of the weights that fit everywhere.
CONSENSUS_TEXT = "consensus_text"
CONSENSUS_TEXT_PARTS: list[tuple[str, str]] = [
    (method, setting.removesuffix(SELECTIONS["all"])) for method, setting in CONSENSUS_PARTS[CONSENSUS_DEFAULT]
]
# Of customised models alone: the losses before customising, in the place of those after unlearning a query.
UNDONE = "undone"
WITHOUT_WEIGHTS = ("random", "pixel_similarity", "text_similarity")
WITH_FISHER = {"influence": "diagonal", "influence_ekfac": "ekfac"} | {
    name: kind for name, kind in UNLEARNING.items() if kind in FISHER_FILES
}
LABELS = {
    DEFAULT: "unlearning alone with its defaults (ours)",
    CONSENSUS: "several asked together, which ones chosen elsewhere (ours)",
    CONSENSUS_FIXED: "**`Consensus`, the default (ours)**",
    CONSENSUS_TEXT: "`Consensus` with the keys and values of the text alone (ours)",
    DEFAULT_ALL: "unlearning alone, all weights (ours)",
    DEFAULT_DIFFERENCE: "unlearning alone with the difference as rule (ours)",
    "unlearning_ekfac": "unlearning, EKFAC Fisher, tuned (ours)",
    "unlearning": "unlearning, diagonal Fisher, tuned (ours)",
    "gradient_ascent": "gradient ascent, no Fisher, tuned (ours)",
    UNDONE: "customising undone (ours; needs no query)",
    "pixel_similarity": "pixel similarity",
    "text_similarity": "text similarity",
    "gradient_similarity": "gradient similarity (TracIn, ReTrac)",
    "influence": "influence function (diagonal Fisher)",
    "influence_ekfac": "influence function (EKFAC Fisher)",
    "trak": "TRAK",
    "journey_trak": "Journey-TRAK",
    "d_trak": "D-TRAK",
    "das": "DAS",
    "random": "random",
}


def plain(method: str) -> str:
    """A method's name where nothing can be bold."""
    return LABELS[method].replace("**", "")


def newton(size: str) -> Newton:
    """The strategy with one of the sizes of a step."""
    if size == "halfway":
        return Newton(toward_data=0.5)
    return Newton(target_increase=float(size.removeprefix("rise ").removesuffix("%")) / 100)
