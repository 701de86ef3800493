"""The compared methods, by name, with settings for an equal budget of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..explainers.base import Explainer
from ..explainers.gradients import unsolved
from ..explainers.registry import make_explainer
from ..model.score import ScoreName
from ..solvers.adaptive import AdaptiveProximalGradient
from ..solvers.fixed import ProximalGradient
from ..solvers.groups import Groups, Labels, Tiles
from ..solvers.problem import Problem
from ..solvers.solution import Solution
from .faithfulness import drawn

__all__ = ["DEFAULT", "PUBLISHED", "Method", "Settings", "methods", "superpixels"]


@dataclass(frozen=True)
class Settings:
    """Settings that the methods share. The defaults are those of the digits.

    Args:
        budget: gradients per map, for every method but the plain gradient.
        rho: of MoreauGrad.
        noise_level: of every method.
        sparse_ratio: η/η_max of SparseMoreauGrad and of soft-thresholded SmoothGrad.
        group_ratio: η/η_max of the group-sparse maps.
        tile: edge of the tiles in pixels.
        segments: approximate number of superpixels per image.
        seed: of the noise.
        score: of the model's output.
        max_batch: rows per pass of the model.
    """

    budget: int = 480
    rho: float = 0.1
    noise_level: float = 0.1
    sparse_ratio: float = 0.3
    group_ratio: float = 0.5
    tile: int = 2
    segments: int = 16
    seed: int = 0
    score: ScoreName = "logit"
    max_batch: int = 1024


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Args:
        label: its name in tables.
        how: its settings, in words.
        gradients: per map, at most.
        build: (model, inputs) -> explainer; the inputs determine superpixels.
        attacked: False if the map does not depend on the input.
    """

    label: str
    how: str
    gradients: int
    build: Callable[[Any, Tensor], Explainer]
    attacked: bool = True


class _RandomMap(Explainer):
    """A map of normal numbers, which contains no information: the baseline of faithfulness."""

    def _solve(self, problem: Problem) -> Solution:
        maps = tuple(drawn(0x5EED_4A2D, problem.ids, x)[:, 0] for x in problem.inputs)
        return unsolved(problem, maps, 0)


def superpixels(inputs: Tensor, segments: int) -> Labels:
    """Groups of similar neighbouring pixels, per input, by scikit-image's SLIC.

    Args:
        inputs: images [B, channels, H, W].
        segments: approximate number per image.

    Raises:
        ImportError: scikit-image is missing.
        ValueError: inputs that are no images.

    Source: Achanta et al. 2012, "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods".

    Example:
        >>> import torch
        >>> from moreau_ext.evaluation.methods import superpixels
        >>> superpixels(torch.rand(2, 3, 8, 8), 4).map.shape
        torch.Size([2, 1, 8, 8])
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError(f'SLIC is scikit-image\'s ({error}): pip install "moreau_ext[evaluation]"') from error
    if inputs.dim() != 4:
        raise ValueError(f"inputs: superpixels need images [B, channels, H, W], got shape {tuple(inputs.shape)}")
    maps = []
    images = inputs.detach().cpu().double().movedim(1, -1)
    if images.shape[-1] == 3 and not bool(((images >= 0) & (images <= 1)).all()):
        # Colours are compared in CIELAB, which takes RGB from 0 to 1.
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-12)
    for image in images.numpy():
        gray = image.shape[-1] == 1
        found = slic(
            image[..., 0] if gray else image,
            n_segments=segments,
            compactness=0.1 if gray else 10.0,
            channel_axis=None if gray else -1,
            convert2lab=image.shape[-1] == 3,
            start_label=0,
        )
        maps.append(torch.from_numpy(found).long()[None])
    return Labels(torch.stack(maps) if maps else torch.zeros(0, 1, *inputs.shape[2:], dtype=torch.int64))


DEFAULT = (
    "gradient",
    "smoothgrad",
    "st_smoothgrad",
    "sparsified_smoothgrad",
    "integrated_gradients",
    "moreau",
    "sparse",
    "group",
    "group_superpixels",
    "random",
)
OURS = ("moreau", "sparse", "group", "group_superpixels")
RIVALS = ("gradient", "smoothgrad", "st_smoothgrad", "sparsified_smoothgrad", "integrated_gradients")
PUBLISHED = (
    "smoothgrad_published",
    "sparsified_published",
    "integrated_published",
    "moreau_published",
    "sparse_published",
)


def methods(s: Settings) -> dict[str, Method]:
    """All methods by name: ``DEFAULT`` with the budget of the settings, ``PUBLISHED`` as in their papers."""
    shared = {"score": s.score, "max_batch": s.max_batch}
    noisy = {**shared, "noise_level": s.noise_level, "seed": s.seed}
    moreau = {**noisy, "rho": s.rho, "solver": AdaptiveProximalGradient(1e-2, s.budget)}
    published = {**noisy, "noise_level": 0.1, "rho": 1.0, "solver": ProximalGradient.paper()}

    def plain(name: str, **settings: Any) -> Callable[[Any, Tensor], Explainer]:
        def build(model: Any, _: Tensor) -> Explainer:
            explainer: Explainer = make_explainer(name, model, **settings)
            return explainer

        return build

    def grouped(groups: Callable[[Tensor], Groups]) -> Callable[[Any, Tensor], Explainer]:
        def build(model: Any, inputs: Tensor) -> Explainer:
            explainer: Explainer = make_explainer(
                "group", model, **moreau, eta_ratio=s.group_ratio, groups=groups(inputs)
            )
            return explainer

        return build

    noise = f"noise {s.noise_level:g} of the range"
    solved = f"rho {s.rho:g}, {noise}, adaptive solver, at most {s.budget} gradients"
    return {
        "gradient": Method("Gradient", "1 gradient", 1, plain("gradient", **shared)),
        "smoothgrad": Method(
            "SmoothGrad",
            f"{s.budget} samples, {noise}",
            s.budget,
            plain("smoothgrad", **noisy, num_samples=s.budget),
        ),
        "st_smoothgrad": Method(
            "Soft-thresholded SmoothGrad",
            f"{s.budget} samples, {noise}, eta {s.sparse_ratio:g} of eta_max",
            s.budget,
            plain("st_smoothgrad", **noisy, num_samples=s.budget, eta_ratio=s.sparse_ratio),
        ),
        "sparsified_smoothgrad": Method(
            "Sparsified SmoothGrad",
            f"{s.budget} samples, {noise}, the top 10 % of each",
            s.budget,
            plain("sparsified_smoothgrad", **noisy, num_samples=s.budget),
        ),
        "integrated_gradients": Method(
            "Integrated Gradients",
            f"{s.budget} steps from 0",
            s.budget,
            plain("integrated_gradients", **shared, n_steps=s.budget),
        ),
        "moreau": Method("MoreauGrad", solved, s.budget, plain("moreau", **moreau)),
        "sparse": Method(
            "Sparse MoreauGrad",
            f"{solved}, eta {s.sparse_ratio:g} of eta_max",
            s.budget,
            plain("sparse", **moreau, eta_ratio=s.sparse_ratio),
        ),
        "group": Method(
            "Group-Sparse MoreauGrad",
            f"{solved}, eta {s.group_ratio:g} of eta_max, {s.tile} x {s.tile} tiles",
            s.budget,
            grouped(lambda _: Tiles(s.tile)),
        ),
        "group_superpixels": Method(
            "Group-Sparse, superpixels",
            f"{solved}, eta {s.group_ratio:g} of eta_max, about {s.segments} SLIC segments",
            s.budget,
            grouped(lambda inputs: superpixels(inputs, s.segments)),
        ),
        "random": Method("Random map", "normal numbers, the same for every model", 0, _random(shared), attacked=False),
        "smoothgrad_published": Method(
            "SmoothGrad, published",
            "8192 samples, noise 0.15 of the range",
            8192,
            plain("smoothgrad", **{**noisy, "noise_level": 0.15}, num_samples=8192),
        ),
        "sparsified_published": Method(
            "Sparsified SmoothGrad, published",
            "256 samples, noise 0.1 of the range",
            256,
            plain("sparsified_smoothgrad", **{**noisy, "noise_level": 0.1}, num_samples=256),
        ),
        "integrated_published": Method(
            "Integrated Gradients, published",
            "50 steps from 0",
            50,
            plain("integrated_gradients", **shared, n_steps=50),
        ),
        "moreau_published": Method(
            "MoreauGrad, published",
            "rho 1, 300 steps of 32 samples",
            9600,
            plain("moreau", **published),
        ),
        "sparse_published": Method(
            "Sparse MoreauGrad, published",
            "rho 1, eta 0.005, 300 steps of 32 samples",
            9600,
            plain("sparse", **published, eta=5e-3),
        ),
    }


def _random(shared: dict[str, Any]) -> Callable[[Any, Tensor], Explainer]:
    return lambda model, _: _RandomMap(model, **shared)
