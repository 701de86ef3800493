"""How far do maps move when the model's passes multiply less exactly, and how long do they take?

    OMP_NUM_THREADS=1 python benchmarks/bench_precision.py --json benchmarks/results/cpu-precision.json

SparseMoreauGrad, rho = 0.1, eta a tenth of eta_max. "error": ‖A − A₆₄‖/‖A₆₄‖ per input, A₆₄ from the same net and
inputs in float64 on the same noise bank; "Jaccard": of the two supports. "fixed": ProximalGradient(8, 60, 0.01), all
steps taken, so that both runs spend the same. "adaptive": the default solver, whose own tolerance is 1e-2 and which may
spend otherwise where the passes differ. Seconds are interleaved medians. Without CUDA, "tf32" is "float32".
--quick: fewer inputs and rounds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timing import interleaved, parser, report, save

from moreau_ext import AdaptiveProximalGradient, ProximalGradient, SparseMoreauGrad, zoo
from moreau_ext.model.precision import PRECISIONS

# (net, inputs)
CASES = [("digits_cnn", 32), ("digits_cnn_softplus", 32), ("digits_vit", 16), ("digits32_resnet20", 4)]
SOLVERS: dict[str, Any] = {
    "fixed": ProximalGradient(8, 60, 0.01, tol=0.0),
    "adaptive": AdaptiveProximalGradient(0.01),
}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for net, count in CASES:
        data = (zoo.digits32 if net.startswith("digits32") else zoo.digits)("test")
        x = data.inputs[: max(2, count // 8) if arguments.quick else count].to(arguments.device)
        model = zoo.trained(net).to(arguments.device)
        doubled = copy.deepcopy(model).double()
        for name, solver in SOLVERS.items():
            settings: dict[str, Any] = {"rho": 0.1, "noise_level": 0.1, "eta_ratio": 0.1, "solver": solver}
            exact = SparseMoreauGrad(doubled, **settings).attribute(x.double(), return_solution=True)
            explainers = {p: SparseMoreauGrad(model, precision=p, **settings) for p in PRECISIONS}
            seconds = interleaved(
                {p: lambda e=e, x=x: e.attribute(x) for p, e in explainers.items()},
                arguments.device,
                rounds=2 if arguments.quick else 5,
            )
            for precision, explainer in explainers.items():
                found = explainer.attribute(x, return_solution=True)
                a, b = found.attribution.double().flatten(1), exact.attribution.flatten(1)
                error = (a - b).norm(dim=1) / b.norm(dim=1)
                both, either = ((a != 0) & (b != 0)).sum(1), ((a != 0) | (b != 0)).sum(1)
                rows.append(
                    {
                        "net": net,
                        "solver": name,
                        "precision": precision,
                        "inputs": len(x),
                        "error, median": float(error.median()),
                        "error, largest": float(error.max()),
                        "Jaccard, mean": float((both / either.clamp_min(1)).double().mean()),
                        "converged": float(found.converged.double().mean()),
                        "gradients, mean": float(found.gradient_evaluations.double().mean()),
                        "seconds": seconds[precision],
                    }
                )
        # After each, so that what was measured stays if the rest is cut off.
        save("precision", arguments.device, rows, arguments.json)
    report("precision", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
