"""What should the defaults be? Noise, rho and tolerance on four nets, and what each of them means there.

    OMP_NUM_THREADS=1 python benchmarks/bench_defaults.py --json benchmarks/results/cpu-defaults.json

noise       for noise levels: share of noisy copies that keep the class, gradients for an error of 10 % of the mean
            gradient, cosine of the maps of an input and of one with Gaussian noise of 1 % of the range.
rho         for rho: length of the displacement relative to the input, converged inputs, their gradients, cosine of the
            map to the mean gradient at the input. At noise 0.05 and a tolerance of 5 %, at most 2,048 gradients.
tolerance   maps of mean gradients of 8 to 2,048 samples against long references, by their relative error: how much of
            the 5 % largest features (support of sparse maps) they share, how many of these have the same sign, and by
            how much the area under the deletion curve (blurred baseline) differs, in probability.

EfficientNet-Lite0 has its ImageNet weights, and photographs at 112 × 112; ResNet-20 is trained on digits at 32 × 32.
--quick: the digits alone.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from bench_errors import inputs_of, penalties
from timing import parser, report, save
from torch import Tensor

from moreau_ext import AdaptiveProximalGradient, MoreauGrad, Prepared, SmoothGrad, Solution
from moreau_ext.evaluation import (
    area,
    blurred,
    cosine,
    perturbation_curve,
    support_jaccard,
    topk_intersection,
    topk_mask,
)

# net: inputs, samples of the reference, tile, rows of a pass
NETS = {
    "digits_cnn": (32, 1 << 14, 2, 256),
    "digits_vit": (16, 1 << 13, 2, 256),
    "digits32_resnet20": (8, 1 << 12, 4, 32),
    "efficientnet_lite0": (4, 1 << 12, 14, 8),
}
NOISES = (0.02, 0.05, 0.1, 0.2)
RHOS: tuple[float | str, ...] = (0.1, 1.0, 10.0, "auto")
COUNTS = (8, 32, 128, 512, 2048)


def bare(model: Any) -> Any:
    return model.model if isinstance(model, Prepared) else model


def mean_gradient(net: str, model: Any, x: Tensor, target: Tensor, level: float, samples: int, seed: int) -> Solution:
    explainer = SmoothGrad(
        model, num_samples=samples, antithetic=True, seed=seed, noise_level=level, max_batch=NETS[net][3]
    )
    return explainer.attribute(x, target=target, return_solution=True)


def noises(net: str, model: Any, x: Tensor, target: Tensor) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    span = (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, *[1] * (x.dim() - 1))
    near = x + 0.01 * span * torch.randn(x.shape, generator=generator)
    rows = []
    for level in NOISES:
        with torch.no_grad():
            copies = [x + level * span * torch.randn(x.shape, generator=generator) for _ in range(16)]
            kept = torch.stack([bare(model)(c).argmax(1) == target for c in copies]).double().mean()
        maps = [mean_gradient(net, model, v, target, level, 256, 1) for v in (x, near)]
        row = {"table": "noise", "net": net, "noise level": level, "kept": float(kept)}
        row |= {"gradients for 10 %": float(maps[0].forecast(0.1).double().median())}
        row |= {"cosine": float(cosine(maps[0].envelope_gradient, maps[1].envelope_gradient).mean())}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def rhos(net: str, model: Any, x: Tensor, target: Tensor) -> list[dict[str, Any]]:
    straight = mean_gradient(net, model, x, target, 0.05, 2048, 1).attribution
    rows = []
    for rho in RHOS:
        solver = AdaptiveProximalGradient(0.05, 2048)
        explainer = MoreauGrad(model, rho=rho, noise_level=0.05, solver=solver, max_batch=NETS[net][3])  # type: ignore[arg-type]  # str
        s: Solution = explainer.attribute(x, target, return_solution=True)
        length = s.displacement.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        row = {"table": "rho", "net": net, "asked": rho, "rho": float(s.rho.median()), "length": float(length.median())}
        row |= {"converged": float(s.converged.double().mean()), "residual": float(s.relative_residual.median())}
        row |= {"gradients": float(s.gradient_evaluations.double().median())}
        row |= {"cosine": float(cosine(s.attribution, straight).median())}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def tolerances(net: str, model: Any, x: Tensor, target: Tensor) -> list[dict[str, Any]]:
    _, samples, tile, _ = NETS[net]
    reference = mean_gradient(net, model, x, target, 0.05, samples, 99)
    p, v = reference.envelope_gradient, reference.standard_error.square().to(reference.envelope_gradient.dtype)
    baseline = blurred(x)

    def deleted(maps: Tensor) -> Tensor:
        return area(perturbation_curve(bare(model), x, maps, target, "deletion", baseline=baseline))

    means = {n: mean_gradient(net, model, x, target, 0.05, n, 7).envelope_gradient for n in COUNTS}
    found = []
    for kind in ("dense", "L1, 10 %", "groups"):
        penalty = penalties(kind, p, v, tile)
        limit = penalty.prox((p,))[0]
        top, curve = topk_mask(limit, 0.05) & (limit != 0), deleted(limit)
        for mean in means.values():
            maps = penalty.prox((mean,))[0]
            error = (maps - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)
            shared = topk_intersection(maps, limit, 0.05) if kind == "dense" else support_jaccard(maps, limit)
            same = ((maps.sign() == limit.sign()) & top).flatten(1).sum(1) / top.flatten(1).sum(1)
            change = (deleted(maps) - curve).abs()
            found += [
                (kind, *numbers) for numbers in zip(*(c.tolist() for c in (error, shared, same, change)), strict=True)
            ]
    rows = []
    for kind in ("dense", "L1, 10 %", "groups"):
        for level in range(-7, 2):
            near = [f[2:] for f in found if f[0] == kind and f[1] > 0 and round(math.log2(f[1])) == level]
            if len(near) < 3:
                continue
            shared, same, change = torch.tensor(near).mean(0).tolist()
            row = {"table": "tolerance", "net": net, "map": kind, "error": 2.0**level, "maps": len(near)}
            rows.append(row | {"shared": shared, "same sign": same, "deletion": change})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nets", nargs="*", choices=NETS, help="these alone")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for net in arguments.nets or list(NETS)[: 1 if arguments.quick else None]:
        model, x, _ = inputs_of(net, NETS[net][0])
        with torch.no_grad():
            target = bare(model)(x).argmax(1)
        for table in (noises, rhos, tolerances):
            rows += table(net, model, x, target)
            save("defaults", arguments.device, rows, arguments.json)
    report("defaults", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
