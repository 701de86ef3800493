"""Evaluation of maps: metrics, attacks, faithfulness to the model, and plans that combine them."""

from .attacks import ATTACKS, Attack, Attacked
from .derivatives import explainer_vjp, find_hessian, gradient_vjp
from .faithfulness import area, blurred, max_sensitivity, perturbation_curve, randomised, target_probability
from .metrics import (
    cosine,
    gini,
    normalised_distance,
    ssim,
    support_fraction,
    support_jaccard,
    topk_intersection,
    topk_mask,
)
from .plan import METRICS, Plan, Results
from .runner import run
from .statistics import Interval, bootstrap, claims, compare, summarise

__all__ = [
    "ATTACKS",
    "METRICS",
    "Attack",
    "Attacked",
    "Interval",
    "Plan",
    "Results",
    "area",
    "blurred",
    "bootstrap",
    "claims",
    "compare",
    "cosine",
    "explainer_vjp",
    "find_hessian",
    "gini",
    "gradient_vjp",
    "max_sensitivity",
    "normalised_distance",
    "perturbation_curve",
    "randomised",
    "run",
    "ssim",
    "summarise",
    "support_fraction",
    "support_jaccard",
    "target_probability",
    "topk_intersection",
    "topk_mask",
]
