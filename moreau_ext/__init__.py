"""Sparse, robust and provably solved saliency maps for PyTorch models.

Names are loaded on first use, so that the command line can choose OpenMP's wait policy before torch is imported.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import batch as batch
    from . import evaluation as evaluation
    from . import plots as plots
    from . import zoo as zoo
    from ._errors import ConvergenceWarning as ConvergenceWarning
    from .analysis.certificate import Certificate as Certificate
    from .explainers.base import Explainer as Explainer
    from .explainers.gradients import Gradient as Gradient
    from .explainers.gradients import SmoothGrad as SmoothGrad
    from .explainers.gradients import SoftThresholdedSmoothGrad as SoftThresholdedSmoothGrad
    from .explainers.gradients import SparsifiedSmoothGrad as SparsifiedSmoothGrad
    from .explainers.moreau import GroupSparseMoreauGrad as GroupSparseMoreauGrad
    from .explainers.moreau import MoreauGrad as MoreauGrad
    from .explainers.moreau import SparseMoreauGrad as SparseMoreauGrad
    from .explainers.registry import METHODS as METHODS
    from .explainers.registry import make_explainer as make_explainer
    from .integrations.tabular import TabularExplainer as TabularExplainer
    from .integrations.tabular import TabularExplanation as TabularExplanation
    from .integrations.text import TextExplainer as TextExplainer
    from .integrations.words import TextExplanation as TextExplanation
    from .model.arguments import PerInput as PerInput
    from .model.arguments import Shared as Shared
    from .preparation.prepare import prepare as prepare
    from .preparation.report import Prepared as Prepared
    from .solvers.adaptive import AdaptiveProximalGradient as AdaptiveProximalGradient
    from .solvers.fixed import ProximalGradient as ProximalGradient
    from .solvers.groups import Groups as Groups
    from .solvers.groups import Labels as Labels
    from .solvers.groups import Pixels as Pixels
    from .solvers.groups import Tiles as Tiles
    from .solvers.solution import Solution as Solution

_WHERE = {
    "AdaptiveProximalGradient": "solvers.adaptive",
    "Certificate": "analysis.certificate",
    "ConvergenceWarning": "_errors",
    "Explainer": "explainers.base",
    "Gradient": "explainers.gradients",
    "GroupSparseMoreauGrad": "explainers.moreau",
    "Groups": "solvers.groups",
    "Labels": "solvers.groups",
    "METHODS": "explainers.registry",
    "MoreauGrad": "explainers.moreau",
    "PerInput": "model.arguments",
    "Pixels": "solvers.groups",
    "Prepared": "preparation.report",
    "ProximalGradient": "solvers.fixed",
    "Shared": "model.arguments",
    "SmoothGrad": "explainers.gradients",
    "SoftThresholdedSmoothGrad": "explainers.gradients",
    "Solution": "solvers.solution",
    "SparseMoreauGrad": "explainers.moreau",
    "SparsifiedSmoothGrad": "explainers.gradients",
    "TabularExplainer": "integrations.tabular",
    "TabularExplanation": "integrations.tabular",
    "TextExplainer": "integrations.text",
    "TextExplanation": "integrations.words",
    "Tiles": "solvers.groups",
    "make_explainer": "explainers.registry",
    "prepare": "preparation.prepare",
}
_MODULES = ("batch", "evaluation", "plots", "zoo")

__all__ = ["__version__", *_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if "torch" in sys.modules:
    # torch.load then takes a Solution that was saved; a core that cannot be loaded is told at the first use of a name.
    with suppress(ImportError):
        import_module(".solvers.solution", __name__)
