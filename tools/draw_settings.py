#!/usr/bin/env python3
"""Draws docs/settings/*.png: one photograph explained with one setting varied at a time.

A minute on one core, with extra [demo]. The maps depend on the seed and the processor's rounding, so the pictures are
not compared in CI. Prints the figures that docs/settings.md states.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate

from moreau_ext import (
    AdaptiveProximalGradient,
    ConvergenceWarning,
    GroupSparseMoreauGrad,
    SmoothGrad,
    Tiles,
    prepare,
    zoo,
)
from moreau_ext.plots import gaussian_blur

OUT = Path(__file__).resolve().parent.parent / "docs" / "settings"
SIZE = 112  # a quarter of the cost of the net's own 224
TILE = 8
PHOTOGRAPH = 1  # the cat
GRADIENTS = 512


@dataclass(frozen=True)
class Panel:
    title: str
    map: Tensor  # [1, 3, H, W]
    note: str = ""


def heat(map: Tensor, *, tiled: bool) -> Tensor:
    """|map| as [H, W] in [0, 1]: the length of each tile, or the sum over channels blurred by one pixel."""
    if tiled:
        strength = avg_pool2d(map.square().sum(1, keepdim=True), TILE).sqrt()
        strength = interpolate(strength, scale_factor=TILE, mode="nearest")
    else:
        strength = gaussian_blur(map.abs().sum(1, keepdim=True), 1.0)
    full = strength.quantile(0.995)
    return (strength / full.clamp_min(1e-30)).clamp(0, 1)[0, 0]


def draw(name: str, photograph: Tensor, panels: list[Panel], *, tiled: bool) -> None:
    # Two rows, so that a panel is still large on a phone.
    figure = Figure(figsize=(4.8, 5.6), dpi=125)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.05, wspace=0.04, hspace=0.25)
    gray = photograph.mean(0)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        strength = heat(panel.map, tiled=tiled)
        axes.imshow(gray, cmap="gray", vmin=-0.5, vmax=1.2, interpolation="nearest")
        axes.imshow(strength, cmap="inferno", alpha=0.9 * strength.pow(0.7), vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(panel.title, fontsize=11, pad=4)
        axes.set_xlabel(panel.note, fontsize=9, labelpad=4)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(OUT / f"{name}.png", metadata={"Software": None})


def main() -> None:
    warnings.simplefilter("ignore", ConvergenceWarning)
    OUT.mkdir(exist_ok=True)
    start = time.perf_counter()
    photographs = zoo.photographs()
    x = interpolate(photographs.inputs[PHOTOGRAPH : PHOTOGRAPH + 1], size=SIZE, mode="bilinear", antialias=True)
    photograph = ((x - x.amin()) / (x.amax() - x.amin()))[0]
    net = zoo.efficientnet_lite0()
    with torch.no_grad():
        print("predicted:", photographs.names[int(net(x).argmax())])
    ready = prepare(net, x, channels_last=True, probe=False, max_batch=8)
    plain = SmoothGrad(ready, num_samples=GRADIENTS).attribute(x)

    def sparse(**settings: float) -> Panel:
        explainer = GroupSparseMoreauGrad(
            ready,
            groups=Tiles(TILE),
            solver=AdaptiveProximalGradient(max_gradients=GRADIENTS),
            **{"rho": 0.1, "eta_ratio": 0.3, **settings},  # type: ignore[arg-type]  # mixed
        )
        found = explainer.attribute(x, return_solution=True)
        ((name, value),) = settings.items()
        print(
            f"{name} = {value}: {tiles(found.support)}, residual {float(found.relative_residual):.3f}, "
            f"{int(found.gradient_evaluations)} gradients, "
            f"‖δ‖/‖x‖ {float(found.displacement.norm() / x.norm()):.4f}, "
            f"cosine of its gradient to SmoothGrad {cosine(found.envelope_gradient, plain):.2f}"
        )
        residual = f"{float(found.relative_residual):.0%}"
        return Panel(f"{name} = {value:g}", found.attribution, f"{tiles(found.support)}, residual {residual}")

    def smooth(title: str, *, num_samples: int, noise_level: float) -> Panel:
        maps = [
            SmoothGrad(ready, num_samples=num_samples, noise_level=noise_level, seed=seed).attribute(x)
            for seed in (0, 1)
        ]
        print(f"{title}: cosine of two seeds {cosine(*maps):.2f}")
        return Panel(title, maps[0], f"cosine of two seeds {cosine(*maps):.2f}")

    draw("rho", photograph, [sparse(rho=rho) for rho in (0.01, 0.1, 1.0, 10.0)], tiled=True)
    draw("eta", photograph, [sparse(eta_ratio=ratio) for ratio in (0.1, 0.3, 0.5, 0.8)], tiled=True)
    levels = [smooth(f"noise_level = {s:g}", num_samples=128, noise_level=s) for s in (0.01, 0.05, 0.1, 0.3)]
    draw("sigma", photograph, levels, tiled=False)
    counts = [smooth(f"{m} gradients", num_samples=m, noise_level=0.1) for m in (4, 16, 64, 256)]
    draw("gradients", photograph, counts, tiled=False)
    print(f"{time.perf_counter() - start:.0f} s")


def tiles(support: Tensor) -> str:
    return "1 tile" if int(support) == 1 else f"{int(support)} tiles"


def cosine(one: Tensor, other: Tensor) -> float:
    return float(cosine_similarity(one.flatten(), other.flatten(), dim=0))


if __name__ == "__main__":
    main()
