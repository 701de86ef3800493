"""Do error bars hold? Coverage, false discoveries, forecasts, and what denoising gains, against long references.

    OMP_NUM_THREADS=1 python benchmarks/bench_errors.py --json benchmarks/results/cpu-errors.json

For each net, mean gradients at the input (the limit of SmoothGrad; MoreauGrad's for small ρ), in independent parts:

coverage     share of features whose limit lies within 1.96 standard errors; the reference's own is added.
false        share of the features (groups) marked by significant(0.1) that are not in the reference's map.
found        share of those in the reference's map that are marked.
forecast     share of inputs whose forecast of 10 % is within a factor of 1.5 of what the reference says.
plain, denoised   error ‖A − A_ref‖/‖A_ref‖ without and with the corrections, the reference's own noise taken out.
eta_max      standard deviation of η_max between parts, relative, without and with them.

EfficientNet-Lite0 has its ImageNet weights, and two photographs at 112 × 112. --quick: the digits alone.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from timing import parser, report, save
from torch import Tensor

from moreau_ext import SmoothGrad, Solution, Tiles, prepare, zoo
from moreau_ext.solvers.errors import benjamini_hochberg
from moreau_ext.solvers.penalties import L1, GroupL2, NoPenalty, Penalty

# net: inputs, samples of the reference, tile
NETS = {
    "digits_cnn": (16, 1 << 15, 2),
    "digits_vit": (8, 1 << 14, 2),
    "digits32_resnet20": (4, 1 << 13, 4),
    "efficientnet_lite0": (2, 1 << 13, 14),
}
COUNTS = (128, 512, 2048)
PARTS = 4


def inputs_of(net: str, count: int) -> tuple[Any, Tensor, Tensor]:
    if net == "digits32_resnet20":
        model: Any = zoo.trained(net)
        x = zoo.digits32("test").inputs[:count]
        return prepare(model, x, max_batch=32), x, model(x).argmax(1)
    if net != "efficientnet_lite0":
        model = zoo.trained(net)
        x = zoo.digits("test").inputs[:count]
        return model, x, model(x).argmax(1)
    photographs = zoo.photographs(224)
    x = torch.nn.functional.interpolate(photographs.inputs, size=112, mode="area")[1 : 1 + count]
    return prepare(zoo.efficientnet_lite0(), x, max_batch=8), x, photographs.targets[1 : 1 + count]


def penalties(kind: str, reference: Tensor, variance: Tensor, tile: int) -> Penalty:
    """With the η that leaves 2 % or 10 % of the features, or a tenth of the groups, of the reference."""
    if kind == "dense":
        return NoPenalty()
    zero = torch.zeros(len(reference), dtype=reference.dtype)
    one: Penalty = L1((zero,))
    wanted = max(1, round((0.02 if kind == "L1, 2 %" else 0.1) * reference[0].numel()))
    if kind == "groups":
        one = GroupL2((zero,), groups=(Tiles(tile).partition(reference, reference.dtype),))
        wanted = max(1, round(0.1 * one.magnitudes((reference,)).shape[1]))
    lifted, _ = one.denoised((reference,), (variance,))
    eta = one.threshold(lifted, torch.full((len(reference),), wanted)).to(reference.dtype)
    return L1((eta,)) if kind != "groups" else GroupL2((eta,), groups=one.groups)  # type: ignore[attr-defined]  # above


def run(net: str) -> list[dict[str, Any]]:
    count, samples, tile = NETS[net]
    model, x, target = inputs_of(net, count)

    def mean(seed: int, samples: int) -> Solution:
        explainer = SmoothGrad(
            model, num_samples=samples, antithetic=True, seed=seed, max_batch=8 if count < 4 else 512
        )
        found: Solution = explainer.attribute(x, target=target, return_solution=True)
        return found

    reference = mean(99, samples)
    p, v = reference.envelope_gradient, reference.standard_error.square().to(reference.envelope_gradient.dtype)
    rows = []
    for n in COUNTS:
        parts = [mean(seed, n) for seed in range(PARTS)]
        inside = [
            ((s.envelope_gradient - p).abs() <= 1.96 * (s.standard_error.square() + v).sqrt()).double().mean()
            for s in parts
        ]
        ratios = torch.stack([s.forecast(0.1).double() / reference.forecast(0.1).double() for s in parts])
        common = {
            "coverage": float(torch.stack(inside).mean()),
            "forecast": float(((ratios <= 1.5) & (ratios >= 1 / 1.5)).double().mean()),
        }
        for kind in ("dense", "L1, 2 %", "L1, 10 %", "groups"):
            penalty = penalties(kind, p, v, tile)
            u, after = penalty.denoised((p,), (v,))
            exact = after[0] * penalty.prox(u)[0]
            own = (v * penalty.gain((p,), (exact,), (v,))[0]).flatten(1).sum(1)
            freedom = torch.full((count,), n / 2 - 1, dtype=torch.float64)
            errors: dict[str, list[Tensor]] = {"plain": [], "denoised": []}
            limits: dict[str, list[Tensor]] = {"plain": [], "denoised": []}
            false, found = [], []
            for s in parts:
                q, w = s.envelope_gradient, s.standard_error.square().to(p.dtype)
                lifted, scale = penalty.denoised((q,), (w,))
                maps = {"plain": penalty.prox((q,))[0], "denoised": scale[0] * penalty.prox(lifted)[0]}
                for name, a in maps.items():
                    gap2 = ((a - exact).square().flatten(1).sum(1) - own).clamp_min(0)
                    errors[name].append((gap2.sqrt() / exact.flatten(1).norm(dim=1)).mean())
                limits["plain"].append(penalty.eta_max((q,)))
                limits["denoised"].append(penalty.eta_max(lifted))
                tails = penalty.p_values((q,), (w,), freedom, torch.full_like(freedom, 100.0))[0]
                marked = benjamini_hochberg(tails.flatten(1), 0.1).view(p.shape) & (maps["denoised"] != 0)
                truth = exact != 0
                false.append((marked & ~truth).sum() / marked.sum().clamp_min(1))
                found.append((marked & truth).sum() / truth.sum())
            row = {"net": net, "samples": n, "map": kind, **common}
            row |= {"false": float(torch.stack(false).mean()), "found": float(torch.stack(found).mean())}
            row |= {name: float(torch.stack(values).mean()) for name, values in errors.items()}
            for name, values in limits.items():
                each = torch.stack(values)
                row[f"eta_max, {name}"] = float((each.std(0) / each.mean(0)).mean())
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for net in list(NETS)[: 1 if arguments.quick else None]:
        rows += run(net)
        save("errors", arguments.device, rows, arguments.json)
    report("errors", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
