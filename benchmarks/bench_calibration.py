"""Of the inputs that the default solver reports converged, how many are?

    OMP_NUM_THREADS=1 python benchmarks/bench_calibration.py

The judge is the relative residual ‖y − ȳ‖/max(‖y‖, ‖ȳ‖), ȳ = −ρS_η(p(y)), of the returned displacement y on a bank of
32,768 samples with another seed (--quick: 8,192 and fewer inputs). tol = 1 %; the first test digits.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import parser, report

from moreau_ext import GroupSparseMoreauGrad, MoreauGrad, ProximalGradient, SparseMoreauGrad, Tiles, zoo

PROBLEMS = [
    ("digits_cnn", 1.0, "moreau"),
    ("digits_cnn", 0.1, "moreau"),
    ("digits_cnn", 0.1, "sparse"),
    ("digits_cnn", 0.1, "group"),
    ("digits_cnn_gelu", 1.0, "moreau"),
]


def make(method: str, model: torch.nn.Module, strength: dict[str, Any], **settings: Any) -> MoreauGrad:
    if method == "moreau":
        return MoreauGrad(model, **settings)
    if method == "sparse":
        return SparseMoreauGrad(model, **strength, **settings)
    return GroupSparseMoreauGrad(model, groups=Tiles(2), **strength, **settings)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    inputs, samples = (16, 8192) if arguments.quick else (48, 32768)
    rows: list[dict[str, Any]] = []
    for net, rho, method in PROBLEMS:
        model, x = zoo.trained(net).to(arguments.device), zoo.digits("test").inputs[:inputs].to(arguments.device)
        ratio = {"eta_ratio": 0.3 if method == "sparse" else 0.5}
        found = make(method, model, ratio, rho=rho).attribute(x, return_solution=True)
        one = ProximalGradient(samples, 1, 0.1 * rho, noise="fixed", average_last=1, tol=0.0)
        judge = make(method, model, {"eta": found.eta}, rho=rho, seed=99, sigma=found.sigma, solver=one)
        target = model(x).argmax(1)
        y = found.displacement
        image = judge.attribute(x + y, target=target, return_solution=True).displacement
        norms = torch.maximum(y.flatten(1).norm(dim=1), image.flatten(1).norm(dim=1))
        residual = ((y - image).flatten(1).norm(dim=1) / norms)[found.converged]
        rows.append(
            {
                "net": net,
                "rho": rho,
                "map": method,
                "inputs": inputs,
                "converged": float(found.converged.double().mean()),
                "gradients median": int(found.gradient_evaluations.double().quantile(0.5)),
                "of these <= 1 %": float((residual <= 0.01).double().mean()),
                "residual median": float(residual.quantile(0.5)),
                "largest": float(residual.max()),
            }
        )
    report("calibration", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
