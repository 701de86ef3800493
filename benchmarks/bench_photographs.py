"""How faithful are the demo's maps of the six photographs to the net?

    python benchmarks/bench_photographs.py

The methods and settings of `moreau-ext demo --data photographs`, and beside them soft-thresholded SmoothGrad with the
support of the sparse map, the significant values of the sparse map, and a random map. Gini, non-zero share, and the
areas of deletion and insertion with the blurred photograph as baseline, 16 steps: means over the six photographs with
95 % intervals, and paired differences. A few minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import parser, report

from moreau_ext.cli import photographs
from moreau_ext.evaluation import area, blurred, bootstrap, gini, perturbation_curve, support_fraction
from moreau_ext.preparation.prepare import prepare

PAIRS = (
    ("smoothgrad", "gradient"),
    ("moreau", "smoothgrad"),
    ("sparse", "smoothgrad"),
    ("sparse", "thresholded"),
    ("group", "smoothgrad"),
    ("significant", "sparse"),
)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model, data = photographs.load(2 if arguments.quick else None, device)
    inputs, targets = data.inputs.to(device), data.targets.to(device)
    ready = prepare(model, inputs)
    maps = {}
    for method, solution, _ in photographs.explain(ready, data, device):
        maps[method] = solution.attribution
        if method == "sparse":
            maps["significant"] = photographs.significant(solution)
            support = int(solution.support[0])
    mean = maps["smoothgrad"]
    eta = mean.abs().flatten(1).topk(support + 1, dim=1).values[:, -1].view(-1, 1, 1, 1)
    maps["thresholded"] = mean.sign() * (mean.abs() - eta).clamp_min(0)
    maps["random"] = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(device)
    baseline = blurred(inputs)
    found: dict[str, dict[str, Any]] = {}
    for method, batch in maps.items():
        numbers = {"Gini": gini(batch), "non-zero share": support_fraction(batch)}
        for kind in ("deletion", "insertion"):
            numbers[kind] = area(perturbation_curve(ready.model, inputs, batch, targets, kind, baseline=baseline))
        found[method] = numbers
    rows: list[dict[str, Any]] = [
        {"method": method, **{name: str(bootstrap(values.cpu().numpy())) for name, values in numbers.items()}}
        for method, numbers in found.items()
    ]
    for one, other in PAIRS:
        differences = {k: found[one][k] - found[other][k] for k in ("deletion", "insertion")}
        rows.append(
            {"method minus rival": f"{one} minus {other}"}
            | {name: str(bootstrap(values.cpu().numpy())) for name, values in differences.items()}
        )
    report("photographs", arguments.device, rows, arguments.json)


if __name__ == "__main__":
    main()
