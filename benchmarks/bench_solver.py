"""How many gradients does each solver take, and how far is its map from the solution?

    OMP_NUM_THREADS=1 python benchmarks/bench_solver.py

The reference of each problem is the adaptive solver with a budget of 131,000 gradients per input (16,000 with --quick);
its own relative residual is printed, and errors below it mean nothing. error = ‖A − A_ref‖/‖A_ref‖ per input.
Absolute η, the same for all solvers. The published schedule takes 300 steps of 32 samples, with step 0.1·ρ.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from timing import parser, report
from torch import Tensor

from moreau_ext import (
    AdaptiveProximalGradient,
    GroupSparseMoreauGrad,
    MoreauGrad,
    ProximalGradient,
    Solution,
    SparseMoreauGrad,
    Tiles,
    zoo,
)

PROBLEMS = [
    ("digits_cnn", 0.1, "moreau"),
    ("digits_cnn", 0.1, "sparse"),
    ("digits_cnn", 0.1, "group"),
    ("digits_cnn", 1.0, "moreau"),
    ("digits_cnn_softplus", 0.1, "moreau"),
    ("tabular_mlp", 0.3, "sparse"),
]


def solve(net: str, rho: float, method: str, x: Tensor, solver: Any, eta: Tensor | None, seed: int) -> Solution:
    model = zoo.trained(net).to(x.device)
    settings: dict[str, Any] = {"rho": rho, "solver": solver, "seed": seed}
    if method == "moreau":
        return MoreauGrad(model, **settings).attribute(x, return_solution=True)
    settings["eta"] = eta
    if method == "sparse":
        return SparseMoreauGrad(model, **settings).attribute(x, return_solution=True)
    return GroupSparseMoreauGrad(model, groups=Tiles(2), **settings).attribute(x, return_solution=True)


def strength(net: str, rho: float, method: str, x: Tensor) -> Tensor | None:
    """η = 0.3·η_max, with η_max from 1,024 samples."""
    if method == "moreau":
        return None
    one = ProximalGradient(1024, 1, 0.1 * rho, tol=0.0)
    settings: dict[str, Any] = {"rho": rho, "solver": one, "eta_ratio": 0.3, "seed": 7}
    model = zoo.trained(net).to(x.device)
    made = SparseMoreauGrad(model, **settings) if method == "sparse" else None
    made = made or GroupSparseMoreauGrad(model, groups=Tiles(2), **settings)
    eta: Tensor = made.attribute(x, return_solution=True).eta
    return eta


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    inputs, budget = (16, 1 << 14) if arguments.quick else (64, 131_100)
    rows: list[dict[str, Any]] = []
    for net, rho, method in PROBLEMS:
        data = zoo.breast_cancer("test") if net.startswith("tabular") else zoo.digits("test")
        x = data.inputs[:inputs].to(arguments.device)
        eta = strength(net, rho, method, x)
        reference = solve(net, rho, method, x, AdaptiveProximalGradient(1e-9, budget), eta, 99)
        norm = reference.attribution.flatten(1).norm(dim=1)
        candidates: dict[str, Any] = {
            "adaptive, tol 2 %": AdaptiveProximalGradient(0.02, 1 << 15),
            "adaptive, tol 1 %": AdaptiveProximalGradient(0.01, 1 << 15),
            "adaptive, tol 0.5 %": AdaptiveProximalGradient(0.005, 1 << 15),
            "fixed, 60 x 8": ProximalGradient(step_size=0.1 * rho),
            "published, 300 x 32": replace(ProximalGradient.paper(), step_size=0.1 * rho),
        }
        for name, solver in candidates.items():
            began = time.perf_counter()
            found = solve(net, rho, method, x, solver, eta, 0)
            seconds = time.perf_counter() - began
            error = (found.attribution - reference.attribution).flatten(1).norm(dim=1) / norm
            spent = found.gradient_evaluations.double()
            rows.append(
                {
                    "net": net,
                    "rho": rho,
                    "map": method,
                    "solver": name,
                    "gradients median": int(spent.quantile(0.5)),
                    "p90": int(spent.quantile(0.9)),
                    "converged": float(found.converged.double().mean()),
                    "error median": float(error.quantile(0.5)),
                    "error p90": float(error.quantile(0.9)),
                    "seconds": seconds,
                    "reference residual": float(reference.relative_residual.quantile(0.5)),
                }
            )
    report("solver", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
