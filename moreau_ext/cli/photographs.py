"""The part of ``moreau-ext demo`` that explains six photographs with a net that has ImageNet weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .common import TITLES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..zoo.data import Dataset

# At this noise the displacement and the sparsity below are settled by a few hundred gradients. The length of the
# displacement is that of the pixels' range, the same for all three methods: about 1 % of a photograph's norm.
_NOISE_LEVEL, _RADIUS_RATIO, _GRADIENTS = 0.05, 1.0, 352
_SUPPORT, _TILE, _TILES = 0.02, 14, 32
_BLUR, _SIGNED_SHARE, _HEAT_SHARE = 3.0, 0.99, 0.995
_TITLES = {**TITLES, "significant": "Sparse,\nsignificant"}
# False discovery rate of the last column.
_Q = 0.1
_NAMES = ("astronaut", "cat", "coffee", "rocket", "temple", "flower")


def settings() -> dict[str, Any]:
    """The settings, for the summary."""
    return {
        "net": "efficientnet_lite0",
        "noise_level": _NOISE_LEVEL,
        "radius_ratio": _RADIUS_RATIO,
        "max_gradients": _GRADIENTS,
        "support": {"sparse": _SUPPORT, "group": _TILES},
        "groups": f"Tiles({_TILE})",
        "significance": _Q,
        "blur": _BLUR,
    }


def _explainers(model: Any) -> Iterator[tuple[str, Any]]:
    from .. import AdaptiveProximalGradient, Tiles, make_explainer

    shared: dict[str, Any] = {"noise_level": _NOISE_LEVEL, "seed": 0}
    solver = AdaptiveProximalGradient(max_gradients=_GRADIENTS)
    moreau: dict[str, Any] = {**shared, "radius_ratio": _RADIUS_RATIO, "solver": solver}
    yield "gradient", make_explainer("gradient", model)
    yield "smoothgrad", make_explainer("smoothgrad", model, **shared, num_samples=_GRADIENTS)
    yield "moreau", make_explainer("moreau", model, **moreau)
    yield "sparse", make_explainer("sparse", model, **moreau, support=_SUPPORT)
    yield "group", make_explainer("group", model, **moreau, support=_TILES, groups=Tiles(_TILE))


def load(limit: int | None, device: torch.device) -> tuple[torch.nn.Module, Dataset]:
    """(the net, the first photographs)."""
    from .. import zoo

    model, data = zoo.efficientnet_lite0().to(device), zoo.photographs()
    return model, data._replace(inputs=data.inputs[:limit], targets=data.targets[:limit])


def explain(model: Any, data: Dataset, device: torch.device) -> Iterator[tuple[str, Any, float]]:
    """(method, solution, seconds)."""
    import torch

    from .. import Solution
    from ..data.progress import progress_bar

    total = len(data.inputs) * (len(_TITLES) - 1)
    with progress_bar(total, show=True, extra="demo", unit="image", disable=None) as advance:
        for method, explainer in _explainers(model):
            parts, began = [], time.perf_counter()
            for row in range(len(data.inputs)):
                one = data.inputs[row : row + 1].to(device)
                parts.append(explainer.attribute(one, ids=torch.tensor([row]), return_solution=True))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                advance(1, method)
            yield method, Solution.concatenate(parts), time.perf_counter() - began


def significant(solution: Any) -> Tensor:
    """A map without the features that its sampling noise explains."""
    found: Tensor = solution.attribution * solution.significant(_Q)
    return found


def picture(model: torch.nn.Module, data: Dataset, maps: dict[str, Tensor], file: Any) -> None:
    """Writes photographs.png."""
    import torch

    from ..plots import heat_gallery

    with torch.no_grad():
        sure, seen = model(data.inputs.to(next(model.parameters()).device)).softmax(1).max(1)
    titles = [
        f"{name}\n\nthe net sees\n{data.names[s]}\n({100 * p:.0f} %)"
        for name, s, p in zip(_NAMES, seen.tolist(), sure.tolist(), strict=False)
    ]
    caption = (
        "EfficientNet-Lite0, ImageNet weights, 224 x 224. Upper rows: the signed map, channels summed; of each 2 x 2 "
        f"pixels the strongest; full colour from the {100 * _SIGNED_SHARE:g} % quantile of its non-zero values on. "
        f"Lower rows: |map| summed over channels and blurred by {_BLUR:g} pixels, as heat over the gray photograph; "
        f"full colour from the {100 * _HEAT_SHARE:g} % quantile on. Each panel has a scale of its own."
        f"\nAt most {_GRADIENTS} gradients per map (Gradient: 1). Noise: {_NOISE_LEVEL} of the pixels' range. Length "
        f"of MoreauGrad's displacement: {_RADIUS_RATIO:g} x that range. Asked for: {100 * _SUPPORT:g} % of the values "
        f"(sparse), {_TILES} of 256 tiles of {_TILE} x {_TILE} pixels (group). Last column: of the sparse map the "
        f"values that are significant at a false discovery rate of {_Q:g}."
    )
    images = data.inputs.mul(128).add(127).div(255)
    shown = {_TITLES[method]: batch for method, batch in maps.items()}
    figure = heat_gallery(
        images, shown, titles, caption, blur=_BLUR, signed_share=_SIGNED_SHARE, heat_share=_HEAT_SHARE
    )
    figure.savefig(file, format="png", dpi=112)
