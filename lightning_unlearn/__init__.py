"""Data attribution for text-to-image diffusion models by unlearning.

What users need is named here, and each name is imported when it is first asked for (PEP 562), so that a command's
``--help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_unlearn.baselines import Baseline as Baseline
    from lightning_unlearn.callbacks import FisherAccumulator as FisherAccumulator
    from lightning_unlearn.callbacks import ScoreWriter as ScoreWriter
    from lightning_unlearn.datamodules import AttributionDataModule as AttributionDataModule
    from lightning_unlearn.datamodules import TrainingDataModule as TrainingDataModule
    from lightning_unlearn.diffusion.contract import Objective as Objective
    from lightning_unlearn.diffusion.flow_matching import FlowMatchingObjective as FlowMatchingObjective
    from lightning_unlearn.diffusion.objective import DenoisingObjective as DenoisingObjective
    from lightning_unlearn.draws.views import Views as Views
    from lightning_unlearn.errors import InputError as InputError
    from lightning_unlearn.fisher import Fisher as Fisher
    from lightning_unlearn.fisher import load_fisher as load_fisher
    from lightning_unlearn.index import Index as Index
    from lightning_unlearn.preparation import prepare as prepare
    from lightning_unlearn.scores.files import read_scores as read_scores
    from lightning_unlearn.scores.racing import Race as Race
    from lightning_unlearn.scores.table import ScoreTable as ScoreTable
    from lightning_unlearn.strategies import Mirrored as Mirrored
    from lightning_unlearn.strategies import Newton as Newton
    from lightning_unlearn.strategies import Penalised as Penalised
    from lightning_unlearn.training import DiffusionModule as DiffusionModule
    from lightning_unlearn.unlearning.module import UnlearningModule as UnlearningModule

_PLACES = {
    "AttributionDataModule": "datamodules",
    "Baseline": "baselines",
    "DenoisingObjective": "diffusion.objective",
    "DiffusionModule": "training",
    "Fisher": "fisher",
    "FisherAccumulator": "callbacks",
    "FlowMatchingObjective": "diffusion.flow_matching",
    "Index": "index",
    "InputError": "errors",
    "Mirrored": "strategies",
    "Newton": "strategies",
    "Objective": "diffusion.contract",
    "Penalised": "strategies",
    "Race": "scores.racing",
    "ScoreTable": "scores.table",
    "ScoreWriter": "callbacks",
    "TrainingDataModule": "datamodules",
    "UnlearningModule": "unlearning.module",
    "Views": "draws.views",
    "load_fisher": "fisher",
    "prepare": "preparation",
    "read_scores": "scores.files",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    """Import a name of the package when it is first asked for.

    Args:
        name: The name.

    Returns:
        The class or function.

    Raises:
        AttributeError: If there is none.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
