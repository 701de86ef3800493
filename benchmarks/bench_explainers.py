"""What does a whole explanation cost beside the bare forward and backward passes of its model?

    OMP_NUM_THREADS=1 python benchmarks/bench_explainers.py

A ResNet-20-like net on 3 x 32 x 32 and the digits CNN; "bare" runs the model forward and backward on prepared noisy
inputs of the same batch, as many times as the explanation does, and does nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from timing import interleaved, parser, report
from torch import Tensor, nn

from moreau_ext import GroupSparseMoreauGrad, MoreauGrad, ProximalGradient, SparseMoreauGrad, Tiles, zoo


def bare(model: nn.Module, rows: Tensor, target: Tensor, passes: int) -> Any:
    def run() -> None:
        for _ in range(passes):
            leaf = rows.detach().requires_grad_()
            score = model(leaf).gather(1, target)
            torch.autograd.grad(score, leaf, torch.ones_like(score))

    return run


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 3 if arguments.quick else 9
    solver = ProximalGradient(max_steps=20 if arguments.quick else 60, tol=0.0)
    generator = torch.Generator().manual_seed(0)
    cases = [
        ("ResNet-20-like 3x32x32", zoo.resnet20().eval(), (3, 32, 32), 4, 8),
        ("digits CNN 1x8x8", zoo.digits_cnn().eval(), (1, 8, 8), 64, 2),
    ]
    rows: list[dict[str, Any]] = []
    for name, model, features, batch, tile in cases:
        model = model.to(device)
        x = torch.rand(batch, *features, generator=generator).to(device)
        target = torch.zeros(batch, dtype=torch.int64, device=device)
        noisy = x.repeat_interleave(solver.num_samples, 0)
        noisy = noisy + 0.1 * torch.randn(noisy.shape, generator=generator).to(device)
        explainers = {
            "moreau": MoreauGrad(model, solver=solver),
            "sparse": SparseMoreauGrad(model, solver=solver),
            "group": GroupSparseMoreauGrad(model, groups=Tiles(tile), solver=solver),
        }
        runs = {method: (lambda e=e, x=x, t=target: e.attribute(x, t)) for method, e in explainers.items()}
        runs["bare"] = bare(model, noisy, target.repeat_interleave(solver.num_samples)[:, None], solver.max_steps)
        seconds = interleaved(runs, device, rounds, each=0.0)
        rows.extend(
            {
                "model": name,
                "method": method,
                "B x m x steps": f"{batch} x {solver.num_samples} x {solver.max_steps}",
                "seconds": seconds[method],
                "bare seconds": seconds["bare"],
                "ratio": seconds[method] / seconds["bare"],
                "explanations/s": batch / seconds[method],
            }
            for method in explainers
        )
    report("explainers", device, rows, arguments.json)


if __name__ == "__main__":
    main()
