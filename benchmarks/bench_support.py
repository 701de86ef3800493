"""Is the support what was asked for, and is it the solution's?

    OMP_NUM_THREADS=1 python benchmarks/bench_support.py --json benchmarks/results/cpu-support.json

``support=k`` finds an η per input. "as asked": share of inputs whose map has exactly k features (or groups). "again":
the problem with that η, solved by the adaptive solver with another seed to 0.2 % within 8,192 gradients; the share
whose support is then k, and within one of it, and the difference of the maps. --quick: 16 inputs instead of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import parser, report

from moreau_ext import AdaptiveProximalGradient, GroupSparseMoreauGrad, SparseMoreauGrad, Tiles, zoo

CASES: list[tuple[str, float, int, bool]] = [
    *(("digits_cnn", 0.1, k, False) for k in (1, 3, 8, 16, 32)),
    *(("digits_cnn", 0.1, k, True) for k in (1, 4, 8)),
    ("digits_cnn_gelu", 0.1, 8, False),
    *(("tabular_mlp", 1.0, k, False) for k in (3, 10)),
]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for net, rho, k, grouped in CASES:
        data = zoo.breast_cancer("test") if net.startswith("tabular") else zoo.digits("test")
        model = zoo.trained(net).to(arguments.device)
        x = data.inputs[: 16 if arguments.quick else 64].to(arguments.device)
        kind: Any = GroupSparseMoreauGrad if grouped else SparseMoreauGrad
        shape: dict[str, Any] = {"noise_level": 0.1} | ({"groups": Tiles(2)} if grouped else {})
        found = kind(model, rho=rho, support=k, solver=AdaptiveProximalGradient(0.01), **shape).attribute(
            x, return_solution=True
        )
        finer = AdaptiveProximalGradient(2e-3, 1 << 13)
        other = kind(model, rho=rho, eta=found.eta, seed=99, solver=finer, **shape)
        again = other.attribute(x, return_solution=True)
        off = (again.support - k).abs()
        error = (again.attribution - found.attribution).flatten(1).norm(dim=1) / again.attribution.flatten(1).norm(
            dim=1
        )
        rows.append(
            {
                "net": net,
                "rho": rho,
                "asked": f"{k} {'tiles' if grouped else 'features'}",
                "inputs": len(x),
                "as asked": float((found.support == k).double().mean()),
                "again the same": float((off == 0).double().mean()),
                "within one": float((off <= 1).double().mean()),
                "map again, median": float(error.quantile(0.5)),
                "converged at 1 %": float(found.converged.double().mean()),
                "gradients median": int(found.gradient_evaluations.double().quantile(0.5)),
            }
        )
    report("support", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
