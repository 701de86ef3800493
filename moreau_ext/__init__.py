"""Sparse, robust and provably solved saliency maps for PyTorch models.

Names are loaded on first use, so that the command line can choose OpenMP's wait policy before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .adaptive import AdaptiveProximalGradient as AdaptiveProximalGradient
    from .base import Explainer as Explainer
    from .baselines import Gradient as Gradient
    from .baselines import SmoothGrad as SmoothGrad
    from .baselines import SoftThresholdedSmoothGrad as SoftThresholdedSmoothGrad
    from .baselines import SparsifiedSmoothGrad as SparsifiedSmoothGrad
    from .certificate import Certificate as Certificate
    from .explainers import GroupSparseMoreauGrad as GroupSparseMoreauGrad
    from .explainers import MoreauGrad as MoreauGrad
    from .explainers import SparseMoreauGrad as SparseMoreauGrad
    from .groups import Groups as Groups
    from .groups import Labels as Labels
    from .groups import Pixels as Pixels
    from .groups import Tiles as Tiles
    from .registry import METHODS as METHODS
    from .registry import make_explainer as make_explainer
    from .solvers import ProximalGradient as ProximalGradient
    from .solvers import Solution as Solution

_WHERE = {
    "AdaptiveProximalGradient": "adaptive",
    "METHODS": "registry",
    "Certificate": "certificate",
    "Explainer": "base",
    "Gradient": "baselines",
    "GroupSparseMoreauGrad": "explainers",
    "Groups": "groups",
    "Labels": "groups",
    "MoreauGrad": "explainers",
    "Pixels": "groups",
    "ProximalGradient": "solvers",
    "SmoothGrad": "baselines",
    "SoftThresholdedSmoothGrad": "baselines",
    "Solution": "solvers",
    "SparseMoreauGrad": "explainers",
    "SparsifiedSmoothGrad": "baselines",
    "Tiles": "groups",
    "make_explainer": "registry",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
